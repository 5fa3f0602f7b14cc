"""Whole checkpoints: a marker, written last, lists every file with its size; without it a checkpoint does not count."""

import json
import os
import re
from pathlib import Path
from typing import Any

from bco_lab.files import write_json

MARKER = "complete.json"
REWARD_SHIFT_STATE = "reward_shift.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def mark_whole(checkpoint: Path) -> None:
    """Declare a checkpoint whole. Its files reach the disk before the marker does."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write_json(checkpoint / MARKER, {"files": files})


def unmark(checkpoint: Path) -> None:
    """Withdraw the declaration, before anything in the checkpoint is written again."""
    (checkpoint / MARKER).unlink(missing_ok=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it lists still has the size it had."""
    try:
        files: dict[str, int] = json.loads((checkpoint / MARKER).read_text())["files"]
        return bool(files) and all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was written, from its name `checkpoint-STEP`."""
    match = _NAME.match(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-STEP")
    return int(match.group(1))


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints in a folder, whole or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of, reverse=True)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; half-written ones are passed over."""
    return next((path for path in checkpoints_in(folder) if is_whole(path)), None)


def save_reward_shift(checkpoint: Path, state: dict[str, Any]) -> None:
    """Keep the state of the delta estimator beside the weights."""
    write_json(checkpoint / REWARD_SHIFT_STATE, state)


def load_reward_shift(checkpoint: Path) -> dict[str, Any]:
    """The state that `save_reward_shift` wrote.

    Raises:
        FileNotFoundError: The checkpoint was not written by BCOTrainer.
    """
    path = checkpoint / REWARD_SHIFT_STATE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: only a checkpoint of BCOTrainer holds the reward shift delta")
    state: dict[str, Any] = json.loads(path.read_text())
    return state
