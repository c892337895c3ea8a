"""Seeing a training run: its curves, its speed, and what it lost when it was killed.

Every training keeps goodput.json beside its curve: how far it is, how fast, how often it was
started, and how much of the time since its first start went into steps that count. It is rewritten
every few seconds, so that it also says that the training lives (see `tumorjax.scaling.status`).
TensorBoard, Weights & Biases and a profile come on top where the config asks for them.

What goes out of the workdir (Weights & Biases) are numbers of the training and settings of it: no
case or patient ids, no command line, no console output.
"""

import contextlib
import importlib
import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from tumorjax.errors import Preempted, UserError
from tumorjax.files import local_folder, write_json_atomic
from tumorjax.locks import claimed

# The section "monitor" of a config.
DEFAULTS: dict[str, Any] = {
    "tensorboard": False,  # event files in FOLDER/tensorboard; pip install "tumorjax[monitor]"
    "wandb": "",  # project of Weights & Biases; "" for none. pip install "tumorjax[wandb]"
    "wandb_mode": "online",  # or "offline": into FOLDER/wandb, for `wandb sync`
    "profile_steps": (),  # first and last step of a profile into WORKDIR/profile, for XProf
    # FLOP/s that a device could do at most, for MFU; 0: as PEAK_FLOPS has it, in bfloat16.
    "peak_flops": 0.0,
}

RECORD = "goodput.json"
HEARTBEAT_SECONDS = 10.0

# Dense bfloat16 FLOP/s of one JAX device, by what its device_kind begins with, from the makers'
# data sheets (without sparsity). Chips whose cores JAX shows as devices of their own are left out.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}

# Steps that the current speed is the mean of.
_WINDOW = 50
# One profile at a time is what JAX can record; cells may train in threads side by side.
_profiling = threading.Lock()


class Monitor:
    """Records one training: how it runs, and what became of its time.

    `start`, then for each step `trace` about it and `step` after it, `row` and `save` where there
    is one, and `end`. Nothing of it waits for a device or changes what is computed.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: Path,
        workdir: Path | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks the settings; nothing is written yet.

        Args:
            settings: see `DEFAULTS`; missing ones are as there.
            folder: of the training: gets goodput.json, tensorboard/ and wandb/.
            workdir: of the job, gets profile/; None for `folder`. Where they lie in a bucket,
                these three folders are in `files.local_folder`.
            details: settings of the training, for Weights & Biases.

        Raises:
            UserError: a setting cannot be used, or a package for it is missing.
        """
        self._folder, self._workdir = folder, local_folder(workdir or folder)
        # What other programs write, who may not know buckets.
        self._here = local_folder(folder)
        self._settings, self._details = DEFAULTS | dict(settings), dict(details or {})
        self._profile_steps = check_settings(settings)
        self._record: dict[str, Any] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._flops: float | None = None
        self._sinks: list[tuple[Callable[[int, Mapping[str, float]], None], Callable]] = []
        self._since_row: list[tuple[float, float]] = []
        self._save_seconds: list[float] = []
        self._written = 0.0
        self._profile: contextlib.ExitStack | None = None

    def start(self, position: int, steps: int) -> None:
        """Begins or goes on.

        Args:
            position: steps that the newest checkpoint has.
            steps: length of the training.
        """
        self._record = _continued(_read(self._folder / RECORD), position, time.time())
        self._record |= {"steps": steps, "state": "running", "reason": "", **_process()}
        self._recent.clear()
        self._write()
        if self._settings["tensorboard"]:
            self._sinks.append(_tensorboard(self._here / "tensorboard", position))
        if self._settings["wandb"]:
            self._sinks.append(
                _wandb(self._settings, self._here, self._record["run"], self._details)
            )

    def trace(self, number: int) -> AbstractContextManager:
        """Returns what a step is to be run in, so that profiles show it by its number."""
        first, last = self._profile_steps
        if number == first and self._profile is None:
            self._profile = _start_profile(self._workdir / "profile")
        if self._profile is None:
            return contextlib.nullcontext()
        return _traced(number, self._stop_profile if number >= last else lambda: None)

    def compiled(self, step: Any, *arguments: Any) -> None:
        """Asks the compiled step for its FLOP, once, if a share of the peak can be told.

        Args:
            step: jitted, called before with arguments of these shapes and shardings.
            arguments: that it is called with.
        """
        if self._flops is None and self.peak_flops() and hasattr(step, "lower"):
            # What JAX has compiled for the call comes back from its cache.
            self._flops = flops(step.lower(*arguments).compile())

    def peak_flops(self) -> float | None:
        """FLOP/s that a device is sold with; None if that is not known."""
        if self._settings["peak_flops"]:
            return float(self._settings["peak_flops"])
        return peak_flops(jax.local_devices()[0].device_kind)

    def step(self, number: int, load_seconds: float, step_seconds: float) -> None:
        """Records a step.

        Args:
            number: from 1 on.
            load_seconds: waited for its batch.
            step_seconds: from the batch to the result.
        """
        record = self._record
        record["step"] = number
        self._since_row.append((load_seconds, step_seconds))
        if not record["compiled"]:
            # The first step of a start compiles; it counts as long as the one after it.
            record["compiled"], record["uncounted"] = True, 1
        else:
            record["useful_seconds"] += step_seconds * (1 + record["uncounted"])
            record["uncounted"] = 0
            self._recent.append((load_seconds, step_seconds))
        if time.time() - self._written > HEARTBEAT_SECONDS:
            self._write()

    def row(self, number: int, scalars: Mapping[str, float]) -> None:
        """Records a row of the training curve, and the speed since the last one."""
        if not self._sinks:
            return
        values = dict(scalars) | self._speed()
        for log, _ in self._sinks:
            log(number, values)
        self._since_row, self._save_seconds = [], []

    def save(self, number: int, seconds: float) -> None:
        """Records that a checkpoint was saved after a step, and how long training waited for it."""
        self._save_seconds.append(seconds)
        self._record["saves"].append([number, round(self._record["useful_seconds"], 3)])
        self._record["save_seconds"] = round(self._record["save_seconds"] + seconds, 3)
        self._write()

    def end(self, error: BaseException | None = None) -> None:
        """Ends the recording.

        Args:
            error: what ended the training before its last step.
        """
        self._stop_profile()
        if not self._record:
            return
        if error is None:
            state = "trained" if self._record["step"] >= self._record["steps"] else "stopped"
        else:
            gentle = isinstance(error, Preempted) or not isinstance(error, Exception)
            state = "stopped" if gentle else "failed"
        self._record["state"] = state
        self._record["reason"] = "" if error is None else f"{type(error).__name__}: {error}"
        self._write()
        for _, close in self._sinks:
            close(state != "failed")
        self._sinks.clear()

    def _speed(self) -> dict[str, float]:
        """Returns means since the last row, memory now, and goodput since the first start."""
        load, step = (
            (float(np.mean(t)) for t in zip(*self._since_row, strict=True))
            if (self._since_row)
            else (0.0, 0.0)
        )
        values = {"goodput": goodput(self._record, time.time()), **memory()}
        if load + step > 0:
            values |= {
                "time/step_seconds": step,
                "time/loader_seconds": load,
                "time/loader_share": load / (load + step),
            }
            if self._flops is not None and (peak := self.peak_flops()):
                values["mfu"] = self._flops / ((load + step) * peak)
        if self._save_seconds:
            values["time/save_seconds"] = float(np.mean(self._save_seconds))
        return values

    def _write(self) -> None:
        record = self._record
        if self._recent:
            load, step = (float(np.mean(times)) for times in zip(*self._recent, strict=True))
            record["load_seconds"], record["step_seconds"] = round(load, 6), round(step, 6)
        record["written"] = time.time()
        write_json_atomic(self._folder / RECORD, record)
        self._written = record["written"]

    def _stop_profile(self) -> None:
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.close()


