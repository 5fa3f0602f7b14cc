"""Matching as a component: weights for a source's rows, through the cache."""

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from bco_lab.cache import ArtifactCache
from bco_lab.data.sources import FeedbackData
from bco_lab.density_ratio import effective_sample_size
from bco_lab.embedding import Embedded
from bco_lab.matching import DistributionMatching, NoMatching
from bco_lab.udm import match_prompts

ROWS, DIM = 60, 4


class Directions:
    """Embeds a prompt `s NUMBER` at random around +-1 in the first direction; counts its calls."""

    def __init__(self, name: str = "directions") -> None:
        self.name = name
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> np.ndarray:
        self.calls.append(list(prompts))
        return np.stack([_embedding(prompt) for prompt in prompts])

    def embed(self, prompts: list[str]) -> Embedded:
        return Embedded(self(prompts), truncated=3)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": self.name}


def _embedding(prompt: str) -> np.ndarray:
    side, number = prompt.split()
    noise = np.random.default_rng(int(number)).normal(size=DIM)
    noise[0] += 0.5 if side == "up" else -0.5
    return noise.astype(np.float32)


def rows(start: int, count: int) -> Dataset:
    """Thumbs-up mostly on prompts `up N`, thumbs-down mostly on `down N`; each prompt twice."""
    made = []
    for i in range(start, start + count):
        label = i % 2 == 0
        side = "up" if label != (i % 8 < 2) else "down"
        made += [{"prompt": f"{side} {i}", "completion": f"a{i}{k}", "label": label} for k in "xy"]
    return Dataset.from_list(made)


@pytest.fixture
def data() -> FeedbackData:
    return FeedbackData(train=rows(0, ROWS), eval=rows(ROWS, 10), name="log")


def matching(embedder: Any, **settings: Any) -> DistributionMatching:
    return DistributionMatching(
        **{"embedder": embedder, "min_density_ratio": 0.25, "max_density_ratio": 4.0} | settings
    )


def weights(dataset: Dataset) -> torch.Tensor:
    return torch.tensor(dataset["example_weight"], dtype=torch.float64)


def test_undesirable_rows_get_the_clamped_ratio_of_the_library(tmp_path, data) -> None:
    weighed, report = matching(Directions()).weigh(data, ArtifactCache(tmp_path))
    by_hand = match_prompts(data.train, Directions(), prompt_sample_size=1024, seed=0, name="log")
    p = np.array(by_hand.p_desirable)
    expected = np.where(data.train["label"], 1.0, np.clip(p / (1 - p), 0.25, 4.0))
    assert weights(weighed.train).numpy() == pytest.approx(expected, rel=1e-12)
    p_eval = np.array(by_hand.predict(data.eval, Directions(), name="eval"))
    expected = np.where(data.eval["label"], 1.0, np.clip(p_eval / (1 - p_eval), 0.25, 4.0))
    assert weights(weighed.eval).numpy() == pytest.approx(expected, rel=1e-12)
    assert weighed.train.remove_columns("example_weight").to_dict() == data.train.to_dict()
    assert report.udm == by_hand.report(min_density_ratio=0.25, max_density_ratio=4.0)
    assert (report.prompts, report.truncated, report.dim, report.scale) == (ROWS + 10, 3, DIM, 1.0)


def test_each_prompt_is_embedded_once_training_and_evaluation_together(tmp_path, data) -> None:
    embedder = Directions()
    matching(embedder).weigh(data, ArtifactCache(tmp_path))
    assert embedder.calls == [sorted({*data.train["prompt"], *data.eval["prompt"]})]


