"""Networks that were trained here: from a cell's folder to masks.

A scan goes the way that training scans went (RAS+, the network's spacing and window), through the
sliding window, and back (native_grid.py).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from ml_collections import ConfigDict

from tumorjax.anatomy import mirror_table
from tumorjax.geometry import (
    from_canonical,
    prepare_image,
    resample_to_shape,
    spacing_of,
    to_canonical,
)
from tumorjax.inference.native_grid import native_labels, structures
from tumorjax.inference.network import Network, Prepared
from tumorjax.nifti import LEAST_HU_RANGE, Scan, check_hu
from tumorjax.settings import plain
from tumorjax.training import checkpoints


def open_network(folder: str | Path, step: int | None, inference: ConfigDict) -> Network:
    """Opens a network that was trained here.

    Args:
        folder: of a cell or of a segmentation job.
        step: which checkpoint; None for the newest.
        inference: further arguments of `sliding_window.predict`; mirror_axes None for none.

    Raises:
        UserError: the folder has no configuration or no checkpoint, or they do not belong
            together.
    """
    apply, trained = checkpoints.load_model(folder, step)
    table = structures(trained.task.classes)
    window = plain(inference)
    window["mirror_axes"] = window["mirror_axes"] or []
    swap = mirror_table(trained.task.classes) if 0 in window["mirror_axes"] else None
    preparation = {
        "spacing": list(trained.preparation.spacing),
        "window": list(trained.preparation.window),
        "order": trained.preparation.get("order", 3),
    }

    def labels(probabilities: Any, prepared: Prepared) -> Any:
        found = native_labels(probabilities, prepared.image, prepared.shape, table)
        return from_canonical(found, prepared.scan.affine)

    x, y, z = trained.training.patch_size
    return Network(
        apply,
        (x, y, z),
        window | {"mirror_table": swap},
        table,
        {name: tuple(labels) for name, labels in trained.task.classes.items()},
        LEAST_HU_RANGE,
        json.dumps(preparation),
        lambda scan: prepare_scan(scan, trained.preparation),
        labels,
        native_probabilities,
        {"classes": plain(trained.task.classes), **preparation},
    )


def prepare_scan(scan: Scan, preparation: Any) -> Prepared:
    """Brings a scan to the grid and values that the network was trained on.

    Args:
        scan: in HU.
        preparation: spacing (mm), window (HU that become 0 and 1) and order of the training data.

    Raises:
        CaseError: its values are no Hounsfield units.
    """
    check_hu(scan.name, scan.image)
    image, affine = to_canonical(scan.image, scan.affine)
    prepared = prepare_image(
        image,
        spacing_of(affine),
        preparation.spacing,
        preparation.window,
        preparation.get("order", 3),
    )
    x, y, z = image.shape
    return Prepared(scan, (x, y, z), prepared)


def native_probabilities(
    probabilities: Float[np.ndarray, "x y z classes"], prepared: Prepared, classes: Sequence[int]
) -> Iterator[Float32[np.ndarray, "i j k"]]:
    """Yields classes' probabilities on the scan's own grid, interpolated linearly."""
    for index in classes:
        one = resample_to_shape(probabilities[..., index], prepared.shape, 1)
        yield from_canonical(one, prepared.scan.affine)