def check_settings(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Checks the section `monitor` and the packages that it needs.

    Returns:
        the first and the last step of the profile; (0, 0) without.

    Raises:
        UserError: a setting cannot be used, or a package is missing.
    """
    settings = DEFAULTS | dict(settings)
    if unknown := sorted(set(settings) - set(DEFAULTS)):
        raise UserError(f"monitor has the unknown key {unknown[0]}. Expected {', '.join(DEFAULTS)}")
    steps = tuple(settings["profile_steps"] or (0, 0))
    if len(steps) != 2 or not all(isinstance(n, int) for n in steps) or steps[0] > steps[1]:
        raise UserError(
            f"monitor.profile_steps is {steps}. Expected the first and the last step, such as"
            " (100, 103), or () for none"
        )
    if settings["wandb_mode"] not in ("online", "offline"):
        raise UserError(
            f"monitor.wandb_mode is {settings['wandb_mode']!r}. Expected online or offline"
        )
    if settings["tensorboard"]:
        _import("tensorboard", "monitor.tensorboard", "monitor")
    if settings["wandb"]:
        _import("wandb", "monitor.wandb", "wandb")
    return steps


# ---------------------------------------------------------------------------- figures


def flops(compiled: Any) -> float | None:
    """Returns the FLOP that one device does in a compiled step; None where XLA does not say.

    XLA counts what it computes, so also what is computed twice to save memory, and a loop's inside
    once.
    """
    analysis = compiled.cost_analysis()
    value = float((analysis or {}).get("flops", 0.0))
    return value if value > 0 else None


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's dense bfloat16 FLOP/s; None if it is not in `PEAK_FLOPS`."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def memory() -> dict[str, float]:
    """Returns GB in use: of the first local device, or where it does not say, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_in_use" not in stats:
        return {"memory/process_gb": psutil.Process().memory_info().rss / 1e9}
    named = {"bytes_in_use": "memory/device_gb", "peak_bytes_in_use": "memory/device_peak_gb"}
    return {name: stats[key] / 1e9 for key, name in named.items() if key in stats}


def goodput(record: Mapping[str, Any], until: float) -> float:
    """Returns the share of the time since a training's first start that its steps took.

    Steps that were done again after a kill count once; waiting for batches, saving, compiling and
    the time between two starts do not count.

    Args:
        record: what goodput.json holds.
        until: seconds since 1970.
    """
    seconds = until - record["first_start"]
    return record["useful_seconds"] / seconds if seconds > 0 else 0.0


def _continued(before: dict[str, Any] | None, position: int, now: float) -> dict[str, Any]:
    """Returns the record with which a training starts at a position."""
    if before is None:
        before = {
            "run": uuid.uuid4().hex,
            "first_start": now,
            "starts": 0,
            "step": position,
            "repeated_steps": 0,
            "useful_seconds": 0.0,
            "save_seconds": 0.0,
            "saves": [],
        }
    # What was done beyond the checkpoint is lost; its time is known at each save and at the end.
    known = [[0, 0.0], *before["saves"], [before["step"], before["useful_seconds"]]]
    useful = float(np.interp(position, *np.transpose(sorted(known))))
    return before | {
        "starts": before["starts"] + 1,
        "started": now,
        "started_at": position,
        "step": position,
        "repeated_steps": before["repeated_steps"] + max(0, before["step"] - position),
        "useful_seconds": useful,
        "saves": [save for save in before["saves"] if save[0] <= position],
        "compiled": False,
        "uncounted": 0,
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


# ---------------------------------------------------------------------------- profile


def _start_profile(folder: Path) -> contextlib.ExitStack | None:
    """Starts a profile, unless there is one or another training is recording it."""
    if not _profiling.acquire(blocking=False):
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(_profiling.release)
        folder.mkdir(parents=True, exist_ok=True)
        # Of several processes one records; one that is killed over it lets go.
        free = stack.enter_context(claimed(folder / ".lock"))
        if not free or any(folder.rglob("*.xplane.pb")):
            return None
        jax.profiler.start_trace(str(folder))
        stack.callback(jax.profiler.stop_trace)
        return stack.pop_all()


@contextlib.contextmanager
def _traced(number: int, after: Callable[[], None]) -> Iterator[None]:
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
        yield
    after()


# ---------------------------------------------------------------------------- where metrics go


def _import(module: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{key} is set, and {module} is not installed ({error})."
            f' Run pip install "tumorjax[{extra}]", or leave the setting out'
        ) from error


def _tensorboard(folder: Path, position: int) -> tuple[Callable, Callable]:
    """Returns what logs scalars of a step to event files, and what closes them."""
    _import("tensorboard", "monitor.tensorboard", "monitor")
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    if position:
        # TensorBoard forgets the points from here on: their steps are done again.
        again = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=position + 1, session_log=again))

    def log(number: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=v) for name, v in scalars.items()]
        writer.add_event(Event(wall_time=time.time(), step=number, summary=Summary(value=values)))
        writer.flush()

    return log, lambda well: writer.close()


