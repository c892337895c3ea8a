"""How well real and synthetic tumours can be told apart: KS distances, a two-sample classifier."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import ks_2samp
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CLASSIFIERS = ("forest", "logistic")
# Fewer patients of either kind say nothing, and cannot be divided into folds.
LEAST_PATIENTS = 4
# Radii of tumours that count as of one size differ by at most this share.
SAME_SIZE = 0.1
# Fewer points make no picture.
LEAST_POINTS = 8


def ks(real: Sequence[float], synthetic: Sequence[float]) -> dict[str, float | int | None]:
    """Returns the Kolmogorov-Smirnov distance of two samples; undefined values are left out.

    Returns:
        ks (0 to 1), p (as if tumours were independent, which those of one patient are not),
        n_real, n_synthetic and both medians; None where a sample is empty.
    """
    a, b = (
        np.asarray([v for v in values if np.isfinite(v)], float) for values in (real, synthetic)
    )
    found: dict[str, float | int | None] = {"n_real": len(a), "n_synthetic": len(b)}
    both = bool(len(a) and len(b))
    test = ks_2samp(a, b) if both else None
    found["ks"] = float(test.statistic) if test else None
    found["p"] = float(test.pvalue) if test else None
    found["median_real"] = float(np.median(a)) if len(a) else None
    found["median_synthetic"] = float(np.median(b)) if len(b) else None
    return found


def histogram_distance(real: Float[np.ndarray, " bins"], synthetic: Float[np.ndarray, " bins"]):
    """Returns the largest difference of two histograms' distributions; None if one is empty."""
    if not (real.sum() > 0 and synthetic.sum() > 0):
        return None
    parts = (np.cumsum(histogram) / histogram.sum() for histogram in (real, synthetic))
    return float(np.abs(np.subtract(*parts)).max())


