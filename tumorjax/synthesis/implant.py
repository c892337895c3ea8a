"""Synthetic tumours in healthy scans.

`implant` puts tumours into one scan, `make_store` makes the synthetic half of a study's training
scans. How a tumour looks is a synthesizer's matter: a name, the priors of its shapes, and one
function from a crop with a mask to a crop with a tumour. "rules" is the hand-written one; another
enters by its line in `SYNTHESIZERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import shapes, texture
from tumorjax.synthesis.placement import OrganTooSmall, organ_box, place
from tumorjax.synthesis.texture import generator


class Render(Protocol):
    """Draws one tumour into a crop: what a synthesizer is about."""

    def __call__(
        self,
        key: PRNGKeyArray,
        image: Float[np.ndarray, "x y z"],
        organ: Bool[np.ndarray, "x y z"],
        tumor: Bool[np.ndarray, "x y z"],
        spacing: tuple[float, float, float],
    ) -> Float[np.ndarray, "x y z"]:
        """Returns the crop in HU with a tumour at `tumor`, untouched where it does not change.

        Args:
            key: jax.random key.
            image: crop, HU.
            organ: host organ without other tumours.
            tumor: the tumour's mask.
            spacing: (x, y, z) in mm.
        """
        ...


@dataclass(frozen=True)
class Synthesizer:
    """Makes tumours of one organ.

    Attributes:
        name: as in `SYNTHESIZERS`, for records.
        organ: organ group, such as "liver" or "kidney".
        prior: where sizes and shapes come from, see `shapes`.
        context_mm: how much of the scan around a tumour `render` is given.
        render: draws one tumour.
    """

    name: str
    organ: str
    prior: str
    context_mm: float
    render: Render


def rule_based(organ: str, prior: str = "difftumor", **changes: Any) -> Synthesizer:
    """Returns the synthesizer of hand-written tumours.

    Args:
        organ: organ group: liver, pancreas, kidney, colon, esophagus or uterus.
        prior: "difftumor" or "measured", see `shapes`.
        **changes: fields of `texture.Texture` that are to differ from the organ's own.

    Raises:
        UserError: organ, prior or a field is unknown.
    """
    if organ not in texture.TEXTURES:
        raise UserError(
            f"there are no tumours of {organ!r}. Expected one of {', '.join(texture.TEXTURES)}"
        )
    shapes.prior_used(organ, prior)
    unknown = sorted(set(changes) - set(texture.Texture._fields))
    if unknown:
        raise UserError(
            f"texture settings {', '.join(unknown)} are unknown. Expected some of"
            f" {', '.join(texture.Texture._fields)}"
        )
    look = texture.TEXTURES[organ]._replace(**changes)

    def render(key, image, organ, tumor, spacing):
        return texture.render(key, image, organ, tumor, spacing, look)

    return Synthesizer("rules", organ, prior, texture.CONTEXT_MM, render)


SYNTHESIZERS: dict[str, Callable[..., Synthesizer]] = {"rules": rule_based}


def create(name: str, organ: str, **settings: Any) -> Synthesizer:
    """Returns the synthesizer of a name for an organ.

    Raises:
        UserError: the name is unknown, or the settings are not this synthesizer's.
    """
    if name not in SYNTHESIZERS:
        raise UserError(f"synthesizer {name!r} is unknown. Expected {', '.join(SYNTHESIZERS)}")
    return SYNTHESIZERS[name](organ, **settings)


def implant(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "x y z"],
    organ_mask: Bool[np.ndarray, "x y z"],
    spacing: tuple[float, float, float],
    size: str | float,
    synthesizer: Synthesizer | str,
    *,
    organ: str | None = None,
    exclude: Bool[np.ndarray, "x y z"] | None = None,
    blocked: Bool[np.ndarray, "x y z"] | None = None,
    count: int | None = None,
    case: str = "scan",
) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]]:
    """Puts tumours into a scan.

    Args:
        key: jax.random key; the result is a function of it and of the other arguments.
        image: the scan, HU.
        organ_mask: the host organ.
        spacing: (x, y, z) in mm.
        size: "tiny", "small", "medium" or "large", or a radius in mm.
        synthesizer: from `rule_based` or `create`, or a name together with `organ`.
        organ: organ group; needed only where the synthesizer is given by its name.
        exclude: existing tumours, which new ones keep a gap from.
        blocked: where tumours that stick out of the organ must not go, such as other organs.
        count: how many tumours. Without it as in DiffTumor: 1 to 3 if tiny or small, else 1; and
            1 where a radius is given. Those of several for which there is no place are left out.
        case: named in errors.

    Returns:
        The scan with tumours (HU, float32; voxels outside the tumours and their blended rim are
        the input's bit for bit) and the mask of the new tumours.

    Raises:
        CaseError: the organ is absent, or (OrganTooSmall) too small for the size.
        UserError: a size, a name or a shape is wrong, or the image is not in HU.
    """
    if isinstance(synthesizer, str):
        if organ is None:
            raise UserError(f"synthesizer {synthesizer!r} was given by its name: give organ too")
        synthesizer = create(synthesizer, organ)
    image = np.asarray(image, np.float32)
    organ_mask = np.asarray(organ_mask, bool)
    _check(image, organ_mask, exclude, blocked, size, count, case)
    taken = np.zeros(image.shape, bool) if exclude is None else np.array(exclude, bool)
    spacing = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    if count is None:
        several = isinstance(size, str) and size in ("tiny", "small")
        count = int(generator(jax.random.fold_in(key, 0)).integers(1, 4)) if several else 1

    result = image.copy()
    tumor = np.zeros(image.shape, bool)
    for number in range(count):
        lesion_key = jax.random.fold_in(key, 1 + number)
        try:
            lesion = place(
                jax.random.fold_in(lesion_key, 0),
                image,
                organ_mask,
                taken,
                blocked,
                spacing,
                size,
                synthesizer.organ,
                synthesizer.prior,
                case,
            )
        except OrganTooSmall:
            if number == 0:
                raise
            break
        tumor[lesion.box] |= lesion.mask
        crop = tuple(
            slice(max(b.start - margin, 0), min(b.stop + margin, length))
            for b, margin, length in zip(
                lesion.box,
                (int(np.ceil(synthesizer.context_mm / step)) for step in spacing),
                image.shape,
                strict=True,
            )
        )
        inner = tuple(
            slice(b.start - c.start, b.stop - c.start)
            for b, c in zip(lesion.box, crop, strict=True)
        )
        here = np.zeros([c.stop - c.start for c in crop], bool)
        here[inner] = lesion.mask
        others = taken[crop]
        before = result[crop]
        after = synthesizer.render(
            jax.random.fold_in(lesion_key, 1), before, organ_mask[crop] & ~others, here, spacing
        )
        # Whatever a synthesizer does, tumours that are there stay as they are.
        result[crop] = np.where(others, before, after)
        taken[lesion.box] |= lesion.mask
    return result, tumor


def _check(image, organ_mask, exclude, blocked, size, count, case) -> None:
    for name, mask in (("organ_mask", organ_mask), ("exclude", exclude), ("blocked", blocked)):
        if mask is not None and np.shape(mask) != image.shape:
            raise UserError(
                f"{case}: {name} has shape {np.shape(mask)}, the image {image.shape}."
                " Give them on one grid"
            )
    if image.ndim != 3:
        raise UserError(f"{case}: the image has shape {image.shape}. Expected three axes")
    if isinstance(size, str):
        if size not in shapes.SIZES:
            raise UserError(
                f"tumour size {size!r} is unknown. Expected one of {', '.join(shapes.SIZES)}"
                " or a radius in mm"
            )
    elif not (np.isfinite(size) and size > 0):
        raise UserError(f"tumour radius is {size} mm. Expected a positive number")
    if count is not None and count < 1:
        raise UserError(f"{count} tumours were asked for. Expected at least 1")
    box = organ_box(organ_mask)
    if box is not None:
        values = image[box]
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CaseError(case, "the image has NaN or infinite voxels", "Repair the scan")
        if low >= 0 and high <= 1:
            raise UserError(
                f"{case}: the image's values around the organ lie in {low:.2f}..{high:.2f}."
                " Expected HU; turn a scaled image back first"
            )
