"""What is said of one tumour's look in numbers: fixed intensities, or a network's own features.

Size and shape are compared by themselves and are not among the fixed features, though a lesion of a
few voxels is all edge: hence the test on tumours of one size, see `realism_tests.match_sizes`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from tumorjax.errors import CaseError, UserError
from tumorjax.models.convolution import compiler_options
from tumorjax.synthesis.realism_tumors import Case, Source
from tumorjax.training import checkpoints

# Means, deviations and quantiles are of HU, gradients in HU/mm, differences to the surroundings.
# Grain is the root mean square of a voxel's difference from the mean of its six neighbours, HU:
# the scan's noise and the finest texture.
FEATURES = (
    "lesion_mean",
    "lesion_deviation",
    "lesion_p10",
    "lesion_p90",
    "lesion_skewness",
    "lesion_gradient",
    "lesion_grain",
    "rim_mean",
    "rim_deviation",
    "rim_gradient",
    "surroundings_mean",
    "surroundings_deviation",
    "surroundings_gradient",
    "surroundings_grain",
    "contrast",
    "rim_contrast",
    "grain_ratio",
)


def describe(
    image: Float[np.ndarray, "x y z"],
    gradient: Float[np.ndarray, "x y z"],
    regions: Bool[np.ndarray, "3 x y z"],
    spacing: tuple[float, float, float],
) -> dict[str, float]:
    """Returns `FEATURES` of a tumour; NaN for what an empty region would say.

    Args:
        image: HU about the tumour.
        gradient: its magnitude, HU/mm.
        regions: lesion, rim and surroundings.
        spacing: not needed; the regions are in mm already.
    """
    lesion, rim, around = regions
    grain = _laplacian(image) ** 2
    found = {
        "lesion_p10": _quantile(image[lesion], 0.1),
        "lesion_p90": _quantile(image[lesion], 0.9),
        "lesion_skewness": _skewness(image[lesion]),
        "lesion_grain": np.sqrt(_mean(grain[lesion])),
        "surroundings_grain": np.sqrt(_mean(grain[around])),
    }
    for name, region in (("lesion", lesion), ("rim", rim), ("surroundings", around)):
        found[f"{name}_mean"] = _mean(image[region])
        found[f"{name}_deviation"] = float(image[region].std()) if region.any() else np.nan
        found[f"{name}_gradient"] = _mean(gradient[region])
    found["contrast"] = found["lesion_mean"] - found["surroundings_mean"]
    found["rim_contrast"] = found["rim_mean"] - found["surroundings_mean"]
    # A HU more than the grain itself: a scan without any noise has a ratio too.
    found["grain_ratio"] = (found["lesion_grain"] + 1) / (found["surroundings_grain"] + 1)
    return {name: float(found[name]) for name in FEATURES}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _quantile(values: np.ndarray, share: float) -> float:
    return float(np.quantile(values, share)) if values.size else float("nan")


def _skewness(values: np.ndarray) -> float:
    deviation = float(values.std()) if values.size else 0.0
    return float((((values - values.mean()) / deviation) ** 3).mean()) if deviation > 0 else 0.0


def _laplacian(image: Float[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z"]:
    """A voxel's difference from the mean of its six neighbours; the border repeats itself."""
    padded = np.pad(image, 1, mode="edge")
    inner = slice(1, -1)
    total = sum(
        padded[tuple(side if a == axis else inner for a in range(3))]
        for axis in range(3)
        for side in (slice(None, -2), slice(2, None))
    )
    return image - total / 6


def encoder(
    folder: str, source: Source
) -> tuple[Callable[[Case, Float[np.ndarray, "3"]], Float[np.ndarray, " channels"]], str]:
    """Returns a function that describes a tumour by a segmentation network's encoder.

    Its features are the means over space of the deepest stage's channels, for a crop of the
    network's patch size about the tumour's middle.

    Args:
        folder: of a cell or a segmentation job; a U-Net of plain or residual stages.
        source: real cases, whose window and spacing must be those of the training.

    Returns:
        encode: (case, centre in voxels) -> float32 [channels]; and what to call it.

    Raises:
        UserError: there is no checkpoint, the network has no such encoder, or it was trained at
            another window or spacing.
    """
    apply, trained = checkpoints.load_model(folder)
    _check_grid(folder, trained, source)
    model = nnx.eval_shape(lambda: checkpoints.build_model(trained, deep_supervision=False))
    if not hasattr(model, "encoder"):
        raise UserError(
            f"{folder}: {trained.model.name} has no encoder of stages to take features from."
            " Give a checkpoint of resenc_unet, plain_unet or stu_net, or none"
        )
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    # A checkpoint of deep supervision may have more heads than the network has here.
    values = apply.args[0]
    weights = {path: values[".".join(map(str, path))] for path, _ in flat}
    kinds = {path: type(variable) for path, variable in flat}

    def deepest(weights: dict[Any, Array], x: Float[Array, "1 x y z 1"]):
        network = nnx.merge(
            graph, nnx.from_flat_state([(path, kinds[path](w)) for path, w in weights.items()])
        )
        if hasattr(network, "stem"):
            x = network.stem(x)
        for stage in network.encoder:
            x = stage(x)
        return jnp.mean(x.astype(jnp.float32), axis=(0, 1, 2, 3))

    compiled = jax.jit(deepest, compiler_options=compiler_options())
    size = np.asarray(trained.training.patch_size)
    low, high = source.settings["window"]

    def encode(case: Case, centre: Float[np.ndarray, "3"]) -> Float[np.ndarray, " channels"]:
        crop = _crop(case.image, np.round(centre).astype(int) - size // 2, size)
        scaled = np.clip((crop - low) / (high - low), 0, 1).astype(np.float32)
        features = np.asarray(compiled(weights, scaled[None, ..., None]))
        if not np.isfinite(features).all():
            raise CaseError(case.name, "the encoder's features are not finite", "Check the scan")
        return features

    return encode, f"deepest encoder features of {trained.model.name} ({folder})"


def _check_grid(folder: str, trained: Any, source: Source) -> None:
    for name in ("window", "spacing"):
        wanted, found = source.settings[name], trained.preparation.get(name)
        if wanted is not None and found is not None and not np.allclose(wanted, found):
            raise UserError(
                f"{folder}: trained at {name} {tuple(found)}, the scans have {tuple(wanted)}."
                " Give a checkpoint of the scans' own preparation, or none"
            )


def _crop(image: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Cuts a box out of a volume; beyond its end is air."""
    before = np.maximum(0, -start)
    after = np.maximum(0, start + size - image.shape)
    padded = np.pad(
        image, list(zip(before, after, strict=True)), constant_values=float(image.min())
    )
    return padded[
        tuple(slice(s + b, s + b + n) for s, b, n in zip(start, before, size, strict=True))
    ]
