"""Sharded over two processes, a run finds what it finds on one, each holds half, and what it saves loads on one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from accelerate.utils import DistributedType
from distributed import sharded
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from bco_lab import BCOTrainer
from bco_lab.checkpoints import MARKER, last_whole_checkpoint
from bco_lab.distributed import (
    check_reference_under_zero3,
    every_process_computes,
    prepare_reference,
    reference_deepspeed_config,
)

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes left."""
    folder = tmp_path_factory.mktemp("sharded")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [*torchrun, sharded.__file__, str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What they found."""
    found: Results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def flat(rows: list[dict[str, float]]) -> list[float]:
    """The values of equal dicts, one after the other."""
    return [value for row in rows for value in row.values()]


# ---- FSDP2 ----


@pytest.mark.parametrize("name", sharded.SCENARIOS)
def test_two_processes_find_what_one_finds(name: str, results: Results, tmp_path: Path) -> None:
    alone, together = sharded.run(tmp_path, **sharded.SCENARIOS[name]), results[name]
    assert (alone["kind"], together["kind"]) == ("NO", "FSDP")
    assert flat(together["steps"]) == pytest.approx(flat(alone["steps"]), abs=2e-5)
    assert flat(together["evaluations"]) == pytest.approx(flat(alone["evaluations"]), abs=2e-5)
    assert together["logps"] == pytest.approx(alone["logps"], abs=2e-4)
    # the reward moved, and delta with it, but for the reference that is not the policy's own it was 0 before training
    assert abs(together["steps"][-1]["rewards/rejected"]) > 1e-4
    before = together["evaluations"][0]
    assert (before["rewards/chosen"] == before["rewards/rejected"] == 0.0) == (name != "given")


def test_mixed_precision_trains_an_adapter_too(results: Results, tmp_path: Path) -> None:
    alone, together = sharded.run(tmp_path, **sharded.BFLOAT16), results["bfloat16"]
    # FSDP casts weights and averages gradients in bfloat16, autocast casts operations: alike to bfloat16's three digits
    assert flat(together["steps"]) == pytest.approx(flat(alone["steps"]), rel=3e-3, abs=3e-3)
    assert together["steps"][0]["grad_norm"] > 0.5
    assert together["evaluations"][0]["rewards/chosen"] == 0.0


@pytest.mark.parametrize("name", sharded.SCENARIOS)
def test_each_process_holds_half(name: str, results: Results) -> None:
    held = results[name]["held"]
    if "ahead" in name:  # a forward pass has been made: the output head, a tenth of this tiny model, is gathered
        assert 0.5 < held["policy"] < 0.56
    else:
        assert held["policy"] == 0.5
    own = "adapter" in name or "ahead" in name
    assert held["reference"] == held["reference after a forward pass"] == (None if own else 0.5)


@pytest.mark.parametrize("name", [*sharded.SCENARIOS, *sharded.RESUMED.values()])
def test_saved_model_loads_on_one_process(name: str, folder: Path, results: Results) -> None:
    saved = folder / name / "model"
    model: Any
    if "adapter" in name:
        model = PeftModel.from_pretrained(sharded.policy(), saved)
    else:
        model = LlamaForCausalLM.from_pretrained(saved)
        assert model.config.architectures == ["LlamaForCausalLM"]
        assert model.config.tie_word_embeddings == (name == "tied")
    expected = results[name].get("in two", results[name])["logps"]
    assert sharded.logps(model).tolist() == pytest.approx(expected, abs=1e-5)
    assert (sharded.logps(model) - sharded.logps(sharded.policy(tied=name == "tied"))).abs().max() > 1e-3


@pytest.mark.parametrize("name", sharded.RESUMED.values())
def test_resumed_run_ends_where_the_other_ends(name: str, results: Results) -> None:
    found = results[name]
    assert found["in two"] == found["at once"]  # to the last bit
    assert abs(found["at once"]["delta"]) > 0.01


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("FULL_STATE_DICT", ["pytorch_model_fsdp.bin", "model.safetensors"]),
        ("SHARDED_STATE_DICT", ["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp"]),
    ],
)
def test_marker_lists_the_files_of_both_processes(kind: str, weights: list[str], folder: Path) -> None:
    checkpoint = last_whole_checkpoint(folder / sharded.RESUMED[kind])
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    listed = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    assert {*weights, "rng_state_0.pth", "rng_state_1.pth", "reward_shift.json"} <= set(listed)


def test_fsdp1_is_refused(results: Results) -> None:
    assert "FSDP version 1 is not supported: set fsdp_config={'version': 2}" in results["refusal"]


# ---- DeepSpeed ----

ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": 5000,
    "stage3_gather_16bit_weights_on_model_save": "auto",
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}


def policy_config(zero: dict[str, Any]) -> dict[str, Any]:
    """A policy's configuration as users write it."""
    return {
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": zero,
    }


def test_reference_of_a_zero3_policy_is_sharded_for_inference() -> None:
    config = policy_config(ZERO3)
    assert reference_deepspeed_config(config, 64) == {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 4096,  # 64²
            "stage3_prefetch_bucket_size": 3686,  # 0.9 · 64², a whole number
            "stage3_param_persistence_threshold": 5000,  # the user's own
            "offload_param": {"device": "cpu"},
        },
    }
    assert config == policy_config(ZERO3)


