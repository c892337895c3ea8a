"""Synthetic tumours in one healthy scan.

Where tumours go is `placement`'s matter, how they look a synthesizer's; see `synthesizers`.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import shapes
from tumorjax.synthesis.placement import Lesion, OrganTooSmall, organ_box, place
from tumorjax.synthesis.synthesizers import Synthesizer, create, rule_based
from tumorjax.synthesis.texture import generator

__all__ = ["TumorTooLarge", "create", "implant", "implant_in_one", "rule_based"]

# How many shapes are drawn where a synthesizer's crop does not hold the first.
_REDRAWN = 4


class TumorTooLarge(CaseError):
    """The synthesizer knows no tumours of this extent; a smaller one may do."""


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
    position: str = "anywhere",
    margin_mm: float = 3.0,
    case: str = "scan",
) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]]:
    """Puts tumours into a scan.

    Args:
        key: jax.random key; the result is a function of it and of the other arguments.
        image: the scan, HU.
        organ_mask: the host organ.
        spacing: (x, y, z) in mm.
        size: "tiny", "small", "medium" or "large", or a radius in mm.
        synthesizer: from `synthesizers.create`, or a name together with `organ`.
        organ: organ group; needed only where the synthesizer is given by its name.
        exclude: existing tumours, which new ones keep a gap from.
        blocked: where tumours that stick out of the organ must not go, such as other organs.
        count: how many tumours. Without it drawn from the prior ("difftumor": 1 to 3 if tiny or
            small, else 1), and 1 where a radius is given. Those of several for which there is no
            place are left out.
        position: "anywhere", "inside" or "border" of the organ, see `placement.place`.
        margin_mm: of organ around tumours that lie "inside".
        case: named in errors.

    Returns:
        The scan with tumours (HU, float32; voxels outside the tumours and their blended rim are
        the input's bit for bit) and the mask of the new tumours.

    Raises:
        CaseError: the organ is absent, (OrganTooSmall) too small for the size, or (TumorTooLarge)
            the tumour is larger than the synthesizer can draw.
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
        count = _draw_count(jax.random.fold_in(key, 0), size, synthesizer)

    result = image.copy()
    tumor = np.zeros(image.shape, bool)
    for number in range(count):
        lesion_key = jax.random.fold_in(key, 1 + number)
        try:
            lesion = _place(
                lesion_key,
                *(image, organ_mask, taken, blocked, spacing, size, synthesizer, case),
                *(position, margin_mm),
            )
        except (OrganTooSmall, TumorTooLarge):
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


def _draw_count(key, size, synthesizer) -> int:
    if not isinstance(size, str):
        return 1
    if synthesizer.prior == "difftumor":
        return int(generator(key).integers(1, 4)) if size in ("tiny", "small") else 1
    return int(shapes.sample_number(key, synthesizer.organ, synthesizer.prior, size)[0])


def _place(
    lesion_key,
    image,
    organ_mask,
    taken,
    blocked,
    spacing,
    size,
    synthesizer,
    case,
    position,
    margin_mm,
) -> Lesion:
    """Places a tumour that the synthesizer can draw; shapes that it cannot are drawn anew."""
    for attempt in range(_REDRAWN):
        # The first is the one that every other synthesizer is given.
        key = jax.random.fold_in(lesion_key, 0 if attempt == 0 else 1 + attempt)
        lesion = place(
            key,
            image,
            organ_mask,
            taken,
            blocked,
            spacing,
            size,
            synthesizer.organ,
            synthesizer.prior,
            case,
            position,
            margin_mm,
        )
        extent = [(b.stop - b.start) * step for b, step in zip(lesion.box, spacing, strict=True)]
        largest = synthesizer.largest_mm
        if largest is None or all(e <= most for e, most in zip(extent, largest, strict=True)):
            return lesion
    raise TumorTooLarge(
        case,
        f"the tumour extends {' x '.join(f'{e:.0f}' for e in extent)} mm, and synthesizer"
        f" {synthesizer.name!r} draws up to {' x '.join(f'{e:.0f}' for e in largest)} mm",
        "Ask for a smaller size, or take a model that was trained on larger crops",
    )


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


def implant_in_one(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "x y z"],
    organ_masks: Sequence[Bool[np.ndarray, "x y z"]],
    spacing: tuple[float, float, float],
    size: str | float,
    synthesizer: Synthesizer,
    *,
    exclude: Bool[np.ndarray, "x y z"] | None = None,
    blocked: Bool[np.ndarray, "x y z"] | None = None,
    count: int | None = None,
    position: str = "anywhere",
    margin_mm: float = 3.0,
    case: str = "scan",
) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]]:
    """Puts tumours into one of an organ's parts, such as one of two kidneys; see `implant`.

    The key says which part is tried first; another is taken only where that has no place.

    Raises:
        CaseError: the organ is absent or has no place for the size.
        UserError: see `implant`.
    """
    order = list(range(len(organ_masks)))
    generator(jax.random.fold_in(key, 0)).shuffle(order)
    failure: CaseError | None = None
    for index in order:
        mask = organ_masks[index]
        try:
            return implant(
                jax.random.fold_in(key, 1),
                image,
                mask,
                spacing,
                size,
                synthesizer,
                exclude=exclude,
                blocked=None if blocked is None else blocked & ~mask,
                count=count,
                position=position,
                margin_mm=margin_mm,
                case=case,
            )
        except CaseError as error:
            # Of an absent kidney and one that is too small the latter says more.
            if failure is None or isinstance(error, OrganTooSmall):
                failure = error
    raise failure or CaseError(
        case, f"there is no mask of the {synthesizer.organ}", "Give a scan with one"
    )
