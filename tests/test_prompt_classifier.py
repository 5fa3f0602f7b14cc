from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bco_lab.prompt_classifier import UdmFit, clustered_auc, fit_density_ratio


def gaussians(rows: int, dim: int, seed: int, shift: float = 1.0) -> tuple[Any, Any, Any]:
    """Two Gaussians whose means are `shift` apart, `rows` each: points, labels, true log-ratio."""
    draw = np.random.default_rng(seed)
    direction = draw.standard_normal(dim)
    direction *= shift / np.linalg.norm(direction)
    labels = np.arange(2 * rows) % 2 == 0
    points = draw.standard_normal((2 * rows, dim)) + np.where(labels[:, None], direction, -direction) / 2
    return points, labels, points @ direction


def fit(points: Any, labels: Any, groups: Any = None, **settings: Any) -> UdmFit:
    groups = range(len(labels)) if groups is None else groups
    return fit_density_ratio(points, labels, list(groups), **{"prompt_sample_size": 1024, "seed": 0, **settings})


def log_ratio(p: Any) -> Any:
    return np.log(p / (1 - p))


# ---- are the ratios right? ----


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_ratios_of_two_gaussians_are_the_true_ones(seed: int) -> None:
    points, labels, truth = gaussians(1024, 32, seed)
    found = fit(points, labels, seed=seed, folds=5)
    estimate = log_ratio(found.p_desirable)
    assert 0.9 < np.exp(estimate[~labels]).mean() < 1.1
    assert np.corrcoef(estimate, truth)[0, 1] > 0.9
    assert found.diagnostics.auc == pytest.approx(0.76, abs=0.04)  # the best possible is Φ(1/√2) = 0.760


def test_in_many_dimensions_the_mean_weight_stays_one_where_in_sample_fitting_goes_wrong() -> None:
    points, labels, _ = gaussians(512, 256, 3)
    found = fit(points, labels, folds=5)
    assert 0.9 < np.exp(log_ratio(found.p_desirable[~labels])).mean() < 1.1
    naive = LogisticRegression(class_weight="balanced", max_iter=1000).fit(points, labels)
    fresh, fresh_labels, _ = gaussians(4096, 256, 3)  # the same direction: it is drawn first
    assert np.exp(naive.decision_function(fresh)[~fresh_labels]).mean() > 2


def test_other_prompts_get_right_ratios_too() -> None:
    points, labels, truth = gaussians(2048, 16, 5)
    found = fit(points[:2048], labels[:2048], folds=5)
    estimate = log_ratio(found.predict(points[2048:]))
    assert 0.9 < np.exp(estimate[~labels[2048:]]).mean() < 1.1
    assert np.corrcoef(estimate, truth[2048:])[0, 1] > 0.95


def test_a_rare_class_does_not_move_the_ratio() -> None:
    points, labels, truth = gaussians(1024, 8, 6)
    kept = ~labels | (np.arange(len(labels)) % 8 == 0)  # a quarter of the desirable rows
    found = fit(points[kept], labels[kept], folds=5)
    undesirable = ~labels[kept]
    assert 0.85 < np.exp(log_ratio(found.p_desirable[undesirable])).mean() < 1.15
    assert np.mean(log_ratio(found.p_desirable) - truth[kept]) == pytest.approx(0, abs=0.2)


def test_classes_from_the_same_prompts_weigh_one() -> None:
    points, labels, _ = gaussians(400, 64, 7, shift=0.0)
    found = fit(points, labels, folds=5)
    weights = np.exp(log_ratio(found.p_desirable[~labels]))
    assert weights.mean() == pytest.approx(1, abs=0.05)
    assert weights.sum() ** 2 / (weights**2).sum() > 0.95 * 400
    assert found.diagnostics.auc_low < 0.5 < found.diagnostics.auc_high
    assert found.diagnostics.log_loss == pytest.approx(np.log(2), abs=0.01)


# ---- nothing leaks ----


