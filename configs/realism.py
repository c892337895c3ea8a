"""How real synthetic tumours are: sizes, shapes, looks, and whether a classifier can tell.

    python -m tumorjax.main --config=configs/realism.py --workdir=runs/realism \
        --config.data.store=runs/scaling/store --config.data.synthetic=runs/scaling/synthetic

`data.synthetic` is a store, or the folder that configs/synthesis.py wrote to. Kinds of tumour that
both have are compared. Written are index.html (opens without a network), figures/*.png and *.pdf,
realism.json (all numbers), realism.csv (a row per tumour), distances.csv (a row per distribution)
and rejected.csv (cases set aside).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "realism"
    config.seed = 0  # of folds, bootstrap, t-SNE and the choice of cases

    config.data = ConfigDict()
    config.data.store = ""  # real scans with tumours
    config.data.cases = ()  # of it; empty: all that have tumours
    config.data.synthetic = ""  # a store, or a folder of the synthesis job
    config.data.synthetic_cases = ()  # of it; empty: all
    config.data.most_cases = 300  # of either, drawn by the seed; 0: all
    config.data.minimum_voxels = 4  # smaller tumours have no shape to compare

    # Folder of a cell or a segmentation job, whose encoder then says what tumours look like (as in
    # the paper); it should not have been trained on these synthetic scans. Empty: the fixed
    # features of intensity and texture in synthesis/realism_features.py.
    config.checkpoint = ""

    config.test = ConfigDict()
    config.test.folds = 5  # whole patients each
    config.test.resamples = 1000  # of patients, for the interval
    config.test.confidence = 0.95

    config.pictures = 8  # of each kind on the contact sheet
    return config
