"""Two processes compute what one computes."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import metrics_of
from safetensors.torch import load_file

# 22 rows in steps of 8: the last step of an epoch is filled up on two processes, and must not count the filling.
ONE = "trainer.gradient_accumulation_steps=1"
SETTINGS = [
    "model=tiny_llama",
    "dataset=movie_reviews",
    "dataset.train_size=22",
    "dataset.eval_size=14",
    "dataset.judge_size=0",
    "wandb.mode=disabled",
    "generation.count=1",
    "trainer.learning_rate=0.01",
    "trainer.max_steps=5",
    "trainer.logging_steps=1",
    "trainer.beta=0.5",
]


@pytest.mark.parametrize("reduction", ["class_balanced", "pooled"])
def test_two_processes_equal_one(bco_lab: Any, environment: Path, reduction: str) -> None:
    settings = [*SETTINGS, f"trainer.loss_reduction={reduction}"]
    one = bco_lab(*settings, "hydra.run.dir=one", "trainer.per_device_train_batch_size=8", ONE)
    assert one.status == 0, one.err
    ddp = ["launcher=ddp", "launcher.num_processes=2", "trainer.per_device_train_batch_size=2"]
    two = bco_lab(*settings, "hydra.run.dir=two", *ddp, "trainer.gradient_accumulation_steps=2")
    assert two.status == 0, two.err

    alone, together = (metrics_of(environment / name) for name in ("one", "two"))
    assert [row["step"] for row in together] == [1, 2, 3, 4, 5]
    assert [row["count/chosen"] + row["count/rejected"] for row in together] == [8, 8, 6, 8, 8]
    for key in ("loss", "delta", "grad_norm", "rewards/chosen", "rewards/rejected", "kl"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], abs=2e-5), key
    assert alone[-1]["delta"] != 0
    first, second = (json.loads((environment / name / "result.json").read_text()) for name in ("one", "two"))
    assert second["metrics"]["after"]["count/chosen"] + second["metrics"]["after"]["count/rejected"] == 14
    assert second["metrics"]["after"]["loss"] == pytest.approx(first["metrics"]["after"]["loss"], abs=1e-5)
    assert second["delta"] == pytest.approx(first["delta"], abs=1e-6)
    a, b = (load_file(environment / name / "model" / "adapter_model.safetensors") for name in ("one", "two"))
    # AdamW turns rounding of a gradient near 0 into a step of full length, so the vectors agree as wholes
    apart = sum((a[k] - b[k]).square().sum().item() for k in a)
    assert apart / sum(a[k].square().sum().item() for k in a) < 1e-6


def test_a_worker_that_fails_is_reported(bco_lab: Any, environment: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "a", "completion": "b", "label": 1}\n' * 4)
    ended = bco_lab("model=tiny_llama", "launcher=ddp", "dataset=unpaired", f"dataset.path={log}", "hydra.run.dir=run")
    assert ended.status == 2
    assert "only one class present" in ended.err
    assert "a worker failed with status" in ended.err
    assert not (environment / "run" / "result.json").exists()
