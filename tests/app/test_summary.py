"""The summary prints the numbers of the result, rounded right, within the width, and copes with what is missing."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bco_lab.app.summary import render_summary


def _result() -> dict[str, Any]:
    run = "outputs/2026-01-02/11-22-33"
    return {
        "status": "finished",
        "objective": 0.8012,
        "objective_name": "eval_rewards/auc",
        "wall_seconds": 181.2,
        "steps": 60,
        "config_hash": "0123abcd",
        "metrics": {
            "before": {
                "rewards/accuracies": None,
                "rewards/auc": 0.5,
                "rewards/margins": 0.0,
                "kl": -0.0,
                "delta": 0.0,
                "bound_gap": 2.0,
            },
            "after": {
                "rewards/accuracies": 0.6926,
                "rewards/auc": 0.8012,
                "rewards/margins": 1.2346,
                "kl": 3.2104,
                "delta": -0.1234,
                "bound_gap": 1.7708,
            },
        },
        "eval_rows": 400,
        "samples": {
            "count": 48,
            "positive_before": 35 / 48,
            "positive_after": 46 / 48,
            "judge_accuracy": 0.7734,
            "pairs": [
                {"prompt": "Review a film.", "before": "A [bold]mess[/bold] of\nideas.", "after": "A warm film."},
                {"prompt": "Review a film.", "before": "word " * 100, "after": "Gripping."},
                {"prompt": "Review a film.", "before": "", "after": "Third."},
                {"prompt": "Review a film.", "before": "fourth", "after": "fourth"},
            ],
        },
        "paths": {
            "run_dir": run,
            "model": f"{run}/model",
            "metrics": f"{run}/metrics.jsonl",
            "plots": [f"{run}/plots/rewards.png"],
            "wandb": f"{run}/wandb/offline-run-20260102_112233-abcdefgh",
        },
        "wandb_mode": "offline",
    }


@pytest.fixture(autouse=True)
def _environment_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def _render(result: dict[str, Any], width: int = 100, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    render_summary(console, result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _row(text: str, name: str) -> list[str]:
    """Before and after of the table's row with this name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f" {name}  ")]
    return line[len(name) + 1 :].split()[:2]


def test_the_table_holds_the_rounded_numbers() -> None:
    text = _render(_result())
    assert _row(text, "held-out accuracy") == ["–", "0.693"]
    assert _row(text, "held-out AUC") == ["0.500", "0.801"]
    assert _row(text, "margin") == ["0.000", "+1.235"]
    assert _row(text, "KL estimate") == ["0.000", "+3.210"]
    assert _row(text, "δ") == ["0.000", "-0.123"]
    assert _row(text, "bound gap") == ["2.000", "1.771"]
    assert _row(text, "judged positive (n=48)") == ["73%", "96%"]
    assert "Run finished · 60 steps · 3 min 1 s · eval_rewards/auc 0.801" in text
    assert "on 400 rows never trained on" in text


def test_the_judge_is_introduced() -> None:
    sentence = (
        "The judge (TF-IDF + logistic regression, trained on rows in neither split) "
        "is right on 77.3% of its own held-out rows."
    )
    assert sentence in re.sub(r"\s+", " ", _render(_result()))


@pytest.mark.parametrize("width", [100, 140])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_line_is_wider_than_100(width: int, terminal: bool) -> None:
    text = _render(_result(), width, terminal=terminal)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in _render(_result(), width)


def test_samples_stand_side_by_side() -> None:
    text = _render(_result())
    assert text.count("Review a film.") == 1  # one prompt for all: said once
    assert re.search(r"A \[bold\]mess\[/bold\] of ideas\. +A warm film\.", text)
    assert re.search(r"– +Third\.", text)
    assert "fourth" not in text
    assert text.count("word") == 47  # 239 characters, cut back to the last space
    assert "word…" in text


def test_differing_prompts_get_a_column() -> None:
    result = _result()
    result["samples"]["pairs"][1]["prompt"] = "Review a book."
    text = _render(result)
    assert re.search(r"Review a film\. +A \[bold\]mess\[/bold\] of ideas\. +A warm film\.", text)
    assert re.search(r"Review a book\. +word", text)


def test_places_and_commands() -> None:
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in _render(_result()).splitlines()]
    run = "outputs/2026-01-02/11-22-33"
    assert lines[-8:] == [
        f"run directory  {run}",
        f"plot  {run}/plots/rewards.png",
        f"metrics  {run}/metrics.jsonl",
        f"model  {run}/model",
        f"W&B offline  {run}/wandb/offline-run-20260102_112233-abcdefgh",
        f"read it  wandb leet inspect --summary --json {run}/wandb",
        f"upload it  wandb sync {run}/wandb/offline-run-20260102_112233-abcdefgh",
        f'use the model  AutoModelForCausalLM.from_pretrained("{run}/model")',
    ]


def test_paths_below_the_current_folder_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = _render(
        {"status": "finished", "paths": {"run_dir": str(tmp_path / "outputs" / "a"), "model": "/else/where"}}
    )
    assert "run directory  outputs/a\n" in text
    assert 'from_pretrained("/else/where")' in text


def test_a_long_path_is_never_broken() -> None:
    run = "/" + "/".join(["a-long-folder-name"] * 8)
    text = _render({"status": "finished", "paths": {"run_dir": run}})
    assert f"run directory  {run}\n" in text


def test_without_held_out_rows_the_training_metrics_are_shown() -> None:
    result = {
        "status": "finished",
        "steps": 12,
        "metrics": {"after": {"rewards/accuracies": 0.5, "rewards/margins": float("nan")}},
        "paths": {"run_dir": "/tmp/my run", "model": None, "wandb": None},
    }
    text = _render(result)
    assert "Run finished · 12 steps\n" in re.sub(r" +\n", "\n", text)
    assert _row(text, "training accuracy") == ["–", "0.500"]
    assert _row(text, "margin") == ["–", "–"]
    assert "held-out" not in text
    assert "from_pretrained" not in text


def test_wandb_is_named_with_its_path_where_it_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = Path(sys.executable).parent
    paths = {"run_dir": "/tmp/r", "wandb": "/tmp/r/wandb/offline-run-1"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert f"{beside}/wandb leet inspect" in _render({"status": "finished", "paths": paths}, width=300)
    monkeypatch.setenv("PATH", str(beside))
    assert "read it        wandb leet inspect" in _render({"status": "finished", "paths": paths}, width=300)


def test_only_a_status() -> None:
    assert _render({"status": "failed"}).strip() == "Run failed"
    empty = {"status": "finished", "metrics": None, "samples": None, "paths": None, "wall_seconds": 7322.0}
    assert _render(empty).strip() == "Run finished · 2 h 2 min"


def test_samples_without_a_judge() -> None:
    result = _result()
    result["samples"].update(judge_accuracy=None, positive_before=None, positive_after=None)
    text = _render(result)
    assert "judge" not in text
    assert "A warm film." in text


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    text = _render(_result(), width=60)
    assert _row(text, "held-out AUC") == ["0.500", "0.801"]
    assert "outranks" not in text
