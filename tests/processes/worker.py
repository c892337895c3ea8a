"""One process of a test's job: python worker.py TASK PORT INDEX FOLDER. Its last line is JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from tumorjax import main, processes
from tumorjax.training import preemption

TASK, PORT, INDEX, FOLDER = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
SETTINGS = {
    "coordinator": f"127.0.0.1:{PORT}",
    "num_processes": 2,
    "process_id": INDEX,
    "start_seconds": 60,
    "silent_seconds": 4,
}


def talk() -> dict:
    """Everything that processes say to each other."""
    processes.barrier("first", 60)
    found = {"gathered": processes.gather({"index": INDEX, "devices": jax.local_device_count()})}
    found["own"] = processes.gather(INDEX, among=[INDEX])
    processes.agree("config", {"a": {"b": 1}})
    found["differ"] = _error(lambda: processes.agree("config", {"a": {"b": 1 + INDEX}}))
    with processes.holding(FOLDER, alone=False):
        found["held"] = json.loads((FOLDER / ".job.json").read_text())["job"]
    found["restored"] = [_keep(FOLDER / f"own{INDEX}", [INDEX]), _keep(FOLDER / "both", None)]
    found["replicated"] = _replicated()
    # Last: the process that does not come is left alone at every later barrier.
    if INDEX == 0:
        found["late"] = _error(lambda: processes.barrier("late", 1))
    else:
        time.sleep(2)
    return found


def train() -> dict:
    """A training that stops early."""
    from tumorjax.clock import Clock
    from tumorjax.training import segmenter

    config, sources, mesh = _training()

    def told(step, row):
        # One process alone hears of it, and both stop at one step.
        if step == 1 and INDEX == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 1:
            while not processes.noticed():
                time.sleep(0.05)
            # And JAX's service, which looks once a second, before all steps are made.
            time.sleep(2.5)

    try:
        segmenter.train_segmenter(
            config, sources, FOLDER / "both", mesh, clock=Clock(), progress=told
        )
    except preemption.Preempted as error:
        return {"stopped": str(error)}
    return {"stopped": None}


def die() -> dict:
    """The process whose number is in the task's name is killed."""
    processes.barrier("first", 60)
    if f"die{INDEX}" == TASK:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def fail() -> dict:
    """Process 1 ends with an error of its own, while process 0 waits for it."""
    if INDEX == 1:
        raise KeyError("lesion_volume")
    processes.barrier("after the error", 60)
    return {}


def _replicated() -> list:
    """Weights that lie on one device of each process, put onto all devices of both."""
    import numpy as np

    from tumorjax import parallel

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    weights = {"kernel": jax.device_put(values, jax.local_devices()[0])}
    whole = parallel.replicate(parallel.make_mesh({"data": -1}), weights)["kernel"]
    total = jax.jit(lambda array: array.sum())(whole)
    parts = [part.data.tolist() for part in whole.addressable_shards]
    return [whole.is_fully_replicated, len(whole.sharding.device_set), float(total), parts]


def _keep(folder: Path, owners: list[int] | None) -> list[float]:
    """Saves three states of some processes; returns what comes back of the newest."""
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tumorjax.training import checkpoints

    devices = jax.local_devices() if owners else jax.devices()
    split = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    values = np.arange(8, dtype=np.float32) + 100 * INDEX * bool(owners)

    def state(step):
        array = jax.make_array_from_callback((8,), split, lambda part: step * values[part])
        return {"parameters": {"kernel": array}}

    folder.mkdir(exist_ok=True)
    with checkpoints.open_manager(folder, write=True, processes=owners) as manager:
        for step in (1, 2, 3):
            checkpoints.save(manager, step, state(step), step)
        checkpoints.finish(manager)
    with checkpoints.open_manager(folder, write=True, processes=owners) as manager:
        restored, position = checkpoints.restore_newest(manager, state(0))
    parts = restored["parameters"]["kernel"].addressable_shards
    return [position, *(float(part.data[0]) for part in parts)]


def _training(devices=None):
    from configs.segmentation import get_config
    from tumorjax import parallel
    from tumorjax.volumes import open_store

    config = get_config()
    for name, value in json.loads((FOLDER / "training.json").read_text()).items():
        section, key = name.split(".")
        config[section][key] = value
    store = open_store(FOLDER / "store")
    sources = [(store, case) for case in store.cases]
    (FOLDER / "both").mkdir(exist_ok=True)
    return config, sources, parallel.make_mesh({"data": -1}, devices)


def _error(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def job() -> int:
    with preemption.watch(20):
        processes.start(SETTINGS)
        found = {"talk": talk, "train": train, "fail": fail}.get(TASK, die)()
        print(json.dumps(found), flush=True)
        processes.end()
    return 0


main.run_or_exit(job)
