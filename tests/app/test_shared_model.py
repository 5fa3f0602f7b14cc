"""One base model for all trials of a sweep in one process."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from runs import TINY, write_log

from bco_lab.app import shared_model
from bco_lab.app.shared_model import checksum, load_policy, release
from bco_lab.models import PolicySource


@pytest.fixture
def source(tmp_path: Path) -> PolicySource:
    shared_model.forget()
    folder = tmp_path / "policy"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return PolicySource(name_or_path=str(folder), peft=LoraConfig(task_type="CAUSAL_LM", r=4))


def train(policy: Any, *, touch_base: bool = False) -> Any:
    """A model whose adapter has moved."""
    model = get_peft_model(policy.model, policy.peft_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (touch_base and "embed_tokens" in name):
                parameter += 1e-3
    return model


def test_the_next_trial_gets_the_same_base_model_untouched(tmp_path, source) -> None:
    args = tiny.config(tmp_path)
    first = load_policy(source, args)
    before, logits = checksum(first.model), first.model(torch.tensor([[3, 4, 5]])).logits
    release(train(first))
    second = load_policy(replace(source, peft=LoraConfig(task_type="CAUSAL_LM", r=8)), args)
    assert second.model is first.model
    assert checksum(second.model) == before
    assert not any("lora" in name for name, _ in second.model.named_parameters())
    assert torch.equal(second.model(torch.tensor([[3, 4, 5]])).logits, logits)
    assert second.peft_config.r == 8


def test_a_base_model_that_was_changed_is_not_used_again(tmp_path, source, caplog) -> None:
    args = tiny.config(tmp_path)
    first = load_policy(source, args)
    with caplog.at_level(logging.WARNING, "bco_lab"):
        release(train(first, touch_base=True))
    assert "have changed during training" in caplog.text
    second = load_policy(source, args)
    assert second.model is not first.model
    assert checksum(second.model) == checksum(tiny.model())


@pytest.mark.parametrize("change", ["dtype", "weights", "dropout", "no adapter", "not released"])
def test_another_model_is_loaded_anew(tmp_path, source, change) -> None:
    args = tiny.config(tmp_path)
    first = load_policy(source, args)
    if change != "not released":
        release(train(first))
    if change == "dtype":
        source = replace(source, dtype="bfloat16")
    elif change == "weights":
        tiny.model(seed=1).save_pretrained(source.name_or_path)
    elif change == "dropout":
        args = tiny.config(tmp_path, disable_dropout=False)
    elif change == "no adapter":
        source = replace(source, peft=None)
    else:
        shared_model.forget()  # what an error in the middle of a training leads to
    assert load_policy(source, args).model is not first.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checksum_sees_the_last_bit_of_one_weight(dtype) -> None:
    model = torch.nn.Linear(64, 64).to(dtype)
    before = checksum(model)
    with torch.no_grad():
        words = model.weight.view(torch.int32 if dtype is torch.float32 else torch.int16)
        words[7, 9] ^= 1
    changed = checksum(model)
    with torch.no_grad():
        words[7, 9] ^= 1
    assert changed != before == checksum(model)


def test_a_trial_after_another_ends_like_one_alone(bco_lab: Any, environment: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": f"answer {i}", "label": i % 3 == 0} for i in range(40)]
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "wandb.mode=disabled"]
    swept = bco_lab("-m", *settings, "trainer.beta=0.1,0.3", "hydra.sweep.dir=sweep")
    assert swept.status == 0, swept.err
    assert swept.err.count("The base model is still in memory") == 1
    shared_model.forget()
    alone = bco_lab(*settings, "trainer.beta=0.3", "hydra.run.dir=fresh")
    assert alone.status == 0, alone.err
    assert "The base model is still in memory" not in alone.err
    found = [
        json.loads((environment / name / "result.json").read_text()) for name in ("sweep/trainer.beta=0.3", "fresh")
    ]
    assert found[0]["delta"] == found[1]["delta"]
    assert found[0]["samples"] == found[1]["samples"]
    weights = [
        environment / name / "model" / "adapter_model.safetensors" for name in ("sweep/trainer.beta=0.3", "fresh")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