def test_other_bounds_target_and_scale_compute_nothing_again(tmp_path, data) -> None:
    embedder = Directions()
    first, cache = ArtifactCache(tmp_path), ArtifactCache(tmp_path)
    matching(embedder).weigh(data, first)
    for settings in ({"max_density_ratio": 2.0}, {"target": "mixture"}, {"normalize": True}):
        matching(embedder, **settings).weigh(data, cache)
    assert [(use.kind, use.reused) for use in first.uses] == [("prompt-embeddings", False), ("p-desirable", False)]
    assert [(use.kind, use.reused) for use in cache.uses] == [("prompt-embeddings", True), ("p-desirable", True)] * 3
    assert len(embedder.calls) == 1


@pytest.mark.parametrize(
    ("change", "embeddings", "fit"),
    [
        ({"embedder": Directions("other")}, False, True),  # the same numbers: the classifier does not ask who made them
        ({"prompt_sample_size": 20}, True, False),
        ({"seed": 1}, True, False),
    ],
)
def test_what_changes_the_numbers_is_computed_again(tmp_path, data, change, embeddings, fit) -> None:
    matching(Directions()).weigh(data, ArtifactCache(tmp_path))
    cache = ArtifactCache(tmp_path)
    matching(**{"embedder": Directions(), **change}).weigh(data, cache)
    assert [use.reused for use in cache.uses] == [embeddings, fit]


def test_other_labels_are_fitted_again_on_the_same_embeddings(tmp_path, data) -> None:
    matching(Directions()).weigh(data, ArtifactCache(tmp_path))
    cache = ArtifactCache(tmp_path)
    flipped = data.train.map(lambda row: {"label": not row["label"]})
    matching(Directions()).weigh(replace(data, train=flipped), cache)
    assert [use.reused for use in cache.uses] == [True, False]


def test_a_plain_function_embeds_too_but_is_not_kept(tmp_path, data, caplog) -> None:
    cache = ArtifactCache(tmp_path)
    with caplog.at_level(logging.INFO, "bco_lab"):
        plain, report = matching(lambda prompts: torch.tensor(Directions()(prompts))).weigh(data, cache)
    assert "has no fingerprint(), so its embeddings are not kept" in caplog.text
    assert [use.kind for use in cache.uses] == ["p-desirable"]
    assert report.truncated is None
    kept, _ = matching(Directions()).weigh(data, cache)
    assert weights(plain.train).tolist() == weights(kept.train).tolist()


def test_normalised_weights_have_mean_one(tmp_path, data) -> None:
    cache = ArtifactCache(tmp_path)
    plain, _ = matching(Directions()).weigh(data, cache)
    scaled, report = matching(Directions(), normalize=True).weigh(data, cache)
    down = ~torch.tensor(data.train["label"])
    assert weights(scaled.train)[down].mean().item() == pytest.approx(1.0)
    assert (weights(scaled.train)[~down] == 1).all()
    ratio = weights(plain.train)[down] / weights(scaled.train)[down]
    assert ratio.tolist() == pytest.approx([report.scale] * int(down.sum()))
    down = ~torch.tensor(data.eval["label"])
    assert (weights(plain.eval)[down] / weights(scaled.eval)[down]).tolist() == pytest.approx(
        [report.scale] * int(down.sum())
    )


def test_the_other_targets_weigh_the_other_rows(tmp_path, data) -> None:
    cache = ArtifactCache(tmp_path)
    up = torch.tensor(data.train["label"])
    p = torch.tensor(match_prompts(data.train, Directions(), prompt_sample_size=1024, seed=0, name="log").p_desirable)
    undesirable = weights(matching(Directions(), target="undesirable").weigh(data, cache)[0].train)
    assert (undesirable[~up] == 1).all()
    assert undesirable[up].tolist() == pytest.approx(((1 - p) / p)[up].clamp(0.25, 4).tolist())
    mixture = weights(matching(Directions(), target="mixture").weigh(data, cache)[0].train)
    own = torch.where(up, p, 1 - p)
    assert mixture.tolist() == pytest.approx((0.5 / own).clamp(0.25, 4).tolist())


