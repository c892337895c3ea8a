"""What laws.json says, in sentences for readers who treat patients rather than fit curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from tumorjax.scaling.results import ALL_TUMORS, METRICS, REAL, WITH_SYNTHETIC

PLACES = {
    "id": "new patients of the hospitals that the network was trained on",
    "ood": "patients of hospitals that the network never saw",
}
_SCORES = {
    "dsc": "a Dice score (overlap with the expert's outline)",
    "nsd": "a surface Dice (agreement with the expert's outline)",
    "tumor_sensitivity": "a share of tumours found",
    "patient_sensitivity": "a share of patients with tumours found",
    "early_tumor_sensitivity": "a share of early tumours found",
    "patient_specificity": "a share of tumour-free patients without a false alarm",
}


def story(found: Mapping[str, Any], metric: str, split: str) -> list[str]:
    """Returns what one metric on one split says, one paragraph each on level, savings and law.

    Args:
        found: laws.json.
        metric: one in which more is better.
        split: id or ood.

    Returns:
        Paragraphs of plain text; empty where nothing was measured.
    """
    keys = {"split": split, "metric": metric, "class": ALL_TUMORS}
    arms = {c["arm"]: c for c in found["curves"] if keys.items() <= c.items()}
    if not arms:
        return []
    paragraphs = [_level(arms, metric, split)]
    saved = _one(found["savings"], keys)
    difference = _one(found["differences"], keys)
    if saved and difference:
        paragraphs.append(_benefit(difference) + " " + _savings(saved, arms))
    paragraphs.append(" ".join(_prospect(arm, curve) for arm, curve in arms.items()))
    return paragraphs


def headline(found: Mapping[str, Any], metric: str) -> str:
    """Returns the study's answer in one paragraph; it says so where there is none."""
    parts = []
    for split, place in (("id", "in-distribution"), ("ood", "out-of-distribution")):
        saved = _one(found["savings"], {"split": split, "metric": metric, "class": ALL_TUMORS})
        if saved:
            parts.append(f"{place.capitalize()}: {_verdict(saved)}")
    if not parts:
        return (
            "The table has one arm only, so nothing can be said about synthetic tumours; the"
            " curves below show what more annotated scans bring."
        )
    return " ".join(parts)


def grounds(found: Mapping[str, Any]) -> str:
    """Returns what the intervals rest on, and what they leave out."""
    curves = [c for c in found["curves"] if c["class"] == ALL_TUMORS] or found["curves"]
    seeds = sorted({count for curve in curves for count in curve["seeds"]})
    over = {curve["interval_over"] or "nothing" for curve in curves}
    trained = f"{seeds[0]} times" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} times"
    text = f"Each network was trained {'once' if seeds == [1] else trained}. "
    if any("patients" in name for name in over):
        text += (
            "Intervals (95 %) come from drawing the test patients anew, the same patients for all"
            " networks"
        )
    elif any("intervals" in name for name in over):
        text += "Intervals (95 %) start from those that the table gives for single networks"
    elif any(name == "seeds" for name in over):
        text += "Intervals (95 %) come from the spread between trainings"
    elif "residuals" in over:
        text += (
            "The table gives no intervals; those shown (95 %) come from the scatter of the points"
            " about the curves"
        )
    else:
        return text + "Nothing is known about chance, so there are no intervals."
    if any(name.endswith("and seeds") for name in over):
        text += ", and from the spread between trainings."
    elif any(name.endswith("and residuals") for name in over):
        text += (
            ". How much another training of the same network would differ was not measured; its"
            " part in plateaus, savings and forecasts is estimated from the scatter about the"
            " curves. More seeds would tell."
        )
    elif over & {"patients", "intervals"}:
        text += (
            ". How much another training of the same network would differ is not known, so they"
            " are too narrow by that, and nothing is said about how certain plateaus and savings"
            " are. More seeds would tell."
        )
    else:
        text += "."
    return text