def two_sample(
    features: Float[np.ndarray, "n d"],
    synthetic: Bool[np.ndarray, " n"],
    patients: Sequence[str],
    *,
    classifier: str,
    folds: int = 5,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Tests whether a classifier tells synthetic from real tumours of patients it has not seen.

    Folds hold whole patients. The AUC counts pairs of a real and a synthetic tumour of one fold,
    so that folds need not share a scale and a classifier that knows nothing has 0.5.

    Args:
        features: one row a tumour; NaN becomes the training folds' median.
        synthetic: which are.
        patients: whose; a patient may have real and synthetic ones.
        classifier: "forest" (random forest) or "logistic" (L2, standardised).
        folds: at most; never more than patients of either kind.
        resamples: bootstrap resamples of patients.
        confidence: of the interval.
        seed: of folds, forest and bootstrap.

    Returns:
        auc, low, high (None where it cannot be said, with "reason"), numbers of tumours and
        patients, folds.
    """
    groups = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    counts = [len(np.unique(groups[kind])) for kind in (~synthetic, synthetic)]
    found: dict[str, Any] = {
        "auc": None,
        "low": None,
        "high": None,
        "n_real": int((~synthetic).sum()),
        "n_synthetic": int(synthetic.sum()),
        "patients_real": len(np.unique(groups[~synthetic])),
        "patients_synthetic": len(np.unique(groups[synthetic])),
        "folds": min(folds, *counts),
    }
    if min(counts) < LEAST_PATIENTS:
        return found | {
            "folds": None,
            "reason": f"{counts[0]} patients with real and {counts[1]} with synthetic tumours;"
            f" at least {LEAST_PATIENTS} of either are needed",
        }
    # A feature that is nowhere defined says nothing, and cannot be filled in.
    features = features[:, np.isfinite(features).any(axis=0)]
    score, fold = np.zeros(len(features)), np.full(len(features), -1)
    splitter = StratifiedGroupKFold(found["folds"], shuffle=True, random_state=seed)
    for index, (train, test) in enumerate(splitter.split(features, synthetic, groups)):
        if len(np.unique(synthetic[train])) < 2:
            continue
        model = _classifier(classifier, seed)
        with warnings.catch_warnings():
            # Where the two are fully separable the weights grow without end; the order stands.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features[train], synthetic[train])
        score[test], fold[test] = model.predict_proba(features[test])[:, 1], index
    wins, pairs = _pairs(score, fold, synthetic, groups)
    if not pairs.sum():
        return found | {"reason": "no fold has real and synthetic tumours"}
    found["auc"] = float(wins.sum() / pairs.sum())
    found["low"], found["high"] = _interval(wins, pairs, resamples, confidence, seed)
    return found


def match_sizes(
    radius: Float[np.ndarray, " n"], synthetic: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, " m"]:
    """Returns the tumours of as many pairs, one real and one synthetic, of equal size.

    Features of small and of large lesions differ by themselves (of a small one most voxels are
    its edge). In equal sizes a classifier has to see the look. The largest come first, since they
    have the fewest partners; radii of a pair differ by at most `SAME_SIZE`.
    """
    logarithm = np.log(radius)
    free = set(np.flatnonzero(synthetic).tolist())
    chosen: list[int] = []
    for real in sorted(np.flatnonzero(~synthetic).tolist(), key=lambda i: (-radius[i], i)):
        near = [i for i in free if abs(logarithm[i] - logarithm[real]) <= np.log1p(SAME_SIZE)]
        if near:
            partner = min(near, key=lambda i: (abs(logarithm[i] - logarithm[real]), i))
            free.remove(partner)
            chosen += [real, partner]
    return np.sort(np.asarray(chosen, int))


def _classifier(name: str, seed: int):
    fill = SimpleImputer(strategy="median", keep_empty_features=True)
    if name == "forest":
        forest = RandomForestClassifier(
            200, min_samples_leaf=2, class_weight="balanced", random_state=seed
        )
        return make_pipeline(fill, forest)
    if name == "logistic":
        regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        return make_pipeline(fill, StandardScaler(), regression)
    raise ValueError(f"classifier {name!r} is unknown. Expected {', '.join(CLASSIFIERS)}")


def _pairs(
    score: Float[np.ndarray, " n"],
    fold: Int[np.ndarray, " n"],
    synthetic: Bool[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "g g"], Float[np.ndarray, "g g"]]:
    """Sums over pairs (real, synthetic) of one fold by their patients: how many the synthetic one
    wins (ties are half), and how many there are."""
    count = int(groups.max()) + 1
    wins, pairs = np.zeros((count, count)), np.zeros((count, count))
    for index in np.unique(fold[fold >= 0]):
        real = np.flatnonzero((fold == index) & ~synthetic)
        made = np.flatnonzero((fold == index) & synthetic)
        higher = np.sign(score[made][None] - score[real][:, None]) / 2 + 0.5
        where = groups[real][:, None], groups[made][None]
        np.add.at(wins, where, higher)
        np.add.at(pairs, where, 1.0)
    return wins, pairs


def _interval(wins, pairs, resamples: int, confidence: float, seed: int):
    """Percentiles of the AUC over bootstrap resamples of the patients."""
    rng = np.random.default_rng(seed)
    count = len(wins)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    total = np.einsum("ri,ij,rj->r", weights, pairs, weights, optimize=True)
    won = np.einsum("ri,ij,rj->r", weights, wins, weights, optimize=True)
    drawn = won[total > 0] / total[total > 0]
    if not len(drawn):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def embed(features: Float[np.ndarray, "n d"], seed: int = 0) -> Float[np.ndarray, "n 2"] | None:
    """Returns t-SNE coordinates of standardised features; None for fewer than `LEAST_POINTS`."""
    if len(features) < LEAST_POINTS:
        return None
    features = features[:, np.isfinite(features).any(axis=0)]
    filled = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()).fit_transform(
        features
    )
    perplexity = min(30.0, (len(features) - 1) / 3)
    start = "pca" if filled.shape[1] >= 2 else "random"
    return TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(filled)