def test_buckets_stay_open_for_a_model_without_a_width() -> None:
    zero = reference_deepspeed_config(policy_config(ZERO3), None)["zero_optimization"]
    assert zero == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 5000,
        "offload_param": {"device": "cpu"},
    }


@pytest.mark.parametrize("zero", [{"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"stage": 1}, {}])
def test_reference_of_other_policies_is_whole(zero: dict[str, Any]) -> None:
    assert reference_deepspeed_config(policy_config(zero), 64)["zero_optimization"] == {"stage": 0}
    assert reference_deepspeed_config({}, 64) == {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
    }


def test_reference_becomes_an_engine_without_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def initialize(*, model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, None, None, None]:
        made.append(config)
        return nn.Sequential(model), None, None, None

    deepspeed = ModuleType("deepspeed")
    deepspeed.initialize = initialize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    plugin = SimpleNamespace(deepspeed_config=policy_config(ZERO3))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    model = tiny.model()
    engine = prepare_reference(accelerator, model)
    assert isinstance(engine, nn.Sequential)
    assert engine[0] is model
    assert not engine.training
    assert made == [reference_deepspeed_config(policy_config(ZERO3), 32)]


class Zero3:
    """As much of transformers' HfDeepSpeedConfig as says that ZeRO-3 is on."""

    def is_zero3(self) -> bool:
        return True


@pytest.fixture
def zero3() -> Iterator[None]:
    """What transformers takes for ZeRO-3 being on; it asks the configuration that was made last."""
    config = Zero3()  # held here: transformers holds it weakly
    set_hf_deepspeed_config(config)
    yield
    unset_hf_deepspeed_config()


@pytest.mark.usefixtures("zero3")
def test_zero3_runs_every_forward_pass_on_every_process() -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    assert every_process_computes(accelerator)


@pytest.mark.parametrize(("adapter", "precompute"), [(False, False), (False, True), (True, True)])
def test_zero3_refuses_a_reference_it_cannot_have(adapter: bool, precompute: bool, zero3: None) -> None:
    way_out = "set precompute_ref_log_probs=False" if adapter else "train an adapter"
    with pytest.raises(ValueError, match=f"pass ref_model .* or {way_out}"):
        check_reference_under_zero3(adapter=adapter, precompute=precompute)
    check_reference_under_zero3(adapter=True, precompute=False)
    unset_hf_deepspeed_config()
    check_reference_under_zero3(adapter=adapter, precompute=precompute)


@pytest.mark.usefixtures("zero3")
def test_zero3_refuses_before_weights_are_read(tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(ValueError, match="under DeepSpeed ZeRO-3"):
        BCOTrainer(
            model=str(tmp_path),
            args=tiny.config(tmp_path / "run"),
            train_dataset=tiny.rows(8),
            processing_class=tiny.tokenizer(),
        )
