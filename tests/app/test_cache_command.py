from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bco_lab.cache import Artifact, ArtifactCache, ArtifactKey


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactCache:
    """Two artifacts of one kind and one of another."""
    monkeypatch.setenv("BCO_LAB_CACHE", str(tmp_path / "cache"))
    made = ArtifactCache()
    for kind, number in (("tokens", 1), ("tokens", 2), ("p-desirable", 1)):
        made.get_or_compute(ArtifactKey(kind, 1, {"n": number}), lambda: Artifact({"x": np.zeros(262_144 // 4)}))
    return made


@pytest.fixture
def command(bco_lab: Any, cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("BCO_LAB_CACHE", str(cache.root.parent))  # the command's own fixture has set another
    return lambda *arguments: bco_lab("cache", *arguments)


def test_ls_lists_kinds_sizes_and_the_folder(command: Any, cache: ArtifactCache) -> None:
    ended = command("ls")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["p-desirable", "tokens", "tokens"]
    assert {line.split()[1] for line in lines[2:5]} == {entry.digest[:12] for entry in cache.entries()}
    assert lines[2].split()[2] == "0.5"
    assert lines[-1] == f"3 artifacts, 1.5 MiB in {cache.root}"


def test_verify_names_what_is_damaged(command: Any, cache: ArtifactCache) -> None:
    assert command("verify").out.strip() == "3 artifacts, 1.5 MiB, all whole"
    first, second, third = cache.entries()
    first.path.write_bytes(first.path.read_bytes()[:-1])
    second.path.write_bytes(third.path.read_bytes())
    ended = command("verify")
    assert ended.status == 2
    assert ended.error == "bco-lab: error: 2 of 3 artifacts are damaged; runs compute them anew"
    assert str(first.path) in ended.out
    assert f"{second.path}: it belongs to another key" in ended.out
    assert str(third.path) not in ended.out


def test_clear_deletes_a_kind_or_all(command: Any, cache: ArtifactCache) -> None:
    wrong = command("clear", "token")
    assert (wrong.status, "there is: p-desirable, tokens" in wrong.error) == (2, True)
    assert command("clear", "tokens").out.strip() == "2 artifacts, 1.0 MiB deleted"
    assert [entry.kind for entry in cache.entries()] == ["p-desirable"]
    assert command("clear").out.strip() == "1 artifact, 0.5 MiB deleted"
    assert cache.entries() == []
    assert command("ls").out.strip() == f"0 artifacts, 0.0 MiB in {cache.root}"
