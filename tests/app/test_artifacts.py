"""What trials share: tokenised rows and reference log-probs, computed by the first of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from runs import TINY, metrics_of, write_log

from bco_lab.app.artifacts import SharingTrainer, tokenized_rows
from bco_lab.cache import ArtifactCache
from bco_lab.models import PolicySource
from bco_lab.preparation import prepare_rows


@pytest.fixture
def source(tmp_path: Path) -> PolicySource:
    folder = tmp_path / "policy"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return PolicySource(name_or_path=str(folder))


def texts() -> Dataset:
    """Twelve rows of text, of uneven length."""
    return Dataset.from_list(
        [
            {
                "prompt": f"w{2 + i}",
                "completion": " ".join(f" w{k}" for k in range(3, 5 + i % 4)),
                "label": i % 2 == 0,
                "example_id": 7 * i,
            }
            for i in range(12)
        ]
    )


def reused(cache: ArtifactCache) -> list[tuple[str, bool]]:
    return [(use.kind, use.reused) for use in cache.uses]


def tokenise(rows: Dataset, cache: ArtifactCache, tmp_path: Path, tokenizer: Any = None, **settings: Any) -> Any:
    args = tiny.config(tmp_path, **settings)
    return tokenized_rows(rows, tokenizer or tiny.tokenizer(), args, "train", encoder_decoder=False, cache=cache)


def test_tokenised_rows_are_the_librarys_own_computed_once(tmp_path) -> None:
    rows = texts().add_column("example_weight", [0.5 + i for i in range(len(texts()))])
    expected, report = prepare_rows(rows, tiny.tokenizer(), tiny.config(tmp_path), "train")
    for known in (False, True):
        cache = ArtifactCache(tmp_path / "cache")
        found, found_report = tokenise(rows, cache, tmp_path)
        assert found.to_dict() == {name: expected[name][:] for name in found.column_names}
        assert set(found.column_names) == set(expected.column_names)
        assert found.features["input_ids"] == expected.features["input_ids"]
        assert found_report == report
        assert reused(cache) == [("tokens", known)]


def test_weights_are_not_in_the_key_and_follow_their_rows(tmp_path) -> None:
    plain = texts()
    cache = ArtifactCache(tmp_path / "cache")
    for factor in (1.0, 2.0):
        rows = plain.add_column("example_weight", [factor * (i + 1) for i in range(len(plain))])
        found, report = tokenise(rows, cache, tmp_path, truncation="drop", max_length=6)
        assert found["example_weight"][:] == [factor * (i // 7 + 1) for i in found["example_id"]]
    assert (report.kept, report.dropped) == (9, 3)
    assert reused(cache) == [("tokens", False), ("tokens", True)]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"max_length": 5}},
        {"settings": {"max_completion_length": 1}},
        {"settings": {"truncation": "keep_end"}},
        {"template": "{{ messages }}"},
        {"rows": {"completion": "w3 w3"}},
        {"rows": {"label": True}},
    ],
)
def test_what_changes_tokenised_rows_is_in_their_key(tmp_path, change) -> None:
    rows = texts()
    cache = ArtifactCache(tmp_path / "cache")
    tokenise(rows, cache, tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = change.get("template", tokenizer.chat_template)
    changed = rows.map(lambda row, index: change.get("rows", {}) if index == 1 else {}, with_indices=True)
    tokenise(changed, cache, tmp_path, tokenizer, **change.get("settings", {}))
    assert reused(cache) == [("tokens", False), ("tokens", False)]


def trainer(source: PolicySource, cache: ArtifactCache, tmp_path: Path, rows: Any = None, **settings: Any) -> Any:
    policy = source.load()
    return SharingTrainer(
        source=source,
        cache=cache,
        model=policy.model,
        args=tiny.config(tmp_path, **settings),
        train_dataset=rows or tiny.rows(12),
        eval_dataset=tiny.rows(12),
        processing_class=policy.tokenizer,
    )


def test_reference_log_probs_are_computed_once_and_are_the_trainers_own(tmp_path, source) -> None:
    first, second = ArtifactCache(tmp_path / "cache"), ArtifactCache(tmp_path / "cache")
    computed = trainer(source, first, tmp_path)
    read = trainer(source, second, tmp_path, beta=0.7, learning_rate=0.3, seed=5)
    assert reused(first) == [("reference-logps", False)] * 2
    assert reused(second) == [("reference-logps", True)] * 2
    for mine, theirs in ((computed, read),):
        assert mine.train_dataset.to_dict() == theirs.train_dataset.to_dict()
        assert mine.eval_dataset.to_dict() == theirs.eval_dataset.to_dict()
    metrics = read.evaluate()
    assert metrics["eval_kl"] == 0.0  # an untrained policy is its reference, to the last bit
    assert metrics["eval_rewards/auc"] == 0.5


@pytest.mark.parametrize("change", ["weights", "dtype", "rows", "batch", "config_overrides"])
def test_what_changes_reference_log_probs_is_in_their_key(tmp_path, source, change) -> None:
    trainer(source, ArtifactCache(tmp_path / "cache"), tmp_path)
    rows, settings = tiny.rows(12), {}
    if change == "weights":
        other = tiny.model()
        other.lm_head.weight.data[0, 0] += 1e-3
        other.save_pretrained(source.name_or_path)
    elif change == "dtype":
        source = replace(source, dtype="bfloat16")
    elif change == "rows":
        rows = rows.map(lambda row, i: {"prompt_length": row["prompt_length"] + (i == 0)}, with_indices=True)
    elif change == "batch":
        settings = {"per_device_train_batch_size": 1}
    else:
        source = replace(source, config_overrides={"rms_norm_eps": 1e-3})
    cache = ArtifactCache(tmp_path / "cache")
    trainer(source, cache, tmp_path, rows, **settings)
    evaluation = change in ("rows", "batch")  # these change the training rows alone
    assert reused(cache) == [("reference-logps", False), ("reference-logps", evaluation)]


def test_two_processes_and_one_share_their_artifacts(bco_lab: Any, environment: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": f"a{i} b", "label": i % 2 == 0} for i in range(40)]
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "generation.count=0"]
    two = ["launcher=ddp", "launcher.num_processes=2", "trainer.per_device_train_batch_size=4"]
    for name, more in (("two", [*two, "trainer.gradient_accumulation_steps=1"]), ("again", two)):
        ended = bco_lab(*settings, *more, "trainer.gradient_accumulation_steps=1", f"hydra.run.dir={name}")
        assert ended.status == 0, ended.err
    uses = [
        [
            (use["kind"], use["reused"])
            for use in json.loads((environment / name / "result.json").read_text())["artifacts"]
        ]
        for name in ("two", "again")
    ]
    kinds = ["tokens", "tokens", "reference-logps", "reference-logps"]
    assert [kind for kind, _ in uses[0]] == kinds
    assert uses[1] == [(kind, True) for kind in kinds]
    first, second = (metrics_of(environment / name) for name in ("two", "again"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_of_two_runs_at_the_same_time_one_computes(start: Any, environment: Path) -> None:
    rows = [{"prompt": f"At once {i}?", "completion": f"a{i} b", "label": i % 2 == 0} for i in range(40)]
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "generation.count=0", "wandb.mode=disabled"]
    names = ("one", "two")
    processes = [start([*settings, f"trainer.beta=0.{i + 1}", f"hydra.run.dir={name}"]) for i, name in enumerate(names)]
    for process in processes:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
    uses = [
        (use["digest"], use["reused"])
        for name in names
        for use in json.loads((environment / name / "result.json").read_text())["artifacts"]
    ]
    assert len({digest for digest, _ in uses}) == 4  # tokens and reference log-probs, of both splits
    assert sorted(reused for _, reused in uses) == [False] * 4 + [True] * 4
