"""The library script runs, and its options are those of BCOConfig."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from bco_lab import BCOConfig

SCRIPT = Path(__file__).parents[1] / "examples" / "bco.py"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, as `save_pretrained` leaves them."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    """24 rows: completions of w2 and w3 are desirable, of w4 and w5 undesirable."""
    rows = [
        {
            "prompt": f"w{10 + i % 8} w{20 + i % 5}",
            "completion": " w2 w3 w2" if i % 2 else " w4 w5 w4",
            "label": bool(i % 2),
        }
        for i in range(24)
    ]
    path = tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **options: Any) -> Path:
    """Run the script with small sizes and return its output folder."""
    settings = {
        "output_dir": tmp_path / "out",
        "max_steps": 12,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.03,
        "logging_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(f"--{name}={value}" for name, value in settings.items())])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return tmp_path / "out"


def numbers(path: Path) -> dict[str, float]:
    """A JSON file of metrics."""
    content: dict[str, float] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("use_peft", [False, True])
def test_script_trains_evaluates_and_saves(
    use_peft: bool, model_folder: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_script(
        monkeypatch,
        tmp_path,
        model_name_or_path=model_folder,
        dataset=feedback,
        train_split="train[:18]",
        eval_split="train[18:]",
        use_peft=use_peft,
    )
    metrics = numbers(out / "eval_results.json")
    assert metrics["eval_count/chosen"] == 3
    assert metrics["eval_count/rejected"] == 3
    assert 0.5 < metrics["eval_rewards/accuracies"] <= 1
    assert metrics["eval_rewards/auc"] == 1  # words tell the classes apart
    assert metrics["eval_rewards/margins"] > 0
    assert numbers(out / "trainer_state.json")["global_step"] == 12
    assert numbers(out / "train_results.json")["train_loss"] < 1.38

    base = AutoModelForCausalLM.from_pretrained(model_folder if use_peft else out)
    model = PeftModel.from_pretrained(base, out) if use_peft else base
    ids = torch.tensor([[10, 20, 2, 3, 2, 1]])
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    good = [torch.log_softmax(m(input_ids=ids).logits, -1)[0, 1, 2].item() for m in (before, model)]
    bad = [torch.log_softmax(m(input_ids=ids).logits, -1)[0, 1, 4].item() for m in (before, model)]
    assert good[1] - bad[1] > good[0] - bad[0]
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny.tokenizer().get_vocab()

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == ("peft" if use_peft else "transformers")
    assert "`feedback.jsonl`: 18 rows, 9 desirable (50%) and 9 undesirable (50%)." in card.text
    assert str(tmp_path) not in card.content


def test_a_file_of_its_own_to_evaluate_on(
    model_folder: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held_out.csv"
    Dataset.from_list([json.loads(line) for line in feedback.read_text().splitlines()[:5]]).to_csv(held_out)
    out = run_script(
        monkeypatch, tmp_path, model_name_or_path=model_folder, dataset=feedback, eval_dataset=held_out, max_steps=1
    )
    metrics = numbers(out / "eval_results.json")
    assert (metrics["eval_count/chosen"], metrics["eval_count/rejected"]) == (2, 3)


def test_embeddings_are_means_over_tokens_without_padding(model_folder: Path) -> None:
    embed = runpy.run_path(str(SCRIPT))["mean_pooling"](str(model_folder))
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    embeddings = embed(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    alone = tiny.model().model.eval()(input_ids=ids[:1, :3]).last_hidden_state[0]
    torch.testing.assert_close(embeddings[0], alone.mean(dim=0))
    torch.testing.assert_close(embeddings[1], tiny.model().model.eval()(input_ids=ids[1:])[0][0].mean(dim=0))


# ---- BCOConfig on a command line ----


def test_every_field_is_an_option_with_help() -> None:
    actions = {action.dest: action for action in HfArgumentParser(BCOConfig)._actions}
    fields = [f.name for f in dataclasses.fields(BCOConfig) if f.init]
    assert {"beta", "reward_shift", "truncation", "prompt_sample_size", "learning_rate"} <= set(fields)
    assert [name for name in fields if not (actions[name].help or "").strip()] == []
    text = HfArgumentParser(BCOConfig).format_help()  # a bare % in a help text would raise
    assert "--reward_shift_decay" in text


def test_options_become_settings(tmp_path: Path) -> None:
    command = (
        f"--output_dir {tmp_path} --beta 0.3 --reward_shift trl --reward_shift_decay 0.5 --loss_reduction pooled "
        "--gradient_checkpointing false --disable_dropout False --generate_during_eval --precompute_ref_log_probs true "
        "--max_length 64 --max_completion_length 16 --truncation keep_end --is_encoder_decoder true "
        "--trust_remote_code --dataset_num_proc 2 --prompt_sample_size 32 --min_density_ratio 0.2 "
        "--max_density_ratio 5 --learning_rate 1e-4 --logging_steps 0.5 --bf16 false"
    )
    kwargs = ["--model_init_kwargs", '{"dtype": "bfloat16", "revision": "main"}']
    (config,) = HfArgumentParser(BCOConfig).parse_args_into_dataclasses([*command.split(), *kwargs])
    expected = {
        "beta": 0.3,
        "reward_shift": "trl",
        "reward_shift_decay": 0.5,
        "loss_reduction": "pooled",
        "disable_dropout": False,
        "generate_during_eval": True,
        "precompute_ref_log_probs": True,
        "max_length": 64,
        "max_completion_length": 16,
        "truncation": "keep_end",
        "is_encoder_decoder": True,
        "trust_remote_code": True,
        "dataset_num_proc": 2,
        "prompt_sample_size": 32,
        "min_density_ratio": 0.2,
        "max_density_ratio": 5.0,
        "learning_rate": 1e-4,
        "logging_steps": 0.5,
        "bf16": False,
        "model_init_kwargs": {"dtype": "bfloat16", "revision": "main"},
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert not config.gradient_checkpointing
    assert not config.activation_checkpointing


def test_defaults_of_the_command_line_are_those_of_the_class(tmp_path: Path) -> None:
    (parsed,) = HfArgumentParser(BCOConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert parsed.to_dict() == BCOConfig(output_dir=str(tmp_path)).to_dict()


def test_an_option_out_of_range_names_field_and_rule() -> None:
    with pytest.raises(ValueError, match=r"reward_shift=mean must be one of ema, trl, zero"):
        HfArgumentParser(BCOConfig).parse_args_into_dataclasses(["--reward_shift", "mean"])


def test_script_weights_rows_by_their_prompts(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"w{10 + i % 3 + (20 if i % 4 == 0 else 0)}", "completion": " w2", "label": i % 2} for i in range(48)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run_script(
        monkeypatch,
        tmp_path,
        model_name_or_path=model_folder,
        dataset=path,
        embedding_model=model_folder,
        max_density_ratio=3.0,
    )
    assert ", weighted." in (out / "README.md").read_text()
    logs = [row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    weights = [row["udm/weight_mean"] for row in logs]
    # half of the undesirable rows have a prompt of which no desirable row has one: their weight is the lower bound
    assert len(weights) == 3
    assert all(0.5 < weight < 3.0 for weight in weights)
    assert len(set(weights)) > 1
