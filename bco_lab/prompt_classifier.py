"""The classifier behind underlying distribution matching: desirable or undesirable, from the prompt's embedding alone.

A classifier that is asked about rows it was fitted on is far too sure of itself, and its density ratios are wrong. So
every row gets its probability from a model that saw no row of the same prompt (cross-fitting).
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from bco_lab.data.labels import check_both_classes

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

# Ten folds: with few rows each tenth of them that a model may learn from counts.
FOLDS = 10
# L2 strengths, strong to weak: the penalty is `strength / 2 · |coefficients|²` beside the mean log-loss of a row, so
# one grid serves sets of any size. Four per decade: with coarser steps the mean weight of undesirable rows drifts
# from 1.
STRENGTHS: tuple[float, ...] = tuple(10.0 ** (quarter / 4) for quarter in range(8, -13, -1))

_NORMAL_97_5 = 1.959963984540054
_ONE_PROMPT = "the rows of a class share one prompt, or nearly so, and cannot be both learnt from and held out"


@dataclass(frozen=True)
class UdmDiagnostics:
    """How well the prompts of both classes can be told apart, and from how much.

    Attributes:
        rows: Rows that have a probability.
        prompts: Different prompts among them.
        desirable: Desirable rows.
        undesirable: Undesirable rows.
        dim: Entries of an embedding.
        sample_desirable: Desirable rows that the final classifier was fitted on.
        sample_undesirable: Undesirable rows that the final classifier was fitted on.
        folds: Parts that took turns at being held out; 0 where no classifier was fitted.
        strength: L2 strength with the lowest held-out log-loss; None where no classifier was fitted.
        auc: Held-out AUC; None where no classifier was fitted.
        auc_low: Lower end of its 95% interval: DeLong's variance, rows of one prompt taken together, widened because
            the folds share what they learnt from.
        auc_high: Upper end of that interval.
        log_loss: Held-out log-loss in nats, mean of both classes' means; ln 2 = 0.693 says nothing was learnt.
        reason: Why no classifier was fitted; None where one was.
    """

    rows: int
    prompts: int
    desirable: int
    undesirable: int
    dim: int
    sample_desirable: int = 0
    sample_undesirable: int = 0
    folds: int = 0
    strength: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    log_loss: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class UdmFit:
    """Cross-fitted probabilities, and a classifier for prompts that are in none of the rows.

    Attributes:
        p_desirable: `p(desirable | prompt)` of each row, held out, with both classes equally frequent; `[rows]`.
        coefficients: Of the final classifier, fitted on all folds; for embeddings as they come; `[dim]`.
        intercept: Of the final classifier.
        diagnostics: What is known of the fit.
    """

    p_desirable: Floats
    coefficients: Floats
    intercept: float
    diagnostics: UdmDiagnostics

    def predict(self, embeddings: Floats) -> Floats:
        """`p(desirable | prompt)` by the final classifier, `[rows]`, for prompts that it was not fitted on.

        Args:
            embeddings: `[rows, dim]`.
        """
        return _sigmoid(embeddings @ self.coefficients + self.intercept)


def fit_density_ratio(
    embeddings: Floats,
    labels: Sequence[bool] | Bools,
    groups: Sequence[Hashable],
    *,
    prompt_sample_size: int,
    folds: int = FOLDS,
    seed: int,
) -> UdmFit:
    """Fit a logistic classifier of desirable against undesirable prompts, each row's probability out of fold.

    Features are standardised, classes balanced, and the L2 strength is the one with the lowest held-out log-loss. All
    rows of a group are in one fold. The result does not depend on the order of the rows.

    With fewer groups of a class than `folds`, there are as many folds as groups. A class with one group cannot be held
    out and learnt from at once: then every probability is 0.5, which is weight 1, and the diagnostics say why.

    Args:
        embeddings: Of each row's prompt, `[rows, dim]`, finite; equal within a group.
        labels: True is desirable, `[rows]`.
        groups: What identifies each row's prompt; sortable, `[rows]`.
        prompt_sample_size: Rows per class, at most, that a classifier is fitted on; drawn without replacement.
        folds: Parts that take turns at being held out, at least 2.
        seed: Of folds and samples.

    Raises:
        ValueError: Lengths that do not agree, embeddings that are not finite, labels of one class only, fewer than 2
            folds or a sample of no rows.
    """
    flags = np.asarray(labels, dtype=bool)
    _check(embeddings, flags, groups, prompt_sample_size, folds)
    order, members = _canonical(groups, flags)
    x, y = embeddings[order], flags[order]
    known = partial(
        UdmDiagnostics,
        rows=len(y),
        prompts=int(members.max()) + 1,
        desirable=int(y.sum()),
        undesirable=int((~y).sum()),
        dim=x.shape[1],
    )
    folds = min(folds, *(len(np.unique(members[y == label])) for label in (True, False)))
    fold_of = _deal(members, y, folds, np.random.default_rng(seed))
    if any(len(np.unique(fold_of[y == label])) < 2 for label in (True, False)):
        return UdmFit(np.full(len(y), 0.5), np.zeros(x.shape[1]), 0.0, known(reason=_ONE_PROMPT))

    held_out = _held_out_logits(x, y, fold_of, prompt_sample_size, seed)
    losses = [_log_loss(logits, y) for logits in held_out]
    best = int(np.argmin(losses))
    logits = held_out[best][np.searchsorted(members, members)]  # rows of a prompt agree to the last bit
    rows = _sample(y, np.arange(len(y)), prompt_sample_size, np.random.default_rng([seed, folds]))
    coefficients, intercepts = _fit(x[rows], y[rows], STRENGTHS[: best + 1])
    auc, standard_error = clustered_auc(logits, y, members)
    auc_low, auc_high = _interval(auc, standard_error, folds)
    diagnostics = known(
        sample_desirable=int(y[rows].sum()),
        sample_undesirable=int((~y[rows]).sum()),
        folds=folds,
        strength=STRENGTHS[best],
        auc=auc,
        auc_low=auc_low,
        auc_high=auc_high,
        log_loss=losses[best],
    )
    p_desirable = np.empty(len(y))
    p_desirable[order] = _sigmoid(logits)
    return UdmFit(p_desirable, coefficients[-1], float(intercepts[-1]), diagnostics)


def clustered_auc(scores: Floats, labels: Bools, clusters: Integers) -> tuple[float, float]:
    """Area under the ROC curve and its standard error where rows of one cluster belong together.

    DeLong's variance, a cluster being one observation (Obuchowski 1997, doi:10.2307/2533958).

    Args:
        scores: `[rows]`; higher should be desirable; ties count half.
        labels: `[rows]`; each class occurs in at least two clusters.
        clusters: Numbers from 0 on, `[rows]`.
    """
    # For each row the share of the other class that it is ordered rightly against.
    placement = np.where(labels, _share_below(scores, scores[~labels]), 1 - _share_below(scores, scores[labels]))
    auc = float(placement[labels].mean())
    total = int(clusters.max()) + 1
    variance = 0.0
    excess = []
    for rows in (labels, ~labels):
        counts = np.bincount(clusters[rows], minlength=total)
        deviation = (np.bincount(clusters[rows], placement[rows], minlength=total) - counts * auc) / counts.sum()
        holding = np.count_nonzero(counts)
        variance += holding / (holding - 1) * (deviation @ deviation)
        excess.append(deviation)
    variance += 2 * total / (total - 1) * (excess[0] @ excess[1])
    return auc, float(np.sqrt(max(variance, 0.0)))


def _interval(auc: float, standard_error: float, folds: int) -> tuple[float, float]:
    """95% interval of a cross-fitted AUC, within 0 and 1.

    The plain standard error takes the models as given. They are not: they learnt from rows that other models are judged
    on. Nadeau and Bengio (2003, doi:10.1023/A:1024068626366) multiply the variance by 1 + folds · held out / learnt
    from. On labels dealt out by chance, the lower end is then above 0.5 in about 2 of 100 data sets; without it in 7.
    """
    half = _NORMAL_97_5 * standard_error * float(np.sqrt(1 + folds / (folds - 1)))
    return max(0.0, auc - half), min(1.0, auc + half)


# ---- folds and samples ----


def _canonical(groups: Sequence[Hashable], labels: Bools) -> tuple[Integers, Integers]:
    """An order of rows that does not depend on the given one, and the number of each row's group in that order.

    Rows of one group and label are alike, so which of them comes first does not matter.
    """
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}  # type: ignore[type-var]
    members = np.array([numbers[group] for group in groups], dtype=np.int64)
    order = np.lexsort((labels, members))
    return order, members[order]


def _deal(members: Integers, labels: Bools, folds: int, rng: np.random.Generator) -> Integers:
    """The fold of each row: groups stay whole, large ones go first, each to the fold with the least of its classes."""
    groups = int(members.max()) + 1
    shares = np.stack([np.bincount(members[labels == label], minlength=groups) for label in (True, False)], axis=1)
    shares = shares / shares.sum(axis=0)
    shuffled = rng.permutation(groups)
    largest_first = shuffled[np.argsort(-shares[shuffled].max(axis=1), kind="stable")]
    load = np.zeros((folds, 2))
    fold_of_group = np.empty(groups, dtype=np.int64)
    for group in largest_first:
        fold = np.where(shares[group] > 0, load, 0.0).max(axis=1).argmin()
        load[fold] += shares[group]
        fold_of_group[group] = fold
    return fold_of_group[members]


def _sample(labels: Bools, candidates: Integers, size: int, rng: np.random.Generator) -> Integers:
    """At most `size` of the candidates of each class, ascending."""
    chosen = [rng.permutation(candidates[labels[candidates] == label])[:size] for label in (True, False)]
    return np.sort(np.concatenate(chosen))


# ---- the classifier ----


def _held_out_logits(x: Floats, labels: Bools, fold_of: Integers, sample_size: int, seed: int) -> Floats:
    """Logits under each of STRENGTHS, `[strengths, rows]`, each row's by a model fitted on other folds."""
    logits = np.empty((len(STRENGTHS), len(labels)))
    for fold in range(int(fold_of.max()) + 1):
        inside = fold_of == fold
        rows = _sample(labels, np.flatnonzero(~inside), sample_size, np.random.default_rng([seed, fold]))
        coefficients, intercepts = _fit(x[rows], labels[rows], STRENGTHS)
        logits[:, inside] = coefficients @ x[inside].T + intercepts[:, None]
    return logits