def test_rows_of_one_prompt_never_teach_about_each_other() -> None:
    draw = np.random.default_rng(0)
    prompts, copies = 120, 6
    points = draw.standard_normal((prompts, 100)).repeat(copies, axis=0)
    labels = (draw.permutation(prompts) % 2 == 0).repeat(copies)
    groups = np.arange(prompts).repeat(copies)
    found = fit(points, labels, groups.tolist(), folds=5)
    assert found.diagnostics.auc_low < 0.5 < found.diagnostics.auc_high
    assert abs(found.diagnostics.auc - 0.5) < 0.15
    assert found.diagnostics.prompts == prompts
    leaky = fit(points, labels, folds=5)  # each row taken for a prompt of its own
    assert leaky.diagnostics.auc > 0.95


def test_a_prompt_with_both_labels_has_one_probability() -> None:
    points, labels, _ = gaussians(60, 37, 1)
    groups = np.arange(120) // 3
    found = fit(points[groups], labels, groups.tolist(), folds=5).p_desirable.reshape(40, 3)
    assert (found == found[:, :1]).all()


# ---- the same everywhere ----


def test_order_of_rows_does_not_matter_and_a_seed_gives_one_result() -> None:
    points, labels, _ = gaussians(150, 8, 2)
    groups = [f"prompt {row // 2}" for row in range(300)]
    points = points[np.arange(300) // 2 * 2]
    first, again = (fit(points, labels, groups, prompt_sample_size=50, folds=4) for _ in range(2))
    order = np.random.default_rng(1).permutation(300)
    moved = fit(points[order], labels[order], [groups[row] for row in order], prompt_sample_size=50, folds=4)
    other = fit(points, labels, groups, prompt_sample_size=50, folds=4, seed=1)
    assert np.array_equal(first.p_desirable, again.p_desirable)
    assert np.array_equal(moved.p_desirable, first.p_desirable[order])
    assert np.array_equal(moved.coefficients, first.coefficients)
    assert moved.diagnostics == first.diagnostics == again.diagnostics
    assert not np.array_equal(other.p_desirable, first.p_desirable)


def test_final_classifier_is_that_of_scikit_learn() -> None:
    points, labels, _ = gaussians(200, 5, 4)
    points, labels = points[80:] * [1, 10, 0.1, 3, 5] + 7, labels[80:]
    found = fit(points, labels, folds=3)
    penalty = 1 / (found.diagnostics.strength * len(labels))
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, class_weight="balanced", tol=1e-8))
    expected = reference.fit(points, labels).predict_proba(points)[:, 1]
    assert found.predict(points) == pytest.approx(expected, abs=2e-3)


def test_features_may_have_any_scale_or_none() -> None:
    points, labels, _ = gaussians(100, 4, 8)
    plain = fit(points, labels, folds=4)
    stretched = fit(np.hstack([points * [1e-3, 1e3, 7, 1] + 5, np.full((200, 1), 3.0)]), labels, folds=4)
    assert stretched.p_desirable == pytest.approx(plain.p_desirable, abs=2e-3)
    assert stretched.coefficients[4] == 0


# ---- samples and folds ----


def test_samples_hold_at_most_so_many_rows_of_each_class_and_every_row_gets_a_probability() -> None:
    points, labels, _ = gaussians(300, 4, 9)
    labels = labels & (np.arange(600) < 80)  # 40 desirable rows
    found = fit(points, labels, prompt_sample_size=100, folds=4)
    assert (found.diagnostics.sample_desirable, found.diagnostics.sample_undesirable) == (40, 100)
    assert (found.diagnostics.desirable, found.diagnostics.undesirable) == (40, 560)
    assert ((found.p_desirable > 0) & (found.p_desirable < 1)).all()


def test_a_class_of_few_prompts_has_as_many_folds() -> None:
    points, labels, _ = gaussians(50, 4, 10)
    labels = labels & (np.arange(100) < 6)  # 3 desirable prompts
    found = fit(points, labels)
    assert found.diagnostics.folds == 3
    assert found.diagnostics.reason is None
    assert found.diagnostics.auc == pytest.approx(roc_auc_score(labels, found.p_desirable))


@pytest.mark.parametrize("groups", [["one"] * 20, ["up"] * 10 + [f"down {n}" for n in range(10)]])
def test_a_class_of_one_prompt_weighs_one_and_says_why(groups: list[str]) -> None:
    found = fit(np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) < 10, groups)
    assert found.p_desirable.tolist() == [0.5] * 20
    assert found.predict(np.ones((2, 3))).tolist() == [0.5, 0.5]
    assert found.diagnostics.reason == (
        "the rows of a class share one prompt, or nearly so, and cannot be both learnt from and held out"
    )
    assert (found.diagnostics.auc, found.diagnostics.folds, found.diagnostics.strength) == (None, 0, None)


