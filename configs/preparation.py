"""Scans and their labels become a store.

    python -m tumorjax.main --config=configs/preparation.py --config.input=ABDOMENATLAS
    python -m tumorjax.main --config=configs/preparation.py:nnunet --config.input=Dataset001_Mine
    python -m tumorjax.main --config=configs/preparation.py:msd --config.input=Task03_Liver
    python -m tumorjax.main --config=configs/preparation.py:scans --config.input=UNLABELLED
    python -m tumorjax.main --config=configs/preparation.py:virtual

Variants are the sources: abdomen_atlas (default), nnunet, msd, scans (without labels, for the
synthesizer), virtual (the built-in cohort).
`input` may hold a patients.csv (case,patient,site); without one each scan is a patient of its own.
Cases that cannot be used are listed in WORKDIR/rejected.csv, the rest goes on. Run again, only what
is missing or changed is done.
"""

from ml_collections import ConfigDict

VARIANTS = ("abdomen_atlas", "nnunet", "msd", "scans", "virtual")


def get_config(variant: str = "abdomen_atlas") -> ConfigDict:
    """Returns the configuration of the preparation job."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.job = "preparation"
    config.source = variant
    config.input = ""  # the data set's folder; virtual: where to make it, empty: WORKDIR/scans
    config.output = ""  # path or file://, gs://, s3:// URL of the store; empty: WORKDIR/store

    # What all cases of a store share.
    config.spacing = (1.5, 1.5, 1.5)  # mm
    config.window = (-175.0, 250.0)  # HU that become 0 and 1
    config.order = 3  # of the image's interpolation: 1 linear, 3 cubic

    # The source's label names -> structures of tumorjax.anatomy, "" to drop a label. Only for names
    # that the source's own table does not know; "kidney" is split into its two sides.
    config.labels = ConfigDict()

    # Dask: processes here (0: one per core), or the address of a running scheduler.
    config.workers = 0
    config.scheduler = ""

    # The built-in cohort; data_prep/virtual_abdomen.py says what each of its settings is.
    config.virtual = ConfigDict()
    if variant == "virtual":
        from data_prep.virtual_abdomen import default_settings

        config.virtual = ConfigDict(
            {k: tuple(v) if isinstance(v, list) else v for k, v in default_settings().items()}
        )
    return config
