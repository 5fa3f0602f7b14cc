"""Runs whose weights are split over the processes, if there are several; started by torchrun it writes their results.

torchrun --standalone --nproc-per-node 2 tests/distributed/sharded.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from bco_lab import BCOTrainer
from bco_lab.data.collation import FeedbackCollator
from bco_lab.logps import completion_logps, output_head

ROWS_PER_STEP, EVALUATION_ROWS = 8, 13
# name: what differs from a frozen copy of the policy as reference, computed on the fly
SCENARIOS: dict[str, dict[str, Any]] = {
    "copy": {},
    "tied": {"tied": True, "gradient_accumulation_steps": 2},
    "given": {"given": True, "gradient_checkpointing": True},
    "adapter": {"adapter": True},
    "ahead": {"precompute_ref_log_probs": True, "max_grad_norm": 1.0},
    "adapter ahead": {"adapter": True, "precompute_ref_log_probs": True, "max_steps": 2},
}
# the first forward pass is that of the reference, with the adapter off: FSDP must not take it for one that never trains
BFLOAT16 = {"adapter": True, "precompute_ref_log_probs": True, "bf16": True, "use_cpu": True}
RESUMED = {"FULL_STATE_DICT": "whole", "SHARDED_STATE_DICT": "in shards"}
SAVING = {
    "optim": "adamw_torch",
    "max_steps": 4,
    "save_strategy": "steps",
    "eval_strategy": "steps",  # a forward pass without a backward pass just before the checkpoint
    "save_steps": 2,
    "eval_steps": 2,
}


def policy(*, tied: bool = False) -> LlamaForCausalLM:
    """The tiny model, maybe with one matrix for both embeddings and output head."""
    model = tiny.model()
    if not tied:
        return model
    model.config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(model.config)


def trainer(
    folder: Path, *, tied: bool = False, given: bool = False, adapter: bool = False, **settings: Any
) -> BCOTrainer:
    """A trainer on `ROWS_PER_STEP` rows a micro-batch, sharded if there are several processes."""
    if torch.distributed.is_torchelastic_launched():
        settings |= {"fsdp": True, "per_device_train_batch_size": ROWS_PER_STEP // 2}
    return BCOTrainer(
        model=policy(tied=tied),
        ref_model=tiny.model(seed=1) if given else None,
        args=tiny.config(
            folder,
            **{
                "precompute_ref_log_probs": False,
                "per_device_train_batch_size": ROWS_PER_STEP,
                "train_sampling_strategy": "sequential",
                "learning_rate": 0.1,
                "beta": 0.5,
            }
            | settings,
        ),
        train_dataset=tiny.rows(4 * ROWS_PER_STEP),
        eval_dataset=tiny.rows(EVALUATION_ROWS, seed=1),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    )


def share_held(model: nn.Module | None) -> float | None:
    """Share of a model's numbers that this process holds."""
    if model is None:
        return None
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


def logps(model: nn.Module) -> Tensor:
    """Completion log-probs of seven rows, `[7]`."""
    with torch.no_grad():
        return completion_logps(model.eval(), FeedbackCollator()(list(tiny.rows(7, seed=2))), output_head(model)).logps


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Evaluate, train, evaluate and save; all that a single process should find the same, and what this one holds."""
    made = trainer(folder, **settings)
    held = {"policy": share_held(made.model), "reference": share_held(made.ref_model)}
    before = made.evaluate()
    held["reference after a forward pass"] = share_held(made.ref_model)
    made.train()
    after = made.evaluate()
    made.save_model(str(folder / "model"))
    keys = ("loss", "delta", "grad_norm", "rewards/chosen", "rewards/rejected", "kl", "count/chosen")
    return {
        "kind": str(made.accelerator.distributed_type.value),
        "held": held,
        "steps": [{key: row[key] for key in keys} for row in made.state.log_history if "loss" in row],
        "evaluations": [{key: row[f"eval_{key}"] for key in keys if key != "grad_norm"} for row in (before, after)],
        "logps": logps(made.model).tolist(),
    }


def resumed(folder: Path, state_dict_type: str) -> dict[str, Any]:
    """Log-probs and delta after four steps at once, and after two and two."""
    settings = SAVING | {"fsdp_config": {"state_dict_type": state_dict_type}}
    at_once, in_two = trainer(folder, **settings), trainer(folder, **settings)
    at_once.train()
    in_two.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    in_two.save_model(str(folder / "model"))
    return {
        name: {"logps": logps(each.model).tolist(), "delta": each.reward_shift.delta}
        for name, each in (("at once", at_once), ("in two", in_two))
    }


def refusal(folder: Path) -> str:
    """What is said to somebody who asks for FSDP1."""
    try:
        trainer(folder, fsdp_config={"version": 1, "sync_module_states": False})
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Write `results.json`, from the first process."""
    results: dict[str, Any] = {name: run(folder / name, **settings) for name, settings in SCENARIOS.items()}
    results |= {name: resumed(folder / name, kind) for kind, name in RESUMED.items()}
    results["bfloat16"] = run(folder / "bfloat16", **BFLOAT16)
    results["refusal"] = refusal(folder / "refused")
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
