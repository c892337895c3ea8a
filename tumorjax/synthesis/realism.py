"""The job "realism": how far synthetic tumours are from real ones.

Compared are sizes, shapes and numbers of tumours (KS distances), HU and texture at the lesion, its
rim and its surroundings, features of a fixed set or of a network's encoder (t-SNE), and whether a
classifier tells real from synthetic tumours of patients that it has not seen (AUC).
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from ml_collections import ConfigDict

from tumorjax import anatomy, files, volumes
from tumorjax.errors import CaseError, UserError
from tumorjax.key_values import is_bucket
from tumorjax.pages import template
from tumorjax.plot_style import STYLE
from tumorjax.settings import plain
from tumorjax.synthesis import realism_figures as figures
from tumorjax.synthesis import realism_tests as tests
from tumorjax.synthesis.realism_features import FEATURES, describe, encoder
from tumorjax.synthesis.realism_tumors import (
    REGIONS,
    Source,
    Tumor,
    open_folder,
    open_store,
    tumors_of,
)
from tumorjax.synthesis.shape_measures import Measures

DEFAULTS: dict[str, Any] = {
    "checkpoint": "",
    "seed": 0,
    "most_cases": 300,
    "minimum_voxels": 4,
    "folds": 5,
    "resamples": 1000,
    "confidence": 0.95,
    "pictures": 8,
}
_COLUMNS = ("case", "patient", "class", "number", "synthetic", *Measures._fields, *FEATURES)
_DISTANCES = (
    *("class", "quantity", "ks", "p", "n_real", "n_synthetic"),
    *("median_real", "median_synthetic"),
)


def run(config: ConfigDict, workdir: Path) -> int:
    """Compares real and synthetic tumours, see configs/realism.py.

    Returns:
        0, or 1 where cases were set aside: they are in workdir/rejected.csv.

    Raises:
        UserError: a store is missing, or they have no kind of tumour in common.
    """
    workdir = files.location(workdir)
    for key in ("store", "synthetic"):
        if not config.data[key]:
            raise UserError(f"config.data.{key} is empty. Set it with --config.data.{key}=...")
    data = config.data
    settings = {
        **plain(config.test),
        "checkpoint": config.checkpoint,
        "seed": config.seed,
        "most_cases": data.most_cases,
        "minimum_voxels": data.minimum_voxels,
        "pictures": config.pictures,
    }
    summary = write(
        *(data.store, data.cases or None, data.synthetic, data.synthetic_cases or None),
        workdir,
        settings,
    )
    rejected = summary["rejected"]
    if rejected:
        print(f"{workdir}: {len(rejected)} cases set aside, see {workdir / 'rejected.csv'}")
    print(f"{workdir / 'index.html'}: {summary['headline']}")
    return 1 if rejected else 0


def write(
    real_store: str | Path | volumes.Store,
    real_cases: Sequence[str] | None,
    synthetic_store: str | Path | volumes.Store,
    synthetic_cases: Sequence[str] | None,
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares the tumours of real and synthetic cases and writes all of it to a folder.

    A folder that was made of the same cases with the same settings is left as it is.

    Args:
        real_store: open, or where it lies.
        real_cases: of it; None for all that have tumours.
        synthetic_store: a store, or a folder of scans that the synthesis job wrote.
        synthetic_cases: of it; None for all.
        folder: gets index.html, figures/, realism.json, realism.csv, distances.csv and
            rejected.csv.
        settings: to differ from `DEFAULTS`.

    Returns:
        What realism.json holds: "headline" (a sentence), "features" (what the look was described
        by), "classes": kind of tumour, or "tumor" for several together -> n_real, n_synthetic,
        "distances" (quantity -> ks, p, medians), "histograms" (hu and texture -> region -> largest
        difference of the distributions), "auc" (classifier -> auc, low, high) and
        "auc_of_one_size" (the same of pairs of equal radius); and "rejected", rows of
        rejected.csv.

    Raises:
        UserError: there is no store, a setting is unknown or out of range, the stores differ in
            window or spacing, or no kind of tumour is in both.
    """
    folder = files.location(folder)
    options = _options(settings or {})
    real = open_store(real_store, real_cases)
    synthetic = _synthetic_source(synthetic_store, synthetic_cases, real)
    sources = {False: _limited(real, options), True: _limited(synthetic, options)}
    request = {
        "settings": options,
        "cases": _fingerprint(sources),
        "checkpoint": _steps(options["checkpoint"]),
    }
    done = _finished(folder, request)
    if done is not None:
        logging.info("%s: already finished", folder)
        return done

    encode, look = None, "intensity and texture: " + ", ".join(FEATURES)
    if options["checkpoint"]:
        encode, look = encoder(options["checkpoint"], real)
    tumors: list[Tumor] = []
    counts: dict[bool, list[dict[str, int]]] = {False: [], True: []}
    rejected = []
    for made, source in sources.items():
        for name in source.cases:
            try:
                found = list(
                    tumors_of(
                        source.read(name),
                        made,
                        source.settings["window"],
                        options["minimum_voxels"],
                        describe,
                        encode,
                    )
                )
            except CaseError as error:
                logging.warning("set aside: %s", error)
                rejected.append({"case": name, "stage": "realism", "reason": str(error)})
                continue
            tumors += found
            counts[made].append({k: sum(t.kind == k for t in found) for k in anatomy.TUMORS})
    kinds = _kinds(tumors)
    with matplotlib.rc_context(STYLE):
        summary = _compare(kinds, counts, options, look, real.settings["window"], folder)
    summary |= {"rejected": rejected, "request": request}
    _write_tables(folder, tumors, summary, rejected)
    page = template("tumorjax.synthesis", "realism.html").render(
        summary=summary, figures=summary.pop("figures"), name=figures.name_of, regions=REGIONS
    )
    files.write_text_atomic(folder / "index.html", page)
    files.write_json_atomic(folder / "realism.json", summary)  # last: it says that all is there
    return summary


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        raise UserError(
            f"realism settings {', '.join(unknown)} are unknown. Expected some of"
            f" {', '.join(DEFAULTS)}"
        )
    options = DEFAULTS | plain(settings)
    least = {"most_cases": 0, "minimum_voxels": 1, "folds": 2, "resamples": 1, "pictures": 1}
    for name, smallest in least.items():
        if options[name] < smallest:
            raise UserError(
                f"realism setting {name} is {options[name]}. Expected {smallest} or more"
            )
    if not 0 < options["confidence"] < 1:
        raise UserError(
            f"realism setting confidence is {options['confidence']}. Expected a share between 0"
            " and 1"
        )
    return options


