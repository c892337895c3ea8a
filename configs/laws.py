"""Scaling laws, plateaus, savings and a report from any table of results.

    python -m tumorjax.main --config=configs/laws.py --config.results=results.csv

The table is a CSV file with the columns split (id or ood), arm (real or real+synthetic), n_real and
at least one metric in percent: dsc, nsd, tumor_sensitivity, ... (see README). Optional columns:
seed (repeated rows are seeds anyway), class, and METRIC_low and METRIC_high with 95 % intervals.
A study's own results.csv works too; the rows per patient beside it are then used for the intervals.
"""

from ml_collections import ConfigDict

from tumorjax.scaling.results import METRICS, SPLITS


def get_config() -> ConfigDict:
    """Returns the configuration of the laws job."""
    config = ConfigDict()
    config.job = "laws"
    config.results = ""  # the CSV file
    config.seed = 0  # of the bootstrap draws

    config.metrics = tuple(METRICS)  # those of them that the table has
    config.splits = SPLITS
    config.margin = 1.0  # points; a plateau begins this close to the curve's best
    config.bootstrap = 500  # draws behind the 95 % intervals
    return config
