"""What is read from metrics.jsonl, value by value, and the picture that is drawn from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bco_lab.report.plots import plot_rewards, read_metrics


def _write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def _train(step: int, **metrics: float | None) -> dict[str, Any]:
    return {"step": step, "split": "train", **metrics}


def _run(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append(_train(step, **{"rewards/chosen": 0.01 * step, "rewards/rejected": -0.02 * step, "delta": 0.0}))
        rows[-1].update({"rewards/margins": 0.03 * step, "rewards/accuracies": 0.5 + 0.4 * step / steps})
    rows.append({"step": steps, "split": "eval", "eval_rewards/chosen": 0.3, "eval_rewards/accuracies": 0.7})
    return rows


def _has_color(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels.astype(int) - color).max(axis=-1) <= 2).sum() > 50)


BLUE, VERMILION, GREEN, PURPLE = (0, 114, 178), (213, 94, 0), (0, 158, 115), (170, 68, 153)


def test_read_returns_the_values_in_order(tmp_path: Path) -> None:
    rows = [_train(2, loss=1.5), {"step": 2, "split": "eval", "eval_loss": 1.25}, _train(1, loss=2.0)]
    assert read_metrics(_write(tmp_path / "metrics.jsonl", rows)) == [rows[2], rows[0], rows[1]]


def test_the_later_line_of_a_resumed_run_wins(tmp_path: Path) -> None:
    rows = [_train(1, loss=2.0), _train(2, loss=1.5), _train(3, loss=9.0), _train(2, loss=1.4), _train(3, loss=1.3)]
    read = read_metrics(_write(tmp_path / "metrics.jsonl", rows))
    assert [(row["step"], row["loss"]) for row in read] == [(1, 2.0), (2, 1.4), (3, 1.3)]


@pytest.mark.parametrize("tail", ['{"step": 2, "spl', '{"step": 2, "name": "caf\u00e9"'])
def test_a_half_written_last_line_is_passed_over(tmp_path: Path, tail: str) -> None:
    path = _write(tmp_path / "metrics.jsonl", [_train(1, loss=2.0)])
    path.write_bytes(path.read_bytes() + tail.encode()[:-2])  # may cut a character in two
    assert read_metrics(path) == [_train(1, loss=2.0)]


def test_a_last_line_without_line_feed_counts(tmp_path: Path) -> None:
    path = _write(tmp_path / "metrics.jsonl", [_train(1, loss=2.0)], tail=json.dumps(_train(2, loss=1.0)))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"step": 1, "split": "train"}\n{"step": 2,\n{"step": 3, "split": "train"}\n',
            "metrics.jsonl, line 2: not JSON",
        ),
        ('{"step": 1, "split": "train"}\n{"step": 2,\n', "metrics.jsonl, line 2: not JSON"),
        ('{"split": "train"}\n', 'metrics.jsonl, line 1: needs an integer "step"'),
        ('{"step": 1, "split": "test"}\n', 'line 1: needs an integer "step" and a "split" of "train" or "eval"'),
        ("[1, 2]\n", "metrics.jsonl, line 1: needs"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_the_picture_has_its_size_and_its_colors(tmp_path: Path) -> None:
    metrics = _write(tmp_path / "a $run$ of mine" / "metrics.jsonl", _run(60))
    target = tmp_path / "plots" / "rewards.png"
    assert plot_rewards(metrics, target) == target
    with Image.open(target) as image:
        assert (image.format, image.size) == ("PNG", (1500, 900))
        pixels = np.asarray(image.convert("RGB"))
    assert all(_has_color(pixels, color) for color in (BLUE, VERMILION, GREEN, PURPLE))
    assert sorted(path.name for path in target.parent.iterdir()) == ["rewards.png"]


def test_keys_that_are_missing_or_null_are_left_out(tmp_path: Path) -> None:
    """A step of a one-sided batch has no rejected reward; a run of such steps draws no line for it."""
    rows = [_train(step, **{"rewards/chosen": 0.1 * step, "rewards/rejected": None}) for step in range(1, 5)]
    rows.append(_train(5, **{"rewards/chosen": float("nan"), "delta": 0.1}))
    picture = plot_rewards(_write(tmp_path / "metrics.jsonl", rows), tmp_path / "rewards.png")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert _has_color(pixels, BLUE)
    assert not _has_color(pixels, VERMILION)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_single_point_is_drawn(tmp_path: Path, split: str) -> None:
    prefix = "eval_" if split == "eval" else ""
    rows = [{"step": 4, "split": split, f"{prefix}rewards/margins": 0.25}]
    picture = plot_rewards(_write(tmp_path / "metrics.jsonl", rows), tmp_path / "rewards.png")
    with Image.open(picture) as image:
        assert _has_color(np.asarray(image.convert("RGB")), GREEN)


def test_an_old_picture_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "rewards.png"
    target.write_bytes(b"an old picture")
    first = plot_rewards(_write(tmp_path / "metrics.jsonl", _run(5)), target).read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plot_rewards(tmp_path / "metrics.jsonl", target).read_bytes() == first


@pytest.mark.parametrize("rows", [[], [_train(1, loss=2.0)]])
def test_nothing_to_draw_is_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", rows)
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no rewards to draw"):
        plot_rewards(metrics, tmp_path / "rewards.png")
    assert not (tmp_path / "rewards.png").exists()
