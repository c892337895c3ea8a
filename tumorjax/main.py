"""The command line: reads flags and a config, and hands over to the job that the config names."""

import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from tumorjax import compilation_cache, processes
from tumorjax.errors import CaseError, Lost, Preempted, UserError
from tumorjax.files import check_writable, location
from tumorjax.heartbeat import LOST, PREEMPTED
from tumorjax.settings import plain
from tumorjax.training import preemption

JOBS = {
    "scaling": "tumorjax.scaling.study",
    "laws": "tumorjax.scaling.laws",
    "worth": "tumorjax.scaling.worth",
    "preparation": "data_prep.prepare",
    "segmentation": "tumorjax.training.segmenter",
    "autoencoder": "tumorjax.synthesis.autoencoder_training",
    "diffusion": "tumorjax.synthesis.diffusion_training",
    "evaluation": "tumorjax.evaluation.evaluate",
    "prediction": "tumorjax.inference.predict",
    "synthesis": "tumorjax.inference.organs",
    "realism": "tumorjax.synthesis.realism",
    "export": "tumorjax.inference.nnunet_export",
    "status": "tumorjax.scaling.status",
}

USAGE = f"""tumorjax --config=configs/JOB.py[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]
         [--compilation_cache=DIR]

JOB is one of {", ".join(JOBS)}. Its config file says what it does, its variants and its
keys. Results go to DIR (default runs/JOB); run again, a job goes on where it stopped.
Compiled programs are kept in ~/.cache/tumorjax; --compilation_cache= keeps none.
Exit codes: 0 all done; 1 finished, with cases set aside (DIR/rejected.csv); 2 wrong use;
3 a defect of tumorjax, with its traceback; {PREEMPTED} told to stop (SIGTERM, SIGUSR1 or
SIGUSR2), and saved; {LOST} another process of the job is gone. After these two, the same
command goes on where it stopped."""

# A study's processes may be started one by one; they divide its cells.
_SHARING = ("scaling",)

_CODES: dict[type[Exception], int] = {
    UserError: 2,
    CaseError: 2,
    Lost: LOST,
    Preempted: PREEMPTED,
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT if any.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results, or gs://, s3://; default runs/JOB."
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Keeps compiled programs between runs; default ~/.cache/tumorjax/compiled, empty for none.",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}. Settings are given as --config.key=value"
        )
    # Orbax and Dask tell of every step of a save and of every worker at level INFO.
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    # Dask sets its loggers' levels itself, when it is imported.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    config = _CONFIG.value
    if config.get("job") not in JOBS:
        raise UserError(
            f"config.job is {config.get('job')!r}. Expected one of {', '.join(sorted(JOBS))}"
        )
    workdir = location(_WORKDIR.value or Path("runs") / config.job)
    check_writable(workdir)
    if config.get("rehearse"):
        # Programs for a machine that is not here are not kept among those of this one.
        return importlib.import_module("tumorjax.rehearsal.rehearse").run(config, workdir)
    cache = _CACHE.value
    compilation_cache.keep(compilation_cache.default_folder() if cache is None else cache)
    job = importlib.import_module(JOBS[config.job])
    settings = processes.DEFAULTS | dict(config.get("processes", {}))
    with preemption.watch(settings["grace_seconds"]):
        processes.start(settings)
        processes.agree("config", {k: v for k, v in plain(config).items() if k != "processes"})
        # Jobs that know of processes say whether those of one each may share a workdir.
        with ExitStack() as stack:
            if "processes" in config:
                stack.enter_context(processes.holding(workdir, config.job not in _SHARING))
            code = job.run(config, workdir) or 0
        processes.end()
    return code


def entry() -> None:
    """Runs a job.

    Exit codes are those of `USAGE`.
    """
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        print(USAGE)
        return
    run_or_exit(lambda: app.run(main, flags_parser=_parse))


def run_or_exit(job: Callable[[], object]) -> None:
    """Calls a function; an exception becomes a message and an exit code, in all processes.

    Args:
        job: a whole job.
    """
    try:
        job()
    except KeyboardInterrupt as error:
        processes.fail(error, 128 + signal.SIGINT, "tumorjax: interrupted")
        raise
    except Exception as error:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), 3)
        # Python itself would exit with 1, which here means that cases were set aside.
        message = traceback.format_exc().rstrip() if code == 3 else f"tumorjax: {error}"
        if code in (LOST, PREEMPTED):
            message += ". Run the same command again: it goes on from there"
        processes.fail(error, code, message)
        print(message, file=sys.stderr)
        sys.exit(code)


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
        _CONFIG.value.get("job")  # A file that cannot be read is noticed only now.
    except Exception as error:  # A config file is Python: it can raise anything.
        raise UserError(_explain(error, arguments)) from error
    return rest


def _explain(error: Exception, arguments: list[str]) -> str:
    """Returns in one line what is wrong with the command line or the config file."""
    # Errors of nested keys are quoted once more on each level.
    text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\", "")
    lines = [line.strip(" .") for line in text.splitlines() if line.strip(" .")] or [repr(error)]
    config = re.search(r"(?:^|\n)--?config[=\n]([^\n:]*)", "\n".join(arguments))
    if not config:
        return f"--config is missing. Give --config=configs/JOB.py, JOB one of {', '.join(JOBS)}"
    path = config[1]
    if not Path(path).is_file():
        return f"{path}: no such config file. Give --config=configs/JOB.py"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    if "Error whilst parsing" in lines[0]:
        # What get_config raised is at the end of the trace that is quoted here.
        if "takes 0 positional arguments" in lines[-1]:
            return f"{path} has no variants. Leave out what follows the colon"
        return f"{path}: {lines[-1].removeprefix('ValueError: ')}"
    if isinstance(error, (KeyError, AttributeError)) and (
        key := re.match(r"['\"]+(\w+)", lines[0])
    ):
        settings = (argument.lstrip("-").split("=")[0] for argument in arguments)
        where = next((name for name in settings if key[1] in name.split(".")), key[1])
        guess = lines[1].rstrip("'\"") if len(lines) > 1 else f"{path} shows those that there are"
        return f"there is no config key {where}. {guess}"
    if isinstance(error, flags.Error):
        return f"{lines[0]}. Settings are given as --config.key=value, see {path}"
    return f"{path}: {lines[0]}"


if __name__ == "__main__":
    entry()
