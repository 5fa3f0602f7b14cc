"""`launcher=fsdp`: two processes that share one model compute what one process computes."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import metrics_of
from safetensors.torch import load_file

from bco_lab.app.launch import ShardedLauncher

SETTINGS = [
    "model=tiny_llama",
    "model/adapter=none",
    "dataset=movie_reviews",
    "dataset.train_size=16",
    "dataset.eval_size=9",
    "dataset.judge_size=0",
    "wandb.mode=disabled",
    "generation.count=3",
    "generation.max_new_tokens=4",
    "trainer.learning_rate=0.01",
    "trainer.max_steps=3",
    "trainer.warmup_steps=0",
    "trainer.logging_steps=1",
    "trainer.beta=0.5",
    "trainer.precompute_ref_log_probs=false",
    "trainer.gradient_accumulation_steps=1",
]


def test_sharded_run_equals_a_whole_one(bco_lab: Any, environment: Path) -> None:
    one = bco_lab(*SETTINGS, "hydra.run.dir=one", "trainer.per_device_train_batch_size=8")
    assert one.status == 0, one.err
    two = bco_lab(*SETTINGS, "hydra.run.dir=two", "launcher=fsdp", "trainer.per_device_train_batch_size=4")
    assert two.status == 0, two.err

    alone, together = (metrics_of(environment / name) for name in ("one", "two"))
    assert [row["step"] for row in together] == [1, 2, 3]
    for key in ("loss", "delta", "grad_norm", "rewards/chosen", "rewards/rejected", "kl"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], rel=1e-4, abs=5e-5), key
    assert alone[-1]["delta"] != 0
    first, second = (json.loads((environment / name / "result.json").read_text()) for name in ("one", "two"))
    assert second["metrics"]["after"]["count/chosen"] + second["metrics"]["after"]["count/rejected"] == 9
    assert second["metrics"]["after"]["loss"] == pytest.approx(first["metrics"]["after"]["loss"], abs=5e-5)
    assert [pair["before"] for pair in second["samples"]["pairs"]] == [
        pair["before"] for pair in first["samples"]["pairs"]
    ]
    a, b = (load_file(environment / name / "model" / "model.safetensors") for name in ("one", "two"))
    # gathered one by one, the two names of a tied matrix come as two copies
    assert b.pop("lm_head.weight").equal(b["model.embed_tokens.weight"])
    assert {name: weight.shape for name, weight in a.items()} == {name: weight.shape for name, weight in b.items()}
    apart = sum((a[k] - b[k]).square().sum().item() for k in a)
    assert apart / sum(a[k].square().sum().item() for k in a) < 1e-6
    # the checkpoints of FSDP bring its own copy of the weights
    assert list((environment / "two" / "checkpoints").rglob("pytorch_model_fsdp.bin"))


def test_one_process_has_nothing_to_split() -> None:
    with pytest.raises(ValueError, match="num_processes=1 must be >= 2"):
        ShardedLauncher(num_processes=1)
