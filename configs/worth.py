"""What synthetic tumours are worth: studies with different synthesizers side by side.

    python -m tumorjax.main --config=configs/scaling.py:worth --workdir=runs/worth_rules
    python -m tumorjax.main --config=configs/scaling.py:worth --workdir=runs/worth_diffusion \
        --config.data.store=runs/worth_rules/store --config.grid.arms="('real+synthetic',)" \
        --config.synthesis.synthesizer=diffusion --config.synthesis.checkpoint=runs/diffusion
    python -m tumorjax.main --config=configs/worth.py \
        --config.studies="{'rules': 'runs/worth_rules', 'diffusion': 'runs/worth_diffusion'}"

The studies must have one store, split and training; they may differ in their synthesis and in which
arms they have. Real scans alone are taken from the first study that has them. Written are
WORKDIR/worth.csv, worth.md, worth.png and worth.pdf.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of the worth job."""
    config = ConfigDict()
    config.job = "worth"
    config.studies = ConfigDict()  # name of the synthesizer -> the study's folder
    config.metric = "dsc"  # see README for the columns of results.csv
    config.bootstrap = 500  # draws behind the 95 % intervals
    config.seed = 0  # of the draws
    return config
