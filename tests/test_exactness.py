"""A step is the same however it is cut into micro-batches and processes, and so is an evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tiny
import torch
from distributed import cuts
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralForCausalLM

from bco_lab import BCOTrainer
from bco_lab.losses import LOSS_REDUCTIONS

Step = tuple[Tensor, dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """Per reduction, steps whose 16 rows are one micro-batch of this one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {reduction: cuts.training_steps(folder, 16, 1, reduction) for reduction in LOSS_REDUCTIONS}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients and results that two gloo processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, cuts.__file__, str(folder)],
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["processes"] == 2
    return load_file(folder / "gradients.safetensors"), results


def assert_same_steps(parts: Step, whole: Step) -> None:
    """Gradient, loss, delta and metrics of each step, to what float32 can say."""
    (gradients, results), (expected, expected_results) = parts, whole
    first, second = (row["delta"] for row in expected_results["logs"])
    assert first == 0.0
    assert abs(second) > 0.02
    assert gradients.shape == expected.shape
    for gradient, other in zip(gradients, expected, strict=True):
        assert other.norm() > 0.1
        assert (gradient - other).norm() / other.norm() < 1e-6
    for row, other_row in zip(results["logs"], expected_results["logs"], strict=True):
        assert row == pytest.approx(other_row, rel=1e-5, abs=1e-6, nan_ok=True)
    assert results["delta"] == pytest.approx(expected_results["delta"], abs=1e-7)


def test_the_rows_of_a_step_fall_unevenly() -> None:
    labels = torch.tensor(cuts.training_rows()["label"])
    assert labels.view(-1, 4).sum(1).tolist() == [3, 1, 0, 1, 2, 4, 1, 2]
    assert labels.view(-1, 8).sum(1).tolist() == [4, 1, 6, 3]


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 4), (1, 16)])
def test_gradient_does_not_depend_on_micro_batches(
    per_device: int, accumulation: int, reduction: str, alone: dict[str, Step], tmp_path: Path
) -> None:
    assert_same_steps(cuts.training_steps(tmp_path, per_device, accumulation, reduction), alone[reduction])


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize(("per_device", "accumulation"), cuts.CUTS_OF_TWO_PROCESSES)
def test_gradient_does_not_depend_on_processes(
    per_device: int,
    accumulation: int,
    reduction: str,
    alone: dict[str, Step],
    two_processes: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    gradients, results = two_processes
    name = f"{reduction} {per_device}x{accumulation}"
    assert_same_steps((gradients[name], results[name]), alone[reduction])


def test_processes_still_agree_if_an_evaluation_came_first(
    alone: dict[str, Step], two_processes: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    gradients, results = two_processes
    assert_same_steps((gradients[cuts.AFTER_EVALUATION], results[cuts.AFTER_EVALUATION]), alone[LOSS_REDUCTIONS[0]])


@pytest.mark.parametrize("batch_size", cuts.EVALUATION_BATCHES)
def test_evaluation_counts_each_row_once_on_two_processes(
    batch_size: int, two_processes: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    together = two_processes[1][f"evaluation {batch_size}"]
    assert (together["eval_count/chosen"], together["eval_count/rejected"]) == (5, 8)
    whole = cuts.evaluation(tmp_path, cuts.EVALUATION_ROWS)
    assert len(whole) > 14
    assert together == pytest.approx(whole, abs=1e-5)
    assert abs(whole["eval_rewards/margins"]) > 0.1


def test_a_mixture_of_experts_learns(mixtral: MixtralForCausalLM, tmp_path: Path) -> None:
    mixtral.config.output_router_logits = True
    trainer = BCOTrainer(
        model=mixtral,
        args=tiny.config(tmp_path, max_steps=20, optim="adamw_torch", learning_rate=3e-3, beta=0.5),
        train_dataset=tiny.rows(32),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    loss = tiny.logged(trainer, "loss")
    assert len(loss) == 20
    assert fmean(loss[-5:]) < fmean(loss[:5]) - 0.3
    assert min(tiny.logged(trainer, "aux_loss")) > 1.0