def reason_in_words(law: Mapping[str, Any]) -> str:
    """Returns a law as a formula, or why there is none."""
    if law["identifiable"]:
        b = f"{law['b']:.0f}" if law["b"] >= 100 else f"{law['b']:.3g}"
        return f"{law['a']:.1f} − {b} · n^−{law['c']:.2f}"
    return law.get("reason") or "not identifiable"


def range_of(interval: Sequence[float | None] | None, digits: int = 1) -> str:
    """Returns "12.3 to 45.6"; open ends in words; empty where there is no interval."""
    if interval is None or all(end is None for end in interval):
        return ""
    low, high = ("" if end is None else number(end, digits) for end in interval)
    if not high:
        return f"{low} or more"
    return f"{low} to {high}" if low else f"{high} or less"


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """Returns a number with a true minus, and without a sign where it is rounded to zero."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _level(arms: Mapping[str, Any], metric: str, split: str) -> str:
    curve = arms.get(REAL) or arms[WITH_SYNTHETIC]
    name = "real scans alone" if REAL in arms else "real scans and synthetic tumours"
    first, last = curve["n"][0], curve["n"][-1]
    interval = _between(curve, -1)
    what = _SCORES.get(metric, METRICS[metric])
    text = f"On {PLACES[split]}, {name} reach {what} of {curve['mean'][-1]:.1f} %{interval}"
    text += f" with {last} annotated scan{'s' * (last != 1)}"
    text += f", and {curve['mean'][0]:.1f} % with {first}. " if first != last else ". "
    plateau, margin = curve["plateau"], _points(curve["plateau"]["margin"])
    if len(curve["n"]) == 1:
        return text + "One size says nothing about how the score grows."
    if plateau["n"] == last:
        text += (
            f"The score was still more than {margin} from its best at every smaller size: how many"
            " scans would be enough lies beyond what was tried."
        )
    else:
        text += f"From {plateau['n']} scans on, more scans brought less than {margin}"
        sure = plateau["n_sure"]
        if sure == plateau["n"]:
            text += "; this is 95 % certain."
        elif sure is not None:
            text += f"; with 95 % certainty this can be said only from {sure} scans on."
        else:
            text += (
                "; but chance moves the scores by more than that, so the data cannot tell for"
                " certain where the curve levels off."
            )
    return text


def _benefit(difference: Mapping[str, Any]) -> str:
    def at(index: int) -> str:
        value, n = difference["difference"][index], difference["n"][index]
        low, high = difference["low"][index], difference["high"][index]
        change = f"{number(value, sign=True)} points with {n} scan{'s' * (n != 1)}"
        if low is None:
            return f"{change} (no interval known)"
        judgement = "a gain" if low > 0 else "a loss" if high < 0 else "which may be chance"
        return f"{change} ({range_of((low, high))}: {judgement})"

    if not difference["n"]:
        return "The two arms have no number of scans in common."
    text = f"Adding synthetic tumours changes the score by {at(0)}"
    return text + (f", and by {at(-1)}." if len(difference["n"]) > 1 else ".")


def _savings(saved: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    same = saved["same_score"]

    def end(arm: str) -> str:
        n, last = arms[arm]["plateau"]["n"], arms[arm]["n"][-1]
        return f"level off at {n}" if n < last else f"are at their best with {n}, the most tried"

    text = f"Real scans alone {end(REAL)}; those with synthetic tumours {end(WITH_SYNTHETIC)}"
    text += f" (saving: {_saved(saved)}). "
    if same["n_real"] is None:
        text += (
            "But with synthetic tumours the score never comes within the margin of the best that"
            f" real scans alone reach ({saved['best_with_synthetic']:.1f} % against"
            f" {saved['best_alone']:.1f} %)"
        )
        if saved["n_real_with_synthetic"] < saved["n_real_alone"]:
            text += ": an early plateau at a lower score saves nothing"
        return f"{text}. {_doubt(same)}".strip()
    if same["n_real"] != saved["n_real_with_synthetic"]:
        text += (
            f"For the best score of real scans alone, {same['n_real']} scans with synthetic"
            f" tumours are enough (saving: {_saved(same)}). "
        )
    return text + _certainty(same)


def _verdict(saved: Mapping[str, Any]) -> str:
    same, alone = saved["same_score"], saved["n_real_alone"]
    if same["n_real"] is None:
        text = "with synthetic tumours the network never comes as far as with real scans alone;"
        return f"{text} there is no saving. {_doubt(same)}".strip()
    if same["saved_percent"] > 0:
        text = (
            f"with synthetic tumours, {same['n_real']} annotated scans do what takes {alone}"
            f" real ones alone, {same['saved_percent']:.0f} % fewer. "
        )
    elif same["saved_percent"] == 0:
        text = f"synthetic tumours save no annotated scans; both ways need {alone}. "
    else:
        text = (
            f"synthetic tumours do not help; with them {same['n_real']} annotated scans are needed"
            f" for what {alone} real ones give alone. "
        )
    return text + _certainty(same)


def _doubt(same: Mapping[str, Any]) -> str:
    """Returns what is left of a saving where the means show none."""
    high = same["interval"][1] if same["interval"] else None
    if high is None or high <= 0:
        return ""
    return f"That may be chance: a saving of up to {number(high, 0)} % is within the 95 % interval."


def _certainty(same: Mapping[str, Any]) -> str:
    interval = same["interval"]
    if interval is None:
        return "How certain that is, these data cannot tell."
    low, high = interval
    if low is not None and low > 0:
        return f"The data support a saving (95 % interval {range_of(interval, 0)} %)."
    if high is not None and high < 0:
        return f"The data speak against a saving (95 % interval {range_of(interval, 0)} %)."
    lowest = "none" if low is None or low <= 0 else f"{number(low, 0)} %"
    most = "not known" if high is None else f"{number(high, 0)} %"
    return f"That is not certain: the saving may be {lowest}, and at most {most} (95 % interval)."


def _prospect(arm: str, curve: Mapping[str, Any]) -> str:
    law, ahead = curve["law"], curve["forecast"]
    name = "Real scans alone" if arm == REAL else "With synthetic tumours"
    if law["identifiable"]:
        ends = law["interval"]["a"]
        text = f"{name}: the curve tends to {law['a']:.1f} % ({range_of(ends)})"
    elif law["a"] is not None:
        ends = law["interval"]["a"]
        text = f"{name}: the curve ends near {law['a']:.1f} % ({range_of(ends)})"
    else:
        return f"{name}: no law can be told from these points, since {law.get('reason')}."
    if ahead["score"] is not None:
        between = range_of(ahead["interval"])
        text += f"; {ahead['n']} scans should give {ahead['score']:.1f} % ({between})"
    check = ahead["left_out"]
    if check["inside"] is not None:
        verdict = "inside" if check["inside"] else "outside"
        text += (
            f". Check: from the smaller sizes, {check['predicted']:.1f} % was to be expected at"
            f" {check['n']} scans; {check['observed']:.1f} % was measured, {verdict} the interval"
        )
    return text + "."


def _saved(entry: Mapping[str, Any]) -> str:
    between = range_of(entry["interval"], 0)
    return f"{number(entry['saved_percent'], 0)} %" + (f", interval {between}" if between else "")


def _between(curve: Mapping[str, Any], index: int) -> str:
    if curve["low"][index] is None:
        return ""
    return f" (95 % interval {curve['low'][index]:.1f} to {curve['high'][index]:.1f})"


def _points(margin: float) -> str:
    return f"{margin:g} point" + ("" if margin == 1 else "s")


def _one(entries: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> Mapping[str, Any] | None:
    return next((entry for entry in entries if keys.items() <= entry.items()), None)