def _fit(x: Floats, labels: Bools, strengths: Sequence[float]) -> tuple[Floats, Floats]:
    """Coefficients `[strengths, dim]`, for embeddings as they come, and intercepts `[strengths]`."""
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale[scale <= 1e-6 * scale.max()] = np.inf  # a feature that does not vary here says nothing
    standardised = (x - mean) / scale
    # Each strength starts from the one before and converges in tens of iterations: the bound is never reached.
    model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=10_000)
    coefficients, intercepts = np.empty((len(strengths), x.shape[1])), np.empty(len(strengths))
    for place, strength in enumerate(strengths):
        model.set_params(C=1 / (strength * len(labels))).fit(standardised, labels)
        coefficients[place] = model.coef_[0] / scale
        intercepts[place] = model.intercept_[0] - mean @ coefficients[place]
    return coefficients, intercepts


def _log_loss(logits: Floats, labels: Bools) -> float:
    """Mean of both classes' mean log-loss, nats."""
    losses = np.logaddexp(0.0, np.where(labels, -logits, logits))
    return float((losses[labels].mean() + losses[~labels].mean()) / 2)


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logits))


def _share_below(scores: Floats, others: Floats) -> Floats:
    """For each score, the share of the others below it; those equal to it count half."""
    ranked = np.sort(others)
    below, up_to = (np.searchsorted(ranked, scores, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(ranked))


def _check(embeddings: Floats, labels: Bools, groups: Sequence[Hashable], sample_size: int, folds: int) -> None:
    if embeddings.ndim != 2 or not len(embeddings) == len(labels) == len(groups):
        raise ValueError(
            f"embeddings of shape {list(embeddings.shape)}, {len(labels)} labels and {len(groups)} groups do not "
            "agree: [rows, dim], [rows] and [rows] are needed"
        )
    check_both_classes(labels.tolist(), "density ratio")
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"the embedding of row {row} is not finite")
    if folds < 2:
        raise ValueError(f"folds={folds} must be >= 2")
    if sample_size < 1:
        raise ValueError(f"prompt_sample_size={sample_size} must be >= 1")