def _synthetic_source(store: Any, cases: Sequence[str] | None, real: Source) -> Source:
    if not isinstance(store, volumes.Store):
        path = files.location(store)
        if path.is_dir() and not (path / "store.json").is_file():
            source = open_folder(path, real.settings)
            if cases is None:
                return source
            return source._replace(cases=[files.check_case_id(case) for case in cases])
    source = open_store(store, cases)
    for name in ("window", "spacing"):
        wanted, found = real.settings[name], source.settings[name]
        if wanted is not None and found is not None and not np.allclose(wanted, found):
            raise UserError(
                f"the synthetic store has {name} {tuple(found)}, the real one {tuple(wanted)}."
                " Give stores of one preparation"
            )
    return source


def _limited(source: Source, options: Mapping[str, Any]) -> Source:
    """At most so many cases, drawn by the seed."""
    cases = sorted(source.cases)
    if options["most_cases"] and len(cases) > options["most_cases"]:
        rng = np.random.default_rng(options["seed"])
        cases = sorted(rng.choice(cases, options["most_cases"], replace=False).tolist())
    return source._replace(cases=cases)


def _fingerprint(sources: Mapping[bool, Source]) -> str:
    """Of what is compared: cases and what says that they are still the same."""
    parts = [[made, name, source.version(name)] for made, source in sources.items()
             for name in source.cases]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _steps(checkpoint: str) -> list[list[Any]]:
    """What says that a training's folder holds the same weights."""
    if not checkpoint:
        return []
    folder = files.location(checkpoint) / "checkpoints"
    # In buckets a step is a folder with a record; see training/mirror.py.
    found = sorted(folder.glob("*/complete.json" if is_bucket(folder) else "*"))
    return [[str(path.relative_to(folder)), files.version(path)] for path in found]


def _finished(folder: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "realism.json").read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("request") == json.loads(json.dumps(request))
    return found if same else None


def _kinds(tumors: Sequence[Tumor]) -> dict[str, list[Tumor]]:
    """Returns kind -> its tumours, of the kinds that are both real and synthetic."""
    kinds = {}
    for kind in anatomy.TUMORS:
        chosen = [tumor for tumor in tumors if tumor.kind == kind]
        if len({tumor.synthetic for tumor in chosen}) == 2:
            kinds[kind] = chosen
    if not kinds:
        there = {
            made: sorted({t.kind for t in tumors if t.synthetic is made}) for made in (False, True)
        }
        raise UserError(
            f"no kind of tumour is both real ({', '.join(there[False]) or 'none'}) and synthetic"
            f" ({', '.join(there[True]) or 'none'}). Give cases with the same kinds"
        )
    return kinds


