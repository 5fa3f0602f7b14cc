"""A sweep's files to lines, intervals and advice, worked out by hand."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bco_lab.report.trials import read_report, write_report
from bco_lab.report.trials_table import render_report


def trial(
    folder: Path, settings: list[str], auc: float | None, kl: float = 1.0, accuracy: float = 0.6, **more: Any
) -> str:
    """Write a trial; without an AUC it has no result."""
    name = ",".join(settings)
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "overrides.yaml").write_text(json.dumps(["model=tiny_llama", *settings]))
    if auc is not None:
        after = {"rewards/auc": auc, "rewards/accuracies": accuracy, "kl": kl, "count/chosen": 50, "count/rejected": 50}
        result = {"status": "finished", "objective": auc, "objective_name": "eval_rewards/auc", "steps": 4}
        (path / "result.json").write_text(
            json.dumps(result | {"metrics": {"after": after}, "wall_seconds": 2.0} | more)
        )
    return name


def listed(folder: Path, **trials: dict[str, Any]) -> None:
    content = {"version": 1, "objective": "eval_rewards/auc", "trials": trials}
    (folder / "sweep.json").write_text(json.dumps(content))


def test_seeds_of_the_same_settings_are_one_line(tmp_path) -> None:
    for beta, aucs in (("0.1", (0.6, 0.7, 0.8)), ("0.3", (0.5, 0.5, 0.5))):
        for seed, auc in enumerate(aucs):
            trial(tmp_path, [f"seed={seed}", f"trainer.beta={beta}"], auc, kl=2 * auc)
    report = read_report(tmp_path)
    assert report.swept == ["seed", "trainer.beta"]
    first, second = report.lines
    assert (first.settings, first.objective, len(first.trials)) == ({"trainer.beta": "0.1"}, pytest.approx(0.7), 3)
    assert first.error["rewards/auc"] == pytest.approx(0.1 / math.sqrt(3))
    assert (first.low, first.high) == pytest.approx(
        (0.7 - 1.95996 * 0.1 / 3**0.5, 0.7 + 1.95996 * 0.1 / 3**0.5), abs=1e-5
    )
    assert first.mean["kl"] == pytest.approx(1.4)
    assert (second.error["rewards/auc"], second.low, second.high) == (0.0, 0.5, 0.5)


def test_one_seed_has_the_interval_of_its_held_out_rows(tmp_path) -> None:
    trial(tmp_path, ["trainer.beta=0.1"], 0.8)
    trial(tmp_path, ["trainer.beta=0.3"], 0.6)
    line = read_report(tmp_path).lines[0]
    first, second = 0.8 / 1.2, 2 * 0.64 / 1.8  # Hanley and McNeil's Q1 and Q2
    error = math.sqrt((0.8 * 0.2 + 49 * (first - 0.64) + 49 * (second - 0.64)) / 2500)
    assert line.high - line.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)
    assert line.error["rewards/auc"] is None


def test_the_nearest_of_those_that_cannot_be_told_apart_is_kept(tmp_path) -> None:
    trial(tmp_path, ["trainer.beta=0.05"], 0.80, kl=9.0)
    trial(tmp_path, ["trainer.beta=0.1"], 0.78, kl=3.0)
    trial(tmp_path, ["trainer.beta=0.3"], 0.50, kl=0.1)
    report = read_report(tmp_path)
    assert report.advice.trial == "trainer.beta=0.1"
    assert "0.780" in report.advice.reason
    assert "KL 3.00 against 9.00" in report.advice.reason
    assert read_report(tmp_path, max_kl=1.0).advice.trial == "trainer.beta=0.3"
    assert "within a KL of 1" in read_report(tmp_path, max_kl=1.0).advice.rule
    assert read_report(tmp_path, max_kl=0.01).advice is None


def test_a_metric_that_should_be_small_is_ranked_so(tmp_path) -> None:
    for beta, loss in (("0.1", 0.9), ("0.2", 0.4)):
        trial(tmp_path, [f"trainer.beta={beta}"], loss, objective_name="eval_loss")
    assert [line.settings["trainer.beta"] for line in read_report(tmp_path).lines] == ["0.2", "0.1"]


def test_shared_results_stand_with_the_trial_they_come_from(tmp_path) -> None:
    kept = trial(tmp_path, ["udm.max_density_ratio=5"], 0.7)
    twin = trial(tmp_path, ["udm.max_density_ratio=9"], 0.7, same_as=kept)
    (line,) = read_report(tmp_path).lines
    assert (line.trials, line.shared) == ([kept], [twin])
    console = Console(width=100, file=io.StringIO())
    render_report(console, read_report(tmp_path))
    assert "max_density_ratio=9" in console.file.getvalue()


def test_failed_and_pending_trials_are_shown(tmp_path) -> None:
    done = trial(tmp_path, ["trainer.beta=0.1"], 0.7)
    (tmp_path / "trainer.beta=0.2").mkdir()
    (tmp_path / "trainer.beta=0.2" / "result.json").write_text("{")
    listed(
        tmp_path,
        **{
            done: {"status": "running", "overrides": ["trainer.beta=0.1"]},
            "trainer.beta=0.2": {"status": "failed", "overrides": ["trainer.beta=0.2"], "error": "no [memory]"},
            "trainer.beta=0.4": {"status": "pending", "overrides": ["trainer.beta=0.4"]},
        },
    )
    report = read_report(tmp_path)
    assert [each.status for each in report.trials] == ["finished", "failed", "pending"]
    assert len(report.notes) == 1
    assert "result.json is damaged, not JSON" in report.notes[0]
    for width in (60, 100):
        console = Console(width=width, file=io.StringIO())
        render_report(console, report)
        shown = console.file.getvalue()
        assert "3 trials: 1 finished, 1 pending, 1 failed" in " ".join(shown.split())
        assert "no [memory]" in shown
        assert max(map(len, shown.splitlines())) <= max(width, 100)


def test_the_files_hold_every_trial(tmp_path) -> None:
    trial(tmp_path, ["trainer.beta=0.1"], 0.7, kl=1.5)
    trial(tmp_path, ["trainer.beta=0.2"], None)
    paths = write_report(read_report(tmp_path), tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.csv"]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [(row["trial"], row["status"], row["trainer.beta"], row["kl"]) for row in rows] == [
        ("trainer.beta=0.1", "finished", "0.1", "1.5"),
        ("trainer.beta=0.2", "unknown", "0.2", ""),
    ]
    assert json.loads(paths[0].read_text())["advice"]["trial"] == "trainer.beta=0.1"


def test_a_single_run_is_a_sweep_of_one_and_another_folder_is_none(tmp_path) -> None:
    name = trial(tmp_path, ["trainer.beta=0.1"], 0.7)
    report = read_report(tmp_path / name)
    assert (len(report.trials), report.trials[0].name, report.advice.trial) == (1, name, name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds neither a sweep nor a run$"):
        read_report(tmp_path / "empty")
