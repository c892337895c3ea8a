"""The synthetic half of a study's training scans: a store of healthy scans with tumours."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np

from tumorjax import anatomy, volumes
from tumorjax.data.cohort import Implant
from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import shapes
from tumorjax.synthesis.implant import implant_in_one
from tumorjax.synthesis.placement import check_position
from tumorjax.synthesis.synthesizers import Synthesizer, check_grid, from_settings
from tumorjax.training import preemption


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
        settings: see `synthesizers.from_settings`; `position` and `margin_mm` (see
            `placement.place`); and `workers` (threads, default one a core, at most 8; each holds a
            few copies of a scan).
        progress: called with (implants done, implants in all) after each.

    Returns:
        Implants that were set aside, as rows of rejected.csv: case, stage, reason. One failed
        scan does not stop the others.

    Raises:
        UserError: settings, tumours or sizes of the plan are unknown; two implants have one name;
            the store there has other settings; the synthesizer was trained at another spacing or
            window than the scans have.
        CaseError: a case of the plan is not in `real`.
    """
    made_by = _synthesizers(real, implants, settings)
    where = {name: settings[name] for name in ("position", "margin_mm") if settings.get(name)}
    check_position(where.get("position", "anywhere"), where.get("margin_mm", 3.0))
    requests = [_request(real, implant, made_by[implant.tumor], where) for implant in implants]
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
            pool.submit(
                _make_case, real, out_url, implant_, request, made_by[implant_.tumor], where
            ): implant_
            for implant_, request in todo
        }
        try:
            for future in as_completed(futures):
                preemption.stop_if_told("making scans with tumours")
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


def _synthesizers(
    real: volumes.Store, implants: Sequence[Implant], settings: Mapping[str, Any]
) -> dict[str, Synthesizer]:
    """Returns the synthesizer of each tumour of a plan."""
    made_by: dict[str, Synthesizer] = {}
    for plan in implants:
        if plan.tumor not in anatomy.HOST:
            raise UserError(
                f"implant {plan.name}: tumour {plan.tumor!r} is unknown. Expected one of"
                f" {', '.join(anatomy.HOST)}"
            )
        if plan.tumor not in made_by:
            made_by[plan.tumor] = from_settings(anatomy.HOST[plan.tumor], settings)
            check_grid(made_by[plan.tumor], str(real.url), real.settings)
    return made_by


def _request(
    real: volumes.Store, plan: Implant, made_by: Synthesizer, where: Mapping[str, Any]
) -> dict[str, Any]:
    """What a synthetic case is made from, as its record keeps it; checks the plan."""
    if plan.size not in shapes.SIZES:
        raise UserError(
            f"implant {plan.name}: size {plan.size!r} is unknown. Expected one of"
            f" {', '.join(shapes.SIZES)}"
        )
    checksum = real.record(plan.case)["checksum"]
    return {
        "from": plan.case,
        "tumor": plan.tumor,
        "requested_size": plan.size,
        "seed": int(plan.seed),
        "synthesizer": made_by.name,
        "prior": shapes.prior_used(made_by.organ, made_by.prior),
        **made_by.record,
        **where,
        "source_checksum": {kind: checksum[kind] for kind in ("image", "label")},
    }


def _made_for(record: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    made = record.get("synthetic") or {}
    return all(key in made and made[key] == value for key, value in request.items())


def _make_case(
    real: volumes.Store,
    out_url: str,
    plan: Implant,
    request: Mapping[str, Any],
    synthesizer: Synthesizer,
    where: Mapping[str, Any],
) -> None:
    """Makes and writes one synthetic case."""
    record = real.record(plan.case)
    scaled, label = real.read(plan.case, "image"), real.read(plan.case, "label")
    low, high = real.settings.get("window", (-175.0, 250.0))
    image = scaled * np.float32(high - low) + np.float32(low)
    spacing = tuple(record["spacing"])
    is_tumor = label > max(anatomy.ORGANS.values())
    organ = anatomy.HOST[plan.tumor]
    within = [anatomy.LABELS[name] for name in anatomy.INSIDE.get(organ, ())]
    parts = [
        np.isin(label, [anatomy.LABELS[name], *within]) for name in anatomy.organ_labels(organ)
    ]
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
                **where,
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
