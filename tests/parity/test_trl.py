"""With the compatibility recipe every step is TRL 1.13.0's: its loss, rewards and delta, to 1e-5 in float32."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from parity.side_by_side import ALWAYS, KEYS, STEPS, Case, largest_difference, reward_movement, train_both, train_ours

from bco_lab.config import TRL_RECIPE

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"  # TRL's configuration sets the old name
)

TOLERANCE = 1e-5
SWITCH = (False, True)
MATRIX = [
    Case(lora=lora, explicit_reference=reference, accumulation=accumulation, one_sided=one_sided)
    for lora, reference, accumulation, one_sided in itertools.product(SWITCH, SWITCH, (1, 4), SWITCH)
]
PRECOMPUTED = [
    Case(lora=lora, explicit_reference=reference, precompute=True)
    for lora, reference in itertools.product(SWITCH, SWITCH)
]
MIXTURES = [
    Case(mixtral=True),
    Case(mixtral=True, lora=True, accumulation=4),
    Case(mixtral=True, explicit_reference=True, one_sided=True, accumulation=4),
    Case(mixtral=True, precompute=True),
]


@pytest.mark.parametrize("case", [*MATRIX, *PRECOMPUTED, *MIXTURES], ids=str)
def test_every_step_is_that_of_trl(case: Case, tmp_path: Path) -> None:
    theirs, ours = train_both(case, tmp_path)
    assert theirs.start.keys() == ours.start.keys()
    assert all(torch.equal(theirs.start[name], ours.start[name]) for name in ours.start)

    assert len(theirs.logs) == len(ours.logs) == STEPS
    logged = [set(row) & set(KEYS) for row in theirs.logs]
    assert all(set(ALWAYS) <= keys for keys in logged)
    # both classes in every step, or most of the steps with one: 26 of 64 rows are desirable
    assert sum(keys == set(KEYS) for keys in logged) == (1 if case.one_sided else STEPS)
    apart = {key: largest_difference(theirs, ours, key) for key in KEYS}
    assert max(apart.values()) < TOLERANCE, apart
    assert reward_movement(ours) > 0.05  # else there would be nothing to compare


def test_token_ids_and_what_counts_as_completion_are_those_of_trl(tmp_path: Path) -> None:
    theirs, ours = (run.trainer.train_dataset for run in train_both(Case(), tmp_path))
    assert ours["input_ids"][:] == theirs["completion_input_ids"][:]
    assert ours["label"][:] == theirs["label"][:]
    completions = [[-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :] for row in ours]
    assert completions == theirs["completion_labels"][:]
    assert len({row["prompt_length"] for row in ours}) > 2


@pytest.mark.parametrize("setting", TRL_RECIPE)
def test_each_setting_of_the_recipe_is_needed(setting: str, tmp_path: Path) -> None:
    default = {"reward_shift": "ema", "loss_reduction": "class_balanced", "train_sampling_strategy": "random"}[setting]
    recipe = train_ours(Case(), tmp_path / "recipe")
    without = train_ours(Case(), tmp_path / "without", **{setting: default})
    assert largest_difference(recipe, without, "loss") > 100 * TOLERANCE


def test_the_experiment_file_holds_the_recipe() -> None:
    path = Path(__file__).parents[2] / "conf" / "experiment" / "trl.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"] == TRL_RECIPE