@pytest.mark.parametrize("seed", range(5))
def test_every_model_sees_both_classes_however_uneven_the_prompts(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 60, size=12)
    groups = np.arange(12).repeat(sizes)
    labels = draw.random(len(groups)) < np.where(groups < 9, 0.02, 0.9)
    labels[[0, -1]] = [False, True]
    found = fit(draw.standard_normal((12, 3))[groups], labels, groups.tolist(), seed=seed)
    assert found.diagnostics.folds >= 2
    assert np.isfinite(found.diagnostics.log_loss)


# ---- diagnostics ----


def test_log_loss_is_the_mean_of_both_classes() -> None:
    points, labels, _ = gaussians(100, 4, 11)
    points, labels = points[60:], labels[60:] & (np.arange(140) < 90)
    found = fit(points, labels, folds=4)
    weight = np.where(labels, 1 / labels.sum(), 1 / (~labels).sum())
    assert found.diagnostics.log_loss == pytest.approx(log_loss(labels, found.p_desirable, sample_weight=weight))
    assert found.diagnostics.to_dict()["log_loss"] == found.diagnostics.log_loss


def test_standard_error_of_single_rows_is_that_of_delong() -> None:
    draw = np.random.default_rng(12)
    labels = draw.random(80) < 0.4
    scores = np.round(draw.standard_normal(80) + labels, 1)  # with ties
    up, down = scores[labels], scores[~labels]
    wins = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    variance = wins.mean(1).var(ddof=1) / len(up) + wins.mean(0).var(ddof=1) / len(down)
    auc, standard_error = clustered_auc(scores, labels, np.arange(80))
    assert auc == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    # Single rows are clusters of which each lacks one class, so the covariance term is nil.
    assert standard_error == pytest.approx(np.sqrt(variance), rel=1e-12)


def test_standard_error_of_clusters_is_that_of_a_bootstrap_over_clusters() -> None:
    draw = np.random.default_rng(13)
    clusters = np.arange(100).repeat(5)
    labels = (clusters % 2 == 0) ^ (draw.random(500) < 0.1)
    scores = draw.standard_normal(100).repeat(5) + 0.3 * draw.standard_normal(500) + 0.7 * labels
    _, standard_error = clustered_auc(scores, labels, clusters)
    resampled = []
    for _ in range(400):
        rows = (draw.integers(0, 100, 100)[:, None] * 5 + np.arange(5)).ravel()
        resampled.append(roc_auc_score(labels[rows], scores[rows]))
    assert standard_error == pytest.approx(np.std(resampled), rel=0.12)
    assert clustered_auc(scores, labels, np.arange(500))[1] < 0.6 * standard_error  # single rows: far too sure


def test_the_interval_is_widened_for_shared_training_rows() -> None:
    points, labels, _ = gaussians(100, 4, 14)
    found = fit(points, labels, folds=5)
    auc, standard_error = clustered_auc(found.p_desirable, labels, np.arange(200))
    half = 1.959964 * standard_error * np.sqrt(1 + 5 / 4)
    assert (found.diagnostics.auc_low, found.diagnostics.auc_high) == pytest.approx((auc - half, auc + half), rel=1e-5)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [True] * 4}, "^density ratio: only one class present, all 4 labels are desirable"),
        ({"labels": [True, False]}, r"^embeddings of shape \[4, 2\], 2 labels and 4 groups do not agree"),
        ({"points": np.ones(4)}, r"^embeddings of shape \[4\], 4 labels and 4 groups do not agree"),
        ({"points": np.array([[0, 1], [1, 1], [1, np.nan], [0, 0]])}, "^the embedding of row 2 is not finite$"),
        ({"folds": 1}, "^folds=1 must be >= 2$"),
        ({"prompt_sample_size": 0}, "^prompt_sample_size=0 must be >= 1$"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, Any], message: str) -> None:
    given = {"points": np.ones((4, 2)), "labels": [True, False, True, False], "groups": list("abcd"), **changes}
    with pytest.raises(ValueError, match=message):
        fit(**given)
