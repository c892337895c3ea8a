"""Synthetic tumours in healthy scans.

`implant` puts tumours into one scan, `make_store` makes the synthetic half of a study's training
scans. How a tumour looks is a synthesizer's matter: a name, the priors of its shapes, and one
function from a crop with a mask to a crop with a tumour. "rules" is the hand-written one; another
enters by its line in `SYNTHESIZERS`.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from tumorjax import anatomy, volumes
from tumorjax.data.cohort import Implant
from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import shapes, texture
from tumorjax.synthesis.placement import OrganTooSmall, organ_box, place
from tumorjax.synthesis.texture import generator

# Labels that lie inside an organ and hide it in a label map: to tumours they are the organ.
_INSIDE = {"liver": ("hepatic_vessel",)}


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
                case=case,
            )
        except CaseError as error:
            # Of an absent kidney and one that is too small the latter says more.
            if failure is None or isinstance(error, OrganTooSmall):
                failure = error
    raise failure or CaseError(
        case, f"there is no mask of the {synthesizer.organ}", "Give a scan with one"
    )


def make_store(
    real: volumes.Store,
    out_url: str,
    implants: Sequence[Implant],
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, str]]:
    """Makes the synthetic scans of a plan and keeps them in a store of their own.

    Each implant reads a healthy case, puts a tumour of the size into its host organ (of two
    kidneys into one) and writes a case under the implant's name. A case that is already there and
    was made for the same request from the same scan is left alone. Where the organ is too small
    for the size, the next smaller one is taken, and "size" in the case's record says so beside
    "requested_size".

    Args:
        real: the store with the healthy cases.
        out_url: the store to write; it gets the settings of `real`.
        implants: the plan.
        settings: `synthesizer` (a name in `SYNTHESIZERS`, default "rules"), `prior` (default
            "difftumor"), `texture` (organ -> changes of its texture, optional) and `workers`
            (threads, default one a core, at most 8; each holds a few copies of a scan).
        progress: called with (implants done, implants in all) after each.

    Returns:
        Implants that were set aside, as rows of rejected.csv: case, stage, reason. One failed
        scan does not stop the others.

    Raises:
        UserError: settings, tumours or sizes of the plan are unknown; two implants have one name;
            the store there has other settings.
        CaseError: a case of the plan is not in `real`.
    """
    requests = [_request(real, implant, settings) for implant in implants]
    names = [implant.name for implant in implants]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"the plan has several implants of the name {twice[0]}. Give each its own")
    store = volumes.create_store(out_url, real.settings)
    there = set(store.cases)
    rejected: list[dict[str, str]] = []
    done = 0
    todo = []
    for implant_, request in zip(implants, requests, strict=True):
        if implant_.name in there and _made_for(store.record(implant_.name), request):
            done += 1
        else:
            todo.append((implant_, request))
    if progress is not None:
        progress(done, len(implants))
    workers = int(settings.get("workers") or min(os.cpu_count() or 1, 8))
    # Threads: filters, distance transforms, compression and jitted shapes run outside the
    # interpreter's lock, and a process would import and compile for seconds first.
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(_make_case, real, out_url, implant_, request, settings): implant_
            for implant_, request in todo
        }
        try:
            for future in as_completed(futures):
                implant_ = futures[future]
                try:
                    future.result()
                except CaseError as error:
                    rejected.append(
                        {"case": implant_.name, "stage": "synthesis", "reason": str(error)}
                    )
                done += 1
                if progress is not None:
                    progress(done, len(implants))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(rejected, key=lambda row: row["case"])


def _request(real: volumes.Store, plan: Implant, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a synthetic case is made from, as its record keeps it; checks the plan."""
    if plan.tumor not in anatomy.HOST:
        raise UserError(
            f"implant {plan.name}: tumour {plan.tumor!r} is unknown. Expected one of"
            f" {', '.join(anatomy.HOST)}"
        )
    if plan.size not in shapes.SIZES:
        raise UserError(
            f"implant {plan.name}: size {plan.size!r} is unknown. Expected one of"
            f" {', '.join(shapes.SIZES)}"
        )
    checksum = real.record(plan.case)["checksum"]
    organ = anatomy.HOST[plan.tumor]
    made_by = _synthesizer(organ, settings)
    changes = dict((settings.get("texture") or {}).get(organ) or {})
    return {
        "from": plan.case,
        "tumor": plan.tumor,
        "requested_size": plan.size,
        "seed": int(plan.seed),
        "synthesizer": made_by.name,
        "prior": shapes.prior_used(organ, made_by.prior),
        "texture": {key: _plain(value) for key, value in sorted(changes.items())},
        "source_checksum": {kind: checksum[kind] for kind in ("image", "label")},
    }


def _synthesizer(organ: str, settings: Mapping[str, Any]) -> Synthesizer:
    changes = dict((settings.get("texture") or {}).get(organ) or {})
    name, prior = settings.get("synthesizer", "rules"), settings.get("prior", "difftumor")
    return create(name, organ, prior=prior, **changes)


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _made_for(record: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    made = record.get("synthetic") or {}
    return all(key in made and made[key] == value for key, value in request.items())


def _make_case(
    real: volumes.Store,
    out_url: str,
    plan: Implant,
    request: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Makes and writes one synthetic case."""
    record = real.record(plan.case)
    scaled, label = real.read(plan.case, "image"), real.read(plan.case, "label")
    low, high = real.settings.get("window", (-175.0, 250.0))
    image = scaled * np.float32(high - low) + np.float32(low)
    spacing = tuple(record["spacing"])
    is_tumor = label > max(anatomy.ORGANS.values())
    organ = anatomy.HOST[plan.tumor]
    within = [anatomy.LABELS[name] for name in _INSIDE.get(organ, ())]
    parts = [
        np.isin(label, [anatomy.LABELS[name], *within]) for name in anatomy.organ_labels(organ)
    ]
    synthesizer = _synthesizer(organ, settings)
    failure: CaseError | None = None
    for size in shapes.SIZES[shapes.SIZES.index(plan.size) :: -1]:
        try:
            made, tumor = implant_in_one(
                jax.random.key(plan.seed),
                image,
                parts,
                spacing,
                size,
                synthesizer,
                exclude=is_tumor,
                blocked=label > 0,
                case=plan.case,
            )
            break
        except CaseError as error:
            # The reason for the size that was asked for says most.
            failure = failure or error
    else:
        assert failure is not None
        raise failure
    if size != plan.size:
        logging.getLogger(__name__).info(
            "%s: %s has no place for a %s tumour, made a %s one",
            *(plan.name, plan.case, plan.size, size),
        )
    # Only what changed is scaled anew, so that all else stays as it was stored.
    changed = made != image
    scaled[changed] = np.clip((made[changed] - low) / (high - low), 0, 1)
    label[tumor] = anatomy.LABELS[plan.tumor]
    meta = {name: record.get(name) for name in ("patient", "site", "source", "original")}
    meta["synthetic"] = {**request, "size": size}
    volumes.write_case(out_url, plan.name, scaled, label, spacing, meta)
