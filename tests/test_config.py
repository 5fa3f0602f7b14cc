import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, get_origin

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from bco_lab import BCOConfig

OWN_FIELDS = {name for name, annotation in BCOConfig.__annotations__.items() if get_origin(annotation) is not ClassVar}


def config(folder: Path, **settings: Any) -> BCOConfig:
    return BCOConfig(output_dir=str(folder), **settings)


def parsed(folder: Path, *arguments: str) -> BCOConfig:
    (made,) = HfArgumentParser(BCOConfig).parse_args_into_dataclasses(["--output_dir", str(folder), *arguments])
    return made


def test_defaults_are_the_papers_and_those_of_trl(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert {name: getattr(made, name) for name in OWN_FIELDS - {"bf16"}} == {
        "learning_rate": 5e-7,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "max_completion_length": None,
        "truncation": "keep_start",
        "beta": 0.1,
        "reward_shift": "ema",
        "reward_shift_decay": 0.9,
        "loss_reduction": "class_balanced",
        "disable_dropout": True,
        "generate_during_eval": False,
        "is_encoder_decoder": None,
        "precompute_ref_log_probs": False,
        "model_init_kwargs": None,
        "trust_remote_code": False,
        "dataset_num_proc": None,
        "prompt_sample_size": 1024,
        "min_density_ratio": 0.5,
        "max_density_ratio": 10.0,
    }


def test_everything_else_is_as_transformers_has_it(tmp_path: Path) -> None:
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    changed = {
        field.name
        for field in dataclasses.fields(BCOConfig)
        if field.name in theirs and field.default != theirs[field.name].default
    }
    assert changed == OWN_FIELDS & theirs.keys()
    assert config(tmp_path).seed == TrainingArguments(output_dir=str(tmp_path)).seed == 42


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.0}, r"beta=0\.0 must be > 0"),
        ({"beta": -0.1}, r"beta=-0\.1 must be > 0"),
        ({"beta": math.nan}, r"beta=nan must be a finite number"),
        ({"reward_shift": "mean"}, r"reward_shift=mean must be one of ema, trl, zero"),
        ({"reward_shift_decay": 1.0}, r"reward_shift_decay=1\.0 must be in \[0, 1\)"),
        ({"reward_shift_decay": -0.5}, r"reward_shift_decay=-0\.5 must be in \[0, 1\)"),
        ({"loss_reduction": "sum"}, r"loss_reduction=sum must be one of class_balanced, pooled"),
        ({"truncation": "left"}, r"truncation=left must be one of keep_start, keep_end, drop"),
        ({"max_length": 0}, r"max_length=0 must be >= 2 or null"),
        ({"max_completion_length": -1}, r"max_completion_length=-1 must be >= 1 or null"),
        ({"dataset_num_proc": 0}, r"dataset_num_proc=0 must be >= 1 or null"),
        ({"prompt_sample_size": 1}, r"prompt_sample_size=1 must be >= 2"),
        ({"min_density_ratio": 0.0}, r"min_density_ratio=0\.0 must be in \(0, max_density_ratio=10\.0\]"),
        ({"min_density_ratio": 20.0}, r"min_density_ratio=20\.0 must be in \(0, max_density_ratio=10\.0\]"),
        ({"max_density_ratio": 0.25}, r"min_density_ratio=0\.5 must be in \(0, max_density_ratio=0\.25\]"),
    ],
)
def test_a_value_out_of_range_names_field_value_and_rule(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(tmp_path, **setting)


def test_the_ends_of_the_ranges_are_allowed(tmp_path: Path) -> None:
    made = config(
        tmp_path,
        reward_shift_decay=0.0,
        max_length=2,
        max_completion_length=1,
        dataset_num_proc=1,
        min_density_ratio=2.0,
        max_density_ratio=2.0,
    )
    assert (made.reward_shift_decay, made.max_length, made.max_completion_length) == (0.0, 2, 1)
    assert config(tmp_path, max_length=None).max_length is None


@pytest.mark.parametrize("kind", ["ema", "trl", "zero"])
@pytest.mark.parametrize("reduction", ["class_balanced", "pooled"])
def test_every_known_choice_is_allowed(tmp_path: Path, kind: str, reduction: str) -> None:
    made = config(tmp_path, reward_shift=kind, loss_reduction=reduction)
    assert (made.reward_shift, made.loss_reduction) == (kind, reduction)


# ---- activation checkpointing: one switch under two names, and no warning (warnings are errors here) ----


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_either_name_switches_activation_checkpointing(tmp_path: Path, name: str, value: bool) -> None:
    made = config(tmp_path, **{name: value})
    assert (made.gradient_checkpointing, made.activation_checkpointing) == (value, value)


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_either_name_passes_its_arguments(tmp_path: Path, name: str) -> None:
    made = config(tmp_path, **{name: {"use_reentrant": False}})
    assert made.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert made.activation_checkpointing is True


def test_the_new_switch_goes_with_the_old_name_of_its_arguments(tmp_path: Path) -> None:
    made = config(tmp_path, activation_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert made.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_a_copy_keeps_the_switch(tmp_path: Path) -> None:
    made = config(tmp_path, gradient_checkpointing=False, max_length=None)
    for copied in (dataclasses.replace(made, beta=0.3), BCOConfig(**made.to_dict() | {"beta": 0.3})):
        assert (copied.gradient_checkpointing, copied.activation_checkpointing) == (False, False)
        assert (copied.beta, copied.max_length, copied.learning_rate) == (0.3, None, 5e-7)


# ---- bf16 ----


def test_bf16_is_off_on_a_cpu_unless_asked_for(tmp_path: Path) -> None:
    assert config(tmp_path, use_cpu=True).bf16 is False
    assert config(tmp_path, use_cpu=True, bf16=True).bf16 is True


def test_bf16_unset_follows_the_device_and_yields_to_fp16(tmp_path: Path) -> None:
    accelerated = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    assert config(tmp_path).bf16 is bool(accelerated or torch.xpu.is_available())
    assert (config(tmp_path, fp16=True).bf16, config(tmp_path, fp16=True).fp16) == (False, True)
    assert config(tmp_path, bf16=False).bf16 is False


# ---- the command line of HfArgumentParser ----


def test_every_field_of_ours_has_a_help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        HfArgumentParser(BCOConfig).parse_args_into_dataclasses(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(BCOConfig) if field.name in OWN_FIELDS}
    assert texts.keys() == OWN_FIELDS
    assert len(set(texts.values())) == len(texts) == 22
    for name, text in texts.items():
        assert f"--{name} " in shown
        assert text in shown


def test_arguments_arrive_with_their_types(tmp_path: Path) -> None:
    made = parsed(
        tmp_path,
        *("--beta", "0.3", "--max_length", "64", "--reward_shift", "trl", "--loss_reduction", "pooled"),
        *("--reward_shift_decay", "0.5", "--max_completion_length", "8", "--truncation", "drop"),
        *("--gradient_checkpointing", "False", "--bf16", "False", "--disable_dropout", "False"),
        *("--precompute_ref_log_probs", "--model_init_kwargs", '{"dtype": "float32"}', "--dataset_num_proc", "2"),
        *("--generate_during_eval", "--is_encoder_decoder", "False", "--prompt_sample_size", "64"),
        *("--min_density_ratio", "0.25", "--max_density_ratio", "4", "--learning_rate", "1e-5"),
    )
    assert (made.beta, made.max_length, made.reward_shift, made.loss_reduction) == (0.3, 64, "trl", "pooled")
    assert (made.reward_shift_decay, made.max_completion_length, made.truncation) == (0.5, 8, "drop")
    assert (made.gradient_checkpointing, made.activation_checkpointing, made.bf16) == (False, False, False)
    assert (made.disable_dropout, made.precompute_ref_log_probs, made.dataset_num_proc) == (False, True, 2)
    assert (made.generate_during_eval, made.is_encoder_decoder, made.prompt_sample_size) == (True, False, 64)
    assert made.model_init_kwargs == {"dtype": "float32"}
    assert (made.min_density_ratio, made.max_density_ratio, made.learning_rate) == (0.25, 4.0, 1e-5)


def test_an_empty_command_line_gives_the_defaults(tmp_path: Path) -> None:
    ignored = {"logging_dir"}
    given, default = (
        {name: value for name, value in made.to_dict().items() if name not in ignored}
        for made in (parsed(tmp_path), config(tmp_path))
    )
    assert given == default


def test_a_bad_value_on_the_command_line_is_refused_with_its_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^beta=-1\.0 must be > 0$"):
        parsed(tmp_path, "--beta", "-1")


def test_the_compatibility_recipe_can_be_overridden(tmp_path: Path) -> None:
    made = BCOConfig.like_trl(output_dir=str(tmp_path), beta=0.2)
    assert (made.reward_shift, made.loss_reduction, made.train_sampling_strategy) == ("trl", "pooled", "sequential")
    assert (made.beta, made.learning_rate) == (0.2, 5e-7)
    assert BCOConfig.like_trl(output_dir=str(tmp_path), reward_shift="zero").reward_shift == "zero"


def test_a_dtype_object_survives_saving_as_json(tmp_path: Path) -> None:
    made = config(tmp_path, model_init_kwargs={"dtype": torch.bfloat16})
    assert '"dtype": "bfloat16"' in made.to_json_string()