def _compare(kinds, counts, options, look, window, folder) -> dict[str, Any]:
    """Computes all numbers and draws all figures."""
    numbers = {
        kind: {made: [c[kind] for c in of if c[kind]] for made, of in counts.items()}
        for kind in kinds
    }
    classes = {
        kind: _class(tumors, options, numbers.get(kind))
        for kind, tumors in (kinds | (_union(kinds) if len(kinds) > 1 else {})).items()
    }
    features = {kind: _features(tumors) for kind, tumors in kinds.items()}
    places = {kind: tests.embed(rows, options["seed"]) for kind, rows in features.items()}
    auc = [
        (kind, f"{name}{of}", result)
        for kind, found in classes.items()
        for key, of in (("auc", ""), ("auc_of_one_size", ", one size"))
        for name, result in found[key].items()
    ]
    drawn = {
        "sizes": figures.distributions(kinds, figures.SIZES, {}),
        "shapes": figures.distributions(kinds, figures.SHAPES, numbers),
        "hu": figures.histograms(kinds, "hu", window),
        "texture": figures.histograms(kinds, "texture", window),
        "contact_sheet": figures.contact_sheet(kinds, window, options["pictures"]),
    }
    if any(place is not None for place in places.values()):
        drawn["tsne"] = figures.embedding(kinds, places)
    if any(result["auc"] is not None for _, _, result in auc):
        drawn["auc"] = figures.separability(auc, options["confidence"])
    return {
        "headline": _headline(classes),
        "features": look,
        "classes": classes,
        "figures": figures.save(drawn, folder / "figures"),
    }


def _union(kinds: Mapping[str, list[Tumor]]) -> dict[str, list[Tumor]]:
    return {figures.ALL: [tumor for tumors in kinds.values() for tumor in tumors]}


def _features(tumors: Sequence[Tumor]):
    if tumors[0].encoded.size:
        return np.stack([tumor.encoded for tumor in tumors]).astype(np.float64)
    return np.asarray([[tumor.intensities[name] for name in FEATURES] for tumor in tumors])


def _class(tumors: Sequence[Tumor], options, numbers) -> dict[str, Any]:
    """Returns all that is said of one kind of tumour."""
    sides = {made: [t for t in tumors if t.synthetic is made] for made in (False, True)}
    distances = {
        name: tests.ks(*([getattr(t.measures, name) for t in side] for side in sides.values()))
        for name in (*figures.SIZES, *figures.SHAPES)
    }
    if numbers is not None:
        distances["number"] = tests.ks(numbers[False], numbers[True])
    for name in FEATURES:
        distances[name] = tests.ks(*([t.intensities[name] for t in s] for s in sides.values()))
    made = np.asarray([tumor.synthetic for tumor in tumors])
    patients = [tumor.patient for tumor in tumors]
    test = {key: options[key] for key in ("folds", "resamples", "confidence", "seed")}
    features = _features(tumors)
    equal = tests.match_sizes(np.asarray([t.measures.radius_mm for t in tumors]), made)
    return {
        "n_real": len(sides[False]),
        "n_synthetic": len(sides[True]),
        "patients_real": len({t.patient for t in sides[False]}),
        "patients_synthetic": len({t.patient for t in sides[True]}),
        "distances": distances,
        "histograms": {
            quantity: {
                region: tests.histogram_distance(
                    *(figures.mean_histogram(tumors, m, quantity, i) for m in (False, True))
                )
                for i, region in enumerate(REGIONS)
            }
            for quantity in ("hu", "texture")
        },
        "auc": {
            name: tests.two_sample(features, made, patients, classifier=name, **test)
            for name in tests.CLASSIFIERS
        },
        "auc_of_one_size": {
            name: tests.two_sample(
                *(features[equal], made[equal], [patients[i] for i in equal]),
                classifier=name,
                **test,
            )
            for name in tests.CLASSIFIERS
        },
    }


def _headline(classes: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for kind, found in classes.items():
        auc = found["auc"]["forest"]
        size = found["distances"]["radius_mm"]["ks"]
        told = (
            "too few patients to test"
            if auc["auc"] is None
            else f"AUC {auc['auc']:.2f}"
            + (f" ({auc['low']:.2f} to {auc['high']:.2f})" if auc["low"] is not None else "")
        )
        parts.append(f"{figures.name_of(kind)}: {told}, sizes KS {size:.2f}")
    return "; ".join(parts)


def _write_tables(folder, tumors, summary, rejected) -> None:
    rows = [
        {
            "case": t.case,
            "patient": t.patient,
            "class": t.kind,
            "number": t.number,
            "synthetic": t.synthetic,
            **t.measures._asdict(),
            **t.intensities,
        }
        for t in tumors
    ]
    files.write_csv_atomic(folder / "realism.csv", rows, _COLUMNS)
    distances = [
        {"class": kind, "quantity": name, **found}
        for kind, of in summary["classes"].items()
        for name, found in of["distances"].items()
    ]
    files.write_csv_atomic(folder / "distances.csv", distances, _DISTANCES)
    if rejected:
        files.write_csv_atomic(folder / "rejected.csv", rejected, ("case", "stage", "reason"))
    else:
        (folder / "rejected.csv").unlink(missing_ok=True)
