"""The store that a job works on: the one that its config names, or one made from its scans."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_prep.prepare import prepare
from tumorjax import processes
from tumorjax.errors import UserError
from tumorjax.files import local_folder
from tumorjax.locks import locked
from tumorjax.training.segmenter import check_grid_of
from tumorjax.volumes import Store, open_store

# How long the other processes of a job wait: thousands of scans take hours.
_PREPARATION_SECONDS = 7 * 24 * 3600


def prepared_store(config: ConfigDict, workdir: Path) -> tuple[Store, list[dict[str, Any]]]:
    """Opens the store that a job's config names, or makes the job's own in workdir/store.

    In a job of several processes the first makes it, and the others wait.

    Args:
        config: with the sections data (store, source, root, labels), preparation and, for the
            source "virtual", virtual; and workers.
        workdir: the job's.

    Returns:
        The store, and the cases that were set aside: case, stage, reason.

    Raises:
        UserError: the store is of another grid than config.preparation, or a setting is wrong.
    """
    if config.data.store:
        store = open_store(config.data.store)
        check_grid_of(store, config.preparation)
        processes.agree_on_store(store)
        return store, []
    virtual = config.data.source == "virtual"
    if not config.data.root and not virtual:
        raise UserError(
            f"data.root is empty. Give the folder of the {config.data.source} scans, or data.store"
        )
    url = str(workdir / "store")
    settings = config.preparation.to_dict()
    settings["source_settings"] = (
        config.virtual.to_dict() if virtual else {"labels": config.data.labels.to_dict()}
    )
    rejected: list[dict[str, Any]] = []
    if processes.is_first():
        # Others may work on the folder in jobs of their own.
        with locked(workdir / ".prepare.lock"):
            found = prepare(
                config.data.source,
                config.data.root or str(local_folder(workdir) / "scans"),
                url,
                settings,
                workdir,
                workers=config.workers,
            )
        rejected = [dict(row) for row in found]
    rejected = processes.gather(rejected, _PREPARATION_SECONDS)[0]
    store = open_store(url)
    processes.agree_on_store(store)
    return store, rejected
