"""Side by side: what policy and reference write during an evaluation."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import wandb
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from bco_lab import BCOTrainer
from bco_lab.eval_samples import EvalSample, choose_rows, complete_rows, prompt_ids, track_samples

COLUMNS = ["example_id", "label", "prompt", "policy", "reference"]


def trainer(folder: Path, evaluation: Any, *, lora: bool = False, **settings: Any) -> BCOTrainer:
    asked: dict[str, Any] = {
        "generate_during_eval": True,
        "learning_rate": 0.3,
        "beta": 1.0,
        "max_completion_length": 6,
    }
    return BCOTrainer(
        model=tiny.model(initializer_range=0.5),
        args=tiny.config(folder, **{**asked, **settings}),
        train_dataset=tiny.rows(16),
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def written(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "eval_samples" / name).read_text().splitlines()]


# ---- the choice ----


def test_the_choice_is_fixed_by_the_seed_and_has_both_labels() -> None:
    rows = tiny.rows(60, up_every=30)
    chosen = choose_rows(rows, seed=1)
    assert [row["example_id"] for row in chosen] == [row["example_id"] for row in choose_rows(rows, seed=1)]
    assert len(chosen) == 8
    assert {row["label"] for row in chosen} == {True, False}
    assert choose_rows(rows, seed=2) != chosen
    streamed = choose_rows(rows.to_iterable_dataset(), seed=1)
    assert [row["example_id"] for row in streamed] == [row["example_id"] for row in chosen]


@pytest.mark.parametrize(("count", "up_every"), [(1, 1), (1, 100), (5, 1), (3, 100), (2, 2)])
def test_small_and_one_sided_sets_serve_as_they_are(count: int, up_every: int) -> None:
    rows = tiny.rows(count, up_every=up_every)
    assert [row["example_id"] for row in choose_rows(rows, seed=0)] == rows["example_id"][:]


def test_a_row_without_prompt_tokens_is_left_out() -> None:
    rows = [dict(row) for row in tiny.rows(3)]
    rows[1]["prompt_length"] = 0
    assert [row["example_id"] for row in choose_rows(Dataset.from_list(rows), seed=0)] == [100, 102]


def test_completions_keep_to_the_limits() -> None:
    rows = list(tiny.rows(4))  # prompts of 2, 3, 4 and 2 tokens
    model = tiny.model(initializer_range=0.5)
    limits = {"max_length": 5, "max_completion_length": None, "seed": 0, "progress": False}
    texts = complete_rows(model, tiny.tokenizer(), rows, **limits)
    for text, room in zip(texts, (3, 2, 1, 3), strict=True):
        assert len(text.split()) <= room
    assert max(len(text.split()) for text in texts) == 3
    short = complete_rows(model, tiny.tokenizer(), rows, **{**limits, "max_length": 2, "max_completion_length": 4})
    assert all(len(text.split()) <= 1 for text in short)


def test_completions_end_where_the_model_knows_no_more_positions() -> None:
    rows = list(tiny.rows(4))  # prompts of 2, 3, 4 and 2 tokens
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 12}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    words = tiny.tokenizer()
    words.eos_token = None  # nothing ends a completion early
    unlimited = {"max_length": None, "max_completion_length": None, "seed": 0, "progress": False}
    with torch.no_grad():
        model.transformer.wte.weight[:2] = 0.0
        model.transformer.ln_f.bias.copy_(20 * model.transformer.wte.weight[2])  # w2, not <pad>, which is not shown
    texts = complete_rows(model, words, rows, **unlimited)
    assert [len(text.split()) for text in texts] == [10, 9, 8, 10]
    few = complete_rows(tiny.model(max_position_embeddings=4), words, rows[2:3], **unlimited)
    assert len(few[0].split()) <= 1  # the prompt fills all four


# ---- in the trainer ----


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_policy_and_reference_are_sampled_alike_until_training_parts_them(
    tmp_path: Path, lora: bool, precompute: bool
) -> None:
    held_out = tiny.rows(12, seed=1)
    trained = trainer(tmp_path, held_out, lora=lora, precompute_ref_log_probs=precompute)
    trained.evaluate()
    trained.train()
    trained.evaluate()
    before, after = written(tmp_path, "eval-step-000000.jsonl"), written(tmp_path, "eval-step-000003.jsonl")
    assert [row["reference"] for row in before] == [row["policy"] for row in before]
    assert [row["reference"] for row in after] == [row["reference"] for row in before]
    assert [row["policy"] for row in after] != [row["policy"] for row in before]
    assert {row["label"] for row in after} == {True, False}
    # the reference is the model that training began with
    expected = complete_rows(
        tiny.model(initializer_range=0.5),
        tiny.tokenizer(),
        choose_rows(held_out, seed=42),
        max_length=1024,
        max_completion_length=6,
        seed=42,
        progress=False,
    )
    assert [row["reference"] for row in after] == expected
    assert after[0].keys() == set(COLUMNS)
    chosen = choose_rows(held_out, seed=42)
    assert [row["prompt"] for row in after] == [tiny.tokenizer().decode(prompt_ids(row)) for row in chosen]


def test_sampling_leaves_training_as_it_was(tmp_path: Path) -> None:
    weights = []
    for sampling in (True, False):
        trained = trainer(
            tmp_path / str(sampling),
            tiny.rows(5, seed=1),
            lora=True,
            generate_during_eval=sampling,
            eval_strategy="steps",
            eval_steps=1,
            gradient_checkpointing=True,
        )
        trained.train()
        weights.append(tiny.weights(trained))
    assert torch.equal(weights[0], weights[1])
    assert len(list((tmp_path / "True" / "eval_samples").iterdir())) == 3
    assert not (tmp_path / "False" / "eval_samples").exists()


def test_each_set_has_a_file_and_rows_that_come_too_late_have_no_reference(tmp_path: Path) -> None:
    sets = {"one": tiny.rows(1, seed=1), "bad": tiny.rows(3, seed=2, up_every=100).select([1, 2])}
    trained = trainer(tmp_path, sets)
    trained.train()
    trained.evaluate()
    assert len(written(tmp_path, "eval_one-step-000003.jsonl")) == 1
    assert [row["label"] for row in written(tmp_path, "eval_bad-step-000003.jsonl")] == [False, False]
    late = tiny.rows(4, seed=9, ref_logps=[-20.0] * 4)
    trained.evaluate(late)
    rows = written(tmp_path, "eval-step-000003.jsonl")
    assert [row["reference"] for row in rows] == [None] * 4
    assert all(row["policy"] for row in rows)


def test_rows_that_bring_their_reference_log_probs_are_sampled_by_the_untrained_policy(tmp_path: Path) -> None:
    ahead = {"ref_logps": [-20.0] * 16}
    trained = BCOTrainer(
        model=tiny.model(initializer_range=0.5),
        args=tiny.config(
            tmp_path,
            generate_during_eval=True,
            max_completion_length=6,
            precompute_ref_log_probs=False,
            eval_strategy="steps",
            eval_steps=3,
            learning_rate=0.3,
        ),
        train_dataset=tiny.rows(16, **ahead),
        eval_dataset=tiny.rows(16, seed=1, **ahead),
        processing_class=tiny.tokenizer(),
    )
    trained.train()
    rows = written(tmp_path, "eval-step-000003.jsonl")
    assert all(row["reference"] for row in rows)
    assert [row["reference"] for row in rows] != [row["policy"] for row in rows]


# ---- trackers ----


def test_weights_and_biases_receives_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    try:
        trained = trainer(tmp_path, tiny.rows(6, seed=1), report_to="none")
        trained.args.report_to = ["wandb"]
        trained.evaluate()
        (file,) = Path(run.dir).glob("media/table/eval/samples*.json")
        table = json.loads(file.read_text())
    finally:
        run.finish()
    assert table["columns"] == COLUMNS
    assert table["data"] == [list(row.values()) for row in written(tmp_path, "eval-step-000000.jsonl")]


def test_comet_receives_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, Any, Any]] = []

    class Experiment:
        """Takes tables as Comet's experiments do; Comet itself has no run without an account."""

        def log_table(self, filename: str, tabular_data: Any = None, headers: Any = False) -> None:
            received.append((filename, tabular_data, headers))

    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(get_running_experiment=Experiment))
    samples = [EvalSample(3, True, "w2 w3", "w4", "w5"), EvalSample(4, False, "w6", "w7", None)]
    track_samples(samples, ["comet_ml"], "eval_one", 20)
    track_samples(samples, ["wandb"], "eval_one", 20)  # nobody has opened a run there
    table = [[3, True, "w2 w3", "w4", "w5"], [4, False, "w6", "w7", None]]
    assert received == [("eval_one-samples-step-000020.csv", table, COLUMNS)]


def test_a_tracker_that_fails_is_reported_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        track_samples([], ["comet_ml"], "eval", 7)  # not installed here
    assert "comet_ml did not take the samples of step 7: No module named 'comet_ml'" in caplog.text
