"""The command line: reads flags and a config, and hands over to the job that the config names."""

import importlib
import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from tumorjax.errors import CaseError, UserError

JOBS = {
    "scaling": "tumorjax.scaling.study",
    "laws": "tumorjax.scaling.laws",
    "preparation": "data_prep.prepare",
    "segmentation": "tumorjax.training.segmenter",
    "evaluation": "tumorjax.evaluation.evaluate",
    "prediction": "tumorjax.inference.predict",
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT if any.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results; default runs/JOB.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}. Settings are given as --config.key=value"
        )
    config = _CONFIG.value
    if config.get("job") not in JOBS:
        raise UserError(
            f"config.job is {config.get('job')!r}. Expected one of {', '.join(sorted(JOBS))}"
        )
    workdir = Path(_WORKDIR.value or Path("runs") / config.job)
    job = importlib.import_module(JOBS[config.job])
    return job.run(config, workdir) or 0


def entry() -> None:
    """Runs a job. Exit code 0: done; 1: done, some cases set aside; 2: wrong use, in one line."""
    absl_logging.set_verbosity(absl_logging.INFO)
    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        app.run(main, flags_parser=_parse)
    except (UserError, CaseError) as error:
        print(f"tumorjax: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # A config key that does not exist surfaces as one of these while flags are read.
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{first} (see the config file for the keys there are)") from error


if __name__ == "__main__":
    entry()
