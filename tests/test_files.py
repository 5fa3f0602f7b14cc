import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bco_lab.files import atomic_path, json_ready, write_json, write_text


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary != path
        assert temporary.suffix == ".png"  # what writes an image reads its format there
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "run.log", "half \ud800")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "grüße\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "grüße\n".encode()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True)
def test_permissions_follow_the_umask_and_leave_it_alone(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "new", "text")
    (tmp_path / "plain").write_text("text")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o666 & ~umask, "plain": 0o666 & ~umask}


def test_json_is_standard_json_with_null_for_what_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    content = {"auc": math.nan, "rows": [1, -math.inf, (0.1, {"x": math.inf})], 3: True, "word": "Größe", "none": None}
    write_json(path, content)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    restored = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert restored == {"auc": None, "rows": [1, None, [0.1, {"x": None}]], "3": True, "word": "Größe", "none": None}
    assert "Größe" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_json_ready_keeps_finite_numbers_bit_for_bit() -> None:
    numbers = [0.1, 1e-320, -0.0, 2**70, True]
    ready = json_ready(numbers)
    assert [repr(number) for number in ready] == [repr(number) for number in numbers]
    assert json.loads(json.dumps(ready)) == numbers
