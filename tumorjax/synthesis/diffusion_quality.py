"""How like real tumours generated ones are, on held-out patients: figures in HU, and a picture.

A real tumour of a held-out patient is taken out of its scan and made anew from its mask, organ and
radius. So real and generated tumours have the same shapes and surroundings, and differ in what the
synthesizer decides: attenuation, texture and rim. The same tumour as the autoencoder gives it back
stands between them, and shows what no diffusion model in its latents can do better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import ndimage

from tumorjax import anatomy
from tumorjax.files import write_bytes_atomic, write_json_atomic
from tumorjax.models import convolution
from tumorjax.synthesis import lesion_crops
from tumorjax.synthesis.lesion_crops import Lesion

MEASURES = ("contrast", "texture", "rim")
_KINDS = ("real", "reconstructed", "generated")
# Voxels about a tumour whose organ is what it contrasts with.
_REACH = 3
# Tumours of more voxels are measured without their outermost layer, which they share with others.
_CORE_VOXELS = 60


class Case(NamedTuple):
    """A held-out tumour: its image in [-1, 1], its mask, what is left of its organ, and itself."""

    lesion: Lesion
    image: Float[np.ndarray, "x y z"]
    mask: Bool[np.ndarray, "x y z"]
    organ: Bool[np.ndarray, "x y z"]


def read_cases(
    lesions: Sequence[Lesion], organs: Sequence[str], crop: Sequence[int], count: int
) -> list[Case]:
    """Reads up to `count` tumours of each organ, in the order of the list, in their crop's middle.

    Tumours with hardly any of their organ about them are left out.
    """
    cases = []
    for organ in organs:
        found = 0
        for lesion in (one for one in lesions if one.organ == organ):
            corner = lesion_crops.corner_about(lesion, crop, np.zeros(3, int))
            image, mask, label = lesion_crops.read_lesion(lesion, corner, crop)
            host = np.isin(label, [anatomy.LABELS[n] for n in anatomy.organ_labels(organ)])
            near = ndimage.binary_dilation(mask, iterations=_REACH) & host
            if mask.any() and near.sum() >= 8 and found < count:
                cases.append(Case(lesion, 2 * image - 1, mask, near))
                found += 1
    return cases


def measure(
    hu: Float[np.ndarray, "x y z"],
    mask: Bool[np.ndarray, "x y z"],
    organ: Bool[np.ndarray, "x y z"],
) -> dict[str, float]:
    """Measures a tumour.

    Args:
        hu: the scan.
        mask: the tumour.
        organ: its organ about it.

    Returns:
        contrast: its mean less the organ's; texture: its standard deviation; rim: mean of its
        outermost layer less that of its core (0 where it has none). All in HU.
    """
    core = ndimage.binary_erosion(mask) if mask.sum() > _CORE_VOXELS else mask
    if not core.any():
        core = mask
    rim = mask & ~core
    inside = float(hu[core].mean())
    return {
        "contrast": inside - float(hu[organ].mean()),
        "texture": float(hu[core].std()),
        "rim": float(hu[rim].mean()) - inside if rim.any() else 0.0,
    }


def generate_all(
    generate: Any, cases: Sequence[Case], organs: Sequence[str], batch_size: int, seed: int
) -> tuple[Float[np.ndarray, "n x y z"], Float[np.ndarray, "n x y z"]]:
    """Returns the generated tumours and the reconstructed scans, in [-1, 1]."""
    run = jax.jit(
        lambda generate, *arguments: generate(*arguments),
        compiler_options=convolution.compiler_options(),
    )
    generated, reconstructed = [], []
    for start in range(0, len(cases), batch_size):
        # The last batch is filled up with its own cases: one shape, one compilation.
        chosen = [cases[i % len(cases)] for i in range(start, start + batch_size)]
        result = run(
            generate,
            jax.random.fold_in(jax.random.key(seed), start),
            np.stack([case.image for case in chosen])[..., None],
            np.stack([case.mask for case in chosen]),
            np.asarray([organs.index(case.lesion.organ) for case in chosen], np.int32),
            np.asarray([case.lesion.radius_mm for case in chosen], np.float32),
        )
        for part, values in zip((generated, reconstructed), result, strict=True):
            part.append(np.asarray(values)[: len(cases) - start, ..., 0])
    return np.concatenate(generated), np.concatenate(reconstructed)


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns mean and standard deviation of each measure over tumours, in HU."""
    return {
        name: [round(float(f([row[name] for row in rows])), 1) for f in (np.mean, np.std)]
        for name in MEASURES
    }


def write(
    workdir: Path,
    generate: Any,
    lesions: Sequence[Lesion],
    organs: Sequence[str],
    config: ConfigDict,
    window: Sequence[float],
) -> None:
    """Writes quality.json and quality.png.

    Args:
        workdir: of the job.
        generate: as `trained_diffusion.TrainedDiffusion.generate`.
        lesions: of held-out patients.
        organs: that the synthesizer knows.
        config: of the job.
        window: HU of -1 and 1.
    """
    cases = read_cases(lesions, organs, config.training.crop, config.quality.tumors)
    if not cases:
        write_json_atomic(workdir / "quality.json", {"tumors": 0})
        return
    generated, reconstructed = generate_all(
        generate, cases, organs, min(config.training.batch_size, len(cases)), config.seed
    )
    scale = (window[1] - window[0]) / 2
    images = {
        "real": [case.image for case in cases],
        "reconstructed": reconstructed,
        "generated": generated,
    }
    result: dict[str, Any] = {"tumors": len(cases), "unit": "HU: mean, standard deviation"}
    for organ in organs:
        indices = [i for i, case in enumerate(cases) if case.lesion.organ == organ]
        if not indices:
            continue
        result[organ] = {"tumors": len(indices)}
        for kind in _KINDS:
            result[organ][kind] = summary(
                [
                    measure(
                        window[0] + scale * (images[kind][i] + 1), cases[i].mask, cases[i].organ
                    )
                    for i in indices
                ]
            )
    write_json_atomic(workdir / "quality.json", result)
    write_bytes_atomic(workdir / "quality.png", picture(cases, images, organs))


def picture(
    cases: Sequence[Case],
    images: Mapping[str, Sequence[Float[np.ndarray, "x y z"]]],
    organs: Sequence[str],
    columns: int = 4,
) -> bytes:
    """Draws tumours of each organ, real, reconstructed and generated below each other, as PNG."""
    chosen: list[Int[np.ndarray, "..."]] = []
    for organ in organs:
        of_organ = [i for i, case in enumerate(cases) if case.lesion.organ == organ]
        # Large ones show most.
        of_organ.sort(key=lambda i: -int(cases[i].mask.sum()))
        step = max(1, len(of_organ) // columns)
        chosen += [of_organ[::step][:columns]]
    figure = Figure(figsize=(2 * columns * len(chosen), 2 * len(_KINDS)), layout="constrained")
    axes = figure.subplots(len(_KINDS), columns * len(chosen), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for group, indices in enumerate(chosen):
        for column, index in enumerate(indices):
            case = cases[index]
            level = int(np.argmax(case.mask.sum(axis=(0, 1))))
            for row, kind in enumerate(_KINDS):
                axis = axes[row, group * columns + column]
                axis.imshow(images[kind][index][:, :, level].T, cmap="gray", vmin=-0.6, vmax=0.9)
                axis.invert_yaxis()
                if row == 0:
                    axis.contour(case.mask[:, :, level].T, [0.5], colors="r", linewidths=0.5)
                if column == 0:
                    axis.set_title(f"{organs[group]}, {kind}", fontsize=8, loc="left")
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()
