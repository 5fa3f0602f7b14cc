"""Sweeps: every trial is listed, none is lost, none runs twice."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import TINY, write_log

from bco_lab.app.sweep import SweepLog, expected_trials, with_names

LOG = "dataset.path=log.jsonl"
SWEEP = [*TINY, "dataset=unpaired", LOG, "generation.count=0", "wandb.mode=disabled", "hydra.sweep.dir=sweep"]


@pytest.fixture
def log(environment: Path) -> Path:
    topics = ["password reset login", "refund invoice payment"]
    rows = [
        {"prompt": f"{topics[(i % 10 < 7) == (i % 2 == 0)]} {i}", "completion": f"answer {i}", "label": i % 2 == 0}
        for i in range(60)
    ]
    return write_log(environment / "log.jsonl", rows)


def trials(environment: Path, folder: str = "sweep") -> dict[str, Any]:
    return json.loads((environment / folder / "sweep.json").read_text())["trials"]


def results(environment: Path, folder: str = "sweep") -> dict[str, Any]:
    """Final metrics by trial."""
    found = {}
    for path in sorted((environment / folder).glob("*/result.json")):
        result = json.loads(path.read_text())
        metrics = {key: value for key, value in result["metrics"]["after"].items() if "runtime" not in key}
        found[path.parent.name] = {
            "delta": result["delta"],
            **{k: v for k, v in metrics.items() if "per_second" not in k},
        }
    return found


def test_every_trial_is_listed_and_named_by_what_differs(bco_lab: Any, environment: Path, log: Path) -> None:
    ended = bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.3", "model/adapter=lora,none", "trainer.max_steps=1")
    assert ended.status == 0, ended.err
    found = trials(environment)
    assert len(found) == 4
    assert {trial["status"] for trial in found.values()} == {"finished"}
    folders = {path.parent.name for path in (environment / "sweep").glob("*/result.json")}
    assert folders == set(found)
    assert all(name.startswith("model-adapter=") and "max_steps" not in name for name in found)
    objective = {json.loads((environment / "sweep" / name / "result.json").read_text())["objective"] for name in found}
    assert {trial["objective"] for trial in found.values()} == objective


def test_a_sweep_has_a_folder_of_its_own(bco_lab: Any, environment: Path, log: Path) -> None:
    settings = [each for each in SWEEP if not each.startswith("hydra.sweep.dir")]
    ended = bco_lab("-m", *settings, "trainer.beta=0.1,0.2", "trainer.max_steps=1", "wandb.mode=offline")
    assert ended.status == 0, ended.err
    (folder,) = (environment / "outputs" / "sweeps").iterdir()
    assert folder.name.startswith("tiny_llama-unpaired-20")
    assert len(list(folder.glob("trainer.beta=*/result.json"))) == 2
    cfg = yaml.safe_load((folder / "trainer.beta=0.2" / "config.yaml").read_text())
    assert (cfg["wandb"]["group"], cfg["wandb"]["name"]) == (folder.name, "trainer.beta=0.2")


def test_names_are_foretold() -> None:
    overrides = ["seed=1,2", "trainer.beta=0.5,1.0", "model/adapter=lora", "udm=on"]
    arguments = with_names(["-m", *overrides])
    assert arguments[-1] == "hydra.job.config.override_dirname.exclude_keys=[model/adapter,udm]"
    assert with_names([*overrides, "-m"])[-2:] == [arguments[-1], "-m"]
    found = expected_trials(overrides, ["model/adapter", "udm"])
    assert list(found) == [
        "seed=1,trainer.beta=0.5",
        "seed=1,trainer.beta=1.0",
        "seed=2,trainer.beta=0.5",
        "seed=2,trainer.beta=1.0",
    ]
    assert found["seed=2,trainer.beta=0.5"] == ["seed=2", "trainer.beta=0.5", "model/adapter=lora", "udm=on"]


def test_a_failed_trial_is_recorded_and_the_others_go_on(bco_lab: Any, environment: Path, log: Path) -> None:
    ended = bco_lab("-m", *SWEEP, "trainer.beta=-1,0.2", "trainer.max_steps=1")
    assert ended.status == 2
    found = trials(environment)
    assert found["trainer.beta=-1"]["status"] == "failed"
    assert found["trainer.beta=-1"]["error"] == "trainer.beta=-1 must be > 0"
    assert found["trainer.beta=0.2"]["status"] == "finished"
    assert "bco-lab: failed: trainer.beta=-1: trainer.beta=-1 must be > 0" in ended.err


def test_values_can_be_added_later(bco_lab: Any, environment: Path, log: Path) -> None:
    assert bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.2", "trainer.max_steps=1").status == 0
    before = {path: path.stat().st_mtime_ns for path in (environment / "sweep").glob("*/result.json")}
    again = bco_lab("-m", *SWEEP, "trainer.beta=0.2,0.4", "trainer.max_steps=1")
    assert again.status == 0, again.err
    assert "trainer.beta=0.2 is finished already." in again.out
    alone = bco_lab("-m", *SWEEP, "trainer.beta=0.8", "trainer.max_steps=1")  # named like the others
    assert alone.status == 0, alone.err
    assert set(trials(environment)) == {f"trainer.beta={beta}" for beta in (0.1, 0.2, 0.4, 0.8)}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_trials_never_share_a_folder(bco_lab: Any, environment: Path, log: Path) -> None:
    assert bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.2", "trainer.max_steps=1").status == 0
    kept = results(environment)
    ended = bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.2", "trainer.max_steps=2")
    assert ended.status == 2
    assert "holds a trial of other settings (trainer.max_steps=1 there, 2 here)" in ended.err
    assert results(environment) == kept


def test_bounds_that_never_bind_are_trained_once(bco_lab: Any, environment: Path, log: Path) -> None:
    settings = [*SWEEP, "udm=lexical", "trainer.max_steps=1", "udm.min_density_ratio=0.001"]
    ended = bco_lab("-m", *settings, "udm.max_density_ratio=1.01,500,1000")
    assert ended.status == 0, ended.err
    found = trials(environment)
    assert [found[f"udm.max_density_ratio={most}"]["same_as"] for most in ("1.01", "500", "1000")] == [
        None,
        None,
        "udm.max_density_ratio=500",
    ]
    assert "udm.max_density_ratio=1000 has the same weights as udm.max_density_ratio=500: trained once." in ended.out
    assert not (environment / "sweep" / "udm.max_density_ratio=1000" / "metrics.jsonl").exists()
    scores = results(environment)
    assert scores["udm.max_density_ratio=1000"] == scores["udm.max_density_ratio=500"]
    assert scores["udm.max_density_ratio=1.01"] != scores["udm.max_density_ratio=500"]


def test_a_dry_run_says_what_would_happen_and_leaves_nothing(bco_lab: Any, environment: Path, log: Path) -> None:
    log.write_text(log.read_text().replace("answer", "never seen"))  # the cache knows the other rows
    dry = ["dry_run=true", "trainer.beta=0.1,0.2", "trainer.max_steps=-1", "trainer.num_train_epochs=2"]
    ended = bco_lab("-m", *SWEEP, *dry)
    assert ended.status == 0, ended.err
    # 54 rows, 8 a step: 7 steps an epoch
    assert (
        "trainer.beta=0.1: 14 training steps; in the cache: nothing; computed first: tokens and what needs it"
        in ended.out
    )
    assert not (environment / "sweep").exists()
    assert bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.2", *dry[2:]).status == 0
    known = bco_lab("-m", *SWEEP, "trainer.beta=0.1,0.3", *dry[2:], "dry_run=true")
    assert "trainer.beta=0.1: finished already" in known.out
    assert (
        "trainer.beta=0.3: 14 training steps; in the cache: tokens, reference-logps; nothing to compute first"
        in known.out
    )
    assert set(trials(environment)) == {"trainer.beta=0.1", "trainer.beta=0.2"}


def test_a_killed_sweep_goes_on_and_ends_like_one_that_was_not(
    bco_lab: Any, start: Callable[[Sequence[str]], Any], environment: Path, log: Path
) -> None:
    settings = [*SWEEP, "trainer.beta=0.1,0.2,0.3", "trainer.max_steps=12", "trainer.save_steps=2"]
    whole = [each.replace("sweep.dir=sweep", "sweep.dir=whole") for each in settings]
    assert bco_lab("-m", *whole).status == 0
    process = start(["-m", *settings])
    second = environment / "sweep" / "trainer.beta=0.2" / "checkpoints" / "checkpoint-4" / "complete.json"
    deadline = time.monotonic() + 120
    while not second.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = trials(environment)
    assert [found[f"trainer.beta={beta}"]["status"] for beta in (0.1, 0.2, 0.3)] == ["finished", "running", "pending"]
    ended = bco_lab("resume", "sweep")
    assert ended.status == 0, ended.err
    assert "trainer.beta=0.1 is finished already." in ended.out
    assert "Resuming from checkpoint-" in ended.err
    assert {trial["status"] for trial in trials(environment).values()} == {"finished"}
    assert results(environment) == results(environment, "whole")


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sweep.json is damaged: it lists no trials$"):
        SweepLog(tmp_path).read()
