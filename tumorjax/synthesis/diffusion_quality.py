"""How like real tumours generated ones are, on held-out patients: figures in HU, and a picture.

A real tumour of a held-out patient is taken out of its scan and made anew from its mask, organ and
radius. So real and generated tumours have the same shapes and surroundings, and differ in what the
synthesizer decides: attenuation, texture and rim. The same tumour as the autoencoder gives it back
stands between them, and shows what no diffusion model in its latents can do better.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import ndimage
from scipy.stats import wasserstein_distance

from tumorjax import anatomy
from tumorjax.files import write_bytes_atomic, write_json_atomic
from tumorjax.synthesis import lesion_crops
from tumorjax.synthesis.lesion_crops import Lesion

HU = Sequence[float]
# From a number of steps (None: the config's own) to `trained_diffusion.TrainedDiffusion.generate`.
Make = Callable[[int | None], Any]

MEASURES = ("contrast", "texture", "rim")
# Voxels about a tumour whose organ is what it contrasts with.
_REACH = 3
_LEAST_ORGAN = 6
# Tumours of more voxels are measured without their outermost layer, which they share with others.
_CORE_VOXELS = 60


class Case(NamedTuple):
    """A held-out tumour: itself, its scan in [-1, 1], its mask, and the organ about it.

    The organ is without the voxels next to the tumour: those share its attenuation in the scan, and
    a synthesizer makes them anew.
    """

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
            near = ndimage.binary_dilation(mask, iterations=_REACH)
            near &= host & ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
            if mask.any() and near.sum() >= _LEAST_ORGAN and found < count:
                cases.append(Case(lesion, 2 * image - 1, mask, near))
                found += 1
    return cases


def measure(image: Float[np.ndarray, "x y z"], case: Case, window: HU) -> dict[str, float]:
    """Measures a tumour in an image.

    Args:
        image: the scan, or what was made of it, in [-1, 1].
        case: whose tumour it is. What it contrasts with is taken from its scan, where a synthetic
            tumour is implanted.
        window: HU of -1 and 1.

    Returns:
        contrast: its mean less the organ's; texture: its standard deviation; rim: mean of its
        outermost layer less that of its core (0 where it has none). All in HU.
    """
    hu, mask = to_hu(image, window), case.mask
    core = ndimage.binary_erosion(mask) if mask.sum() > _CORE_VOXELS else mask
    if not core.any():
        core = mask
    rim = mask & ~core
    inside = float(hu[core].mean())
    return {
        "contrast": inside - float(to_hu(case.image[case.organ], window).mean()),
        "texture": float(hu[core].std()),
        "rim": float(hu[rim].mean()) - inside if rim.any() else 0.0,
    }


def to_hu(image: Float[np.ndarray, "..."], window: HU) -> Float[np.ndarray, "..."]:
    """Returns an image in [-1, 1] in HU."""
    return window[0] + (window[1] - window[0]) / 2 * (image + 1)


def generate_all(
    generate: Any, cases: Sequence[Case], organs: Sequence[str], batch_size: int, seed: int
) -> tuple[Float[np.ndarray, "n x y z"], Float[np.ndarray, "n x y z"]]:
    """Returns the generated tumours and the reconstructed scans, in [-1, 1].

    The seed decides the noise that each tumour begins with, whatever the sampler.
    """
    generated: list[np.ndarray] = []
    reconstructed: list[np.ndarray] = []
    for start in range(0, len(cases), batch_size):
        # The last batch is filled up with its own cases: one shape, one compilation.
        chosen = [cases[i % len(cases)] for i in range(start, start + batch_size)]
        result = generate(
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


def few_steps(
    make: Make, cases: Sequence[Case], organs: Sequence[str], config: ConfigDict, window: HU
) -> tuple[list[dict[str, Any]], dict[str, Float[np.ndarray, "n x y z"]]]:
    """Compares sampling in few steps with fine sampling and with real tumours.

    Args:
        make: number of steps -> generate.
        cases: held-out tumours.
        organs: that the synthesizer knows.
        config: of the job; its section quality has few_steps and fine_steps.
        window: HU of -1 and 1.

    Returns:
        A row for each number of steps: steps, from_fine (mean absolute difference in HU, within the
        tumour, from the same noise sampled finely), and for each measure the Wasserstein distance
        in HU between generated and real tumours, mean over organs. And the generated tumours by
        number of steps.
    """
    scale = (window[1] - window[0]) / 2
    batch_size = min(config.training.batch_size, len(cases))
    counts = [*config.quality.few_steps, config.quality.fine_steps]
    if config.diffusion.objective != "flow":
        counts = sorted({min(int(count), config.diffusion.timesteps) for count in counts})
    drawn = {
        int(count): generate_all(make(int(count)), cases, organs, batch_size, config.seed)[0]
        for count in counts
    }
    fine = drawn[max(drawn)]
    rows = []
    for count, images in drawn.items():
        apart = [
            float(np.abs(image - other)[case.mask].mean())
            for case, image, other in zip(cases, images, fine, strict=True)
        ]
        row: dict[str, Any] = {"steps": count, "from_fine": round(scale * float(np.mean(apart)), 2)}
        for name in MEASURES:
            distances = []
            for organ in organs:
                pairs = [
                    [measure(values, case, window)[name] for values in (image, case.image)]
                    for case, image in zip(cases, images, strict=True)
                    if case.lesion.organ == organ
                ]
                if pairs:
                    distances.append(wasserstein_distance(*zip(*pairs, strict=True)))
            row[name] = round(float(np.mean(distances)), 2)
        rows.append(row)
    return rows, {str(count): images for count, images in drawn.items()}


def write(
    workdir: Path,
    make: Make,
    lesions: Sequence[Lesion],
    organs: Sequence[str],
    config: ConfigDict,
    window: HU,
) -> None:
    """Writes quality.json, quality.png and few_steps.png.

    Args:
        workdir: of the job.
        make: number of steps, or None for the config's own -> generate, as in
            `trained_diffusion.TrainedDiffusion`.
        lesions: of held-out patients.
        organs: that the synthesizer knows.
        config: of the job.
        window: HU of -1 and 1.
    """
    settings, crop = config.quality, config.training.crop
    cases = read_cases(lesions, organs, crop, settings.tumors)
    if not cases:
        write_json_atomic(workdir / "quality.json", {"tumors": 0})
        return
    batch_size = min(config.training.batch_size, len(cases))
    generated, reconstructed = generate_all(make(None), cases, organs, batch_size, config.seed)
    images: dict[str, Any] = {
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
        for kind, values in images.items():
            measured = [measure(values[i], cases[i], window) for i in indices]
            result[organ][kind] = summary(measured)
    few = read_cases(lesions, organs, crop, settings.few_steps_tumors)
    result["few_steps"], drawn = few_steps(make, few, organs, config, window)
    write_json_atomic(workdir / "quality.json", result)
    write_bytes_atomic(workdir / "quality.png", picture(cases, images, organs))
    shown: dict[str, Any] = {"real": [case.image for case in few]}
    shown |= {f"{count} steps": values for count, values in drawn.items()}
    write_bytes_atomic(workdir / "few_steps.png", picture(few, shown, organs))


def picture(
    cases: Sequence[Case],
    images: Mapping[str, Sequence[Float[np.ndarray, "x y z"]]],
    organs: Sequence[str],
    columns: int = 4,
) -> bytes:
    """Draws up to `columns` tumours of each organ, from large to small, as PNG.

    Each kind of image has a row. Shown is the axial plane that has most of the tumour.
    """
    chosen: list[int] = []
    for organ in organs:
        of_organ = [i for i, case in enumerate(cases) if case.lesion.organ == organ]
        of_organ.sort(key=lambda i: -int(cases[i].mask.sum()))
        chosen += of_organ[:: max(1, len(of_organ) // columns)][:columns]
    figure = Figure(figsize=(1.6 * len(chosen), 1.7 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        case = cases[index]
        level = int(np.argmax(case.mask.sum(axis=(0, 1))))
        for row, (kind, values) in enumerate(images.items()):
            axis = axes[row, column]
            axis.set_xticks([])
            axis.set_yticks([])
            plane = values[index][:, :, level].T
            axis.imshow(plane, cmap="gray", vmin=-0.6, vmax=0.9, origin="lower")
            if row == 0:
                outline = case.mask[:, :, level].T.astype(float)
                axis.contour(outline, [0.5], colors="#d55e00", linewidths=0.7)
                axis.set_title(f"{case.lesion.organ}, {case.lesion.radius_mm:.0f} mm", fontsize=7)
            if column == 0:
                axis.set_ylabel(kind, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