def test_the_report_counts_every_row(tmp_path, data) -> None:
    weighed, report = matching(Directions()).weigh(data, ArtifactCache(tmp_path))
    found = json.loads(json.dumps(report.to_dict()))
    down = ROWS
    assert sum(found["p_histogram"]["desirable"]) == sum(found["p_histogram"]["undesirable"]) == down
    histogram = found["weight_histogram"]
    assert sum(histogram["weight"]) == sum(histogram["ratio"]) == down
    assert (histogram["edges"][0], histogram["edges"][-1]) == pytest.approx((0.025, 40.0))
    given = weights(weighed.train)[~torch.tensor(data.train["label"])]
    assert np.histogram(given, histogram["edges"])[0].tolist() == histogram["weight"]
    assert report.figures()["ess"] == pytest.approx(effective_sample_size(given))
    assert report.figures()["weight_mean"] == pytest.approx(given.mean().item())
    assert found["settings"]["target"] == "desirable"
    assert any("3 of 70 prompts were cut" in note for note in report.notes())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([["a", "b"]] * 70, r"the embedder returned no numbers \[prompts, dim\]"),
        (np.zeros(3), r"the embedder returned the shape \[3\] for 70 prompts"),
        (np.zeros((3, 2)), r"the embedder returned the shape \[3, 2\] for 70 prompts"),
        (np.full((70, 2), np.nan), r"the embedder returned a value that is not finite for 'down 0'"),
    ],
)
def test_embeddings_that_are_none_are_refused_and_not_kept(tmp_path, data, result, message) -> None:
    class Broken(Directions):
        def embed(self, prompts: list[str]) -> Embedded:
            return Embedded(result, truncated=0)

    with pytest.raises(ValueError, match=message):
        matching(Broken()).weigh(data, ArtifactCache(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("scale", [1e-300, 1e160])
def test_the_scale_of_embeddings_does_not_matter(tmp_path, data, scale) -> None:
    plain, _ = matching(Directions()).weigh(data, ArtifactCache(tmp_path))
    scaled, _ = matching(lambda prompts: Directions()(prompts).astype(np.float64) * scale).weigh(
        data, ArtifactCache(tmp_path)
    )
    assert weights(scaled.train).tolist() == pytest.approx(weights(plain.train).tolist(), rel=1e-4)


def test_an_embedder_that_fails_is_named(tmp_path, data) -> None:
    def broken(prompts: list[str]) -> np.ndarray:
        raise RuntimeError("no server")

    with pytest.raises(ValueError, match=r"^the embedder failed: RuntimeError: no server$"):
        matching(broken).weigh(data, ArtifactCache(tmp_path))


def test_weights_of_the_log_are_not_overwritten(tmp_path, data) -> None:
    own = replace(data, train=data.train.add_column("example_weight", [1.0] * len(data.train)))
    with pytest.raises(ValueError, match=r"^log: the column 'example_weight' is there already .* udm=off"):
        matching(Directions()).weigh(own, ArtifactCache(tmp_path))
    assert NoMatching().weigh(own, ArtifactCache(tmp_path)) == (own, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_density_ratio": 20.0}, r"min_density_ratio=20.0 must be in \(0, udm.max_density_ratio=4.0\]"),
        ({"min_density_ratio": 0}, r"min_density_ratio=0 must be in \(0"),
        ({"max_density_ratio": "many"}, r"max_density_ratio=many must be a number"),
        ({"target": "up"}, r"target=up must be one of desirable, undesirable, mixture"),
        ({"prompt_sample_size": 1}, r"prompt_sample_size=1 must be a whole number >= 2"),
        ({"prompt_sample_size": 2.5}, r"prompt_sample_size=2.5 must be a whole number >= 2"),
        ({"seed": -1}, r"seed=-1 must be a whole number >= 0"),
        ({"normalize": "no"}, r"normalize=no must be true or false"),
        ({"embedder": {"name": 1}}, r"embedder=.* must be callable"),
    ],
)
def test_wrong_settings_are_named(settings, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        matching(**{"embedder": Directions(), **settings})
