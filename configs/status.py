"""The state of a study or a training while it runs, from another process or machine.

    python -m tumorjax.main --config=configs/status.py --workdir=runs/scaling
    python -m tumorjax.main --config=configs/status.py --workdir=runs/scaling --config.json=True

Cells that are done, running, stopped, failed or waiting, with step, loss, speed, time left, starts
and goodput. Nothing in the workdir is changed. docs/monitoring.md says what the columns mean.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ConfigDict()
    config.job = "status"
    config.json = False  # print JSON instead of a table
    return config