def _wandb(
    settings: Mapping[str, Any], folder: Path, run: str, details: Mapping[str, Any]
) -> tuple[Callable, Callable]:
    """Returns what logs scalars of a step to Weights & Biases, and what ends the run there."""
    wandb = _import("wandb", "monitor.wandb", "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    # Command line, console, code and machine may name patients or people: they stay here.
    private = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        host="",
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    logged = wandb.init(
        project=settings["wandb"],
        mode=settings["wandb_mode"],
        dir=str(folder),
        name=folder.name,
        # The same after a restart, so that one training is one run.
        id=run,
        resume="allow",
        # Several trainings of a process are runs of their own.
        reinit="create_new",
        config=dict(details),
        settings=private,
    )
    logged.define_metric("*", step_metric="step")

    def log(number: int, scalars: Mapping[str, float]) -> None:
        logged.log({"step": number, **scalars})

    return log, lambda well: logged.finish(exit_code=0 if well else 1)


def of_training(config: Mapping[str, Any], folder: Path, sections: Sequence[str]) -> Monitor:
    """Returns the monitor of one training of a job.

    Args:
        config: of the job; its section "monitor" may be missing.
        folder: of the training. That of a cell lies in cells/ of its study's workdir.
        sections: of the config that describe the training; none of them may name a patient.
    """
    details = {name: config[name] for name in sections if name in config}
    # Paths are of this machine alone.
    details["training"] = {
        key: value
        for key, value in details.get("training", {}).items()
        if key not in ("start_from", "perceptual")
    }
    workdir = folder.parent.parent if folder.parent.name == "cells" else folder
    return Monitor(config.get("monitor", {}), folder, workdir, details)
