import json
import re
import shutil
from pathlib import Path

import pytest

from bco_lab.checkpoints import (
    MARKER,
    checkpoints_in,
    is_whole,
    last_whole_checkpoint,
    load_reward_shift,
    mark_whole,
    save_reward_shift,
    step_of,
    unmark,
)
from bco_lab.reward_shift import RewardShift, RewardSums


def written(folder: Path, step: int, *, whole: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "adapter").mkdir(parents=True)
    (checkpoint / "adapter" / "model.safetensors").write_bytes(b"x" * 100)
    (checkpoint / "optimizer.pt").write_bytes(b"y" * 50)
    (checkpoint / "empty").touch()
    if whole:
        mark_whole(checkpoint)
    return checkpoint


def test_a_checkpoint_is_whole_once_it_is_marked_and_until_it_is_unmarked(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 3, whole=False)
    assert not is_whole(checkpoint)
    mark_whole(checkpoint)
    assert is_whole(checkpoint)
    unmark(checkpoint)
    assert not is_whole(checkpoint)
    unmark(checkpoint)  # a second time is no error
    assert (checkpoint / "optimizer.pt").is_file()


def test_the_marker_lists_every_file_with_its_size(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 3)
    mark_whole(checkpoint)  # a marker does not list itself
    content = json.loads((checkpoint / MARKER).read_text())
    assert content == {"files": {"adapter/model.safetensors": 100, "empty": 0, "optimizer.pt": 50}}


def test_a_moved_checkpoint_is_still_whole(tmp_path: Path) -> None:
    assert is_whole(written(tmp_path / "a", 3).rename(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("file", ["adapter/model.safetensors", "optimizer.pt", "empty"])
def test_a_missing_or_changed_file_makes_it_half_written(tmp_path: Path, file: str) -> None:
    checkpoint = written(tmp_path, 3)
    path = checkpoint / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] if content else b"more")
    assert not is_whole(checkpoint)
    path.write_bytes(content)
    assert is_whole(checkpoint)
    path.unlink()
    assert not is_whole(checkpoint)


def test_a_file_that_came_later_does_no_harm(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 3)
    (checkpoint / "notes.txt").write_text("kept by hand")
    assert is_whole(checkpoint)


def test_a_missing_folder_is_not_whole(tmp_path: Path) -> None:
    assert not is_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "damage",
    [b"", b'{"files": {"optimizer.pt"', b"\xff\xfe", b"null", b"[]", b"3", b"{}", b'{"files": null}', b'{"files": []}'],
)
def test_a_damaged_marker_is_no_marker(tmp_path: Path, damage: bytes) -> None:
    checkpoint = written(tmp_path, 3)
    (checkpoint / MARKER).write_bytes(damage)
    assert not is_whole(checkpoint)


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        written(tmp_path, step)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    unmark(tmp_path / "checkpoint-100")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(b"")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert last_whole_checkpoint(tmp_path) is None


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 5)
    for name in ("checkpoint-final", "checkpoint-7-backup", "my-checkpoint-8", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / name)
    (tmp_path / "checkpoint-9").write_text("a file")
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-5"]
    assert checkpoints_in(tmp_path / "nowhere") == []
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_step_of_reads_the_name(tmp_path: Path) -> None:
    assert step_of(tmp_path / "checkpoint-0120") == 120
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/best is not named checkpoint-STEP$"):
        step_of(tmp_path / "best")


def test_the_reward_shift_is_restored_bit_for_bit(tmp_path: Path) -> None:
    shift = RewardShift("ema", decay=0.95).update(RewardSums(1 / 3, 7.0, -0.1, 3.0))
    save_reward_shift(tmp_path, shift.state_dict())
    restored = RewardShift(**load_reward_shift(tmp_path))
    assert restored == shift
    assert restored.delta.hex() == shift.delta.hex()


def test_a_checkpoint_without_a_reward_shift_says_whose_it_is_not(tmp_path: Path) -> None:
    message = r"reward_shift\.json is missing: only a checkpoint of BCOTrainer holds the reward shift delta$"
    with pytest.raises(FileNotFoundError, match=message):
        load_reward_shift(tmp_path)
