"""Whoever wrote for TRL's BCOTrainer and BCOConfig finds every argument and field here, with the same default."""

import dataclasses
import inspect
import warnings
from pathlib import Path

import pytest

import bco_lab

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns of its experimental modules
    from trl.experimental import bco as trl


def test_every_constructor_argument_has_its_place_and_default() -> None:
    theirs = list(inspect.signature(trl.BCOTrainer.__init__).parameters.values())
    ours = inspect.signature(bco_lab.BCOTrainer.__init__).parameters
    assert [p.name for p in theirs] == list(ours)[: len(theirs)]
    assert {p.name: p.default for p in theirs} == {p.name: ours[p.name].default for p in theirs}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own
def test_every_setting_has_the_same_default(tmp_path: Path) -> None:
    theirs = trl.BCOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = bco_lab.BCOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    names = [field.name for field in dataclasses.fields(theirs)]
    assert len(names) > 100
    differing = {name for name in names if getattr(ours, name) != getattr(theirs, name)}
    # a non-finite loss stops the run; without a GPU pinning memory only warns; one switch under two names
    assert differing <= {"logging_nan_inf_filter", "dataloader_pin_memory", "gradient_checkpointing"}, differing
    assert ours.gradient_checkpointing == ours.activation_checkpointing == theirs.gradient_checkpointing
