"""Artifacts: computed once, read whole, never pickled."""

import json
import logging
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bco_lab.cache import Artifact, ArtifactCache, ArtifactKey, cache_folder, digest_of

KEY = ArtifactKey("prompt-embeddings", 1, {"model": "m", "limit": 256, "bounds": [0.5, 1]})
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def make(values=VALUES) -> Artifact:
    return Artifact({"values": values, "ids": np.array([3, 1])}, {"truncated": 2})


def refuse() -> Artifact:
    raise AssertionError("computed again")


def test_an_artifact_is_computed_once(tmp_path) -> None:
    cache = ArtifactCache(tmp_path)
    cache.get_or_compute(KEY, make)
    again = ArtifactCache(tmp_path)
    kept = again.get_or_compute(KEY, refuse)
    assert kept.arrays["values"].tolist() == VALUES.tolist()
    assert kept.arrays["values"].dtype == np.float32
    assert kept.arrays["ids"].tolist() == [3, 1]
    assert kept.facts == {"truncated": 2}
    assert [use.reused for use in (*cache.uses, *again.uses)] == [False, True]
    assert again.uses[0].to_dict()["kind"] == "prompt-embeddings"
    assert load_file(cache.path_of(KEY))["values"].tolist() == VALUES.tolist()  # anyone can read it


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, kind="p-desirable"),
        replace(KEY, version=2),
        replace(KEY, parts={**KEY.parts, "model": "n"}),
        replace(KEY, parts={**KEY.parts, "limit": 128}),
        replace(KEY, parts={**KEY.parts, "bounds": [1, 0.5]}),
    ],
)
def test_each_part_of_a_key_makes_another_artifact(tmp_path, other) -> None:
    cache = ArtifactCache(tmp_path)
    cache.get_or_compute(KEY, make)
    assert cache.get_or_compute(other, lambda: make(VALUES + 1)).arrays["values"][0, 0] == 1
    assert cache.get_or_compute(KEY, refuse).arrays["values"][0, 0] == 0


def test_the_order_of_parts_does_not_matter() -> None:
    assert replace(KEY, parts=dict(reversed(KEY.parts.items()))).digest == KEY.digest


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _swap(path: Path) -> None:
    cache = ArtifactCache(path.parent.parent)
    other = replace(KEY, version=9)
    cache.get_or_compute(other, make)
    cache.path_of(other).replace(path)


@pytest.mark.parametrize("damage", [_cut, _flip, _swap, lambda path: path.write_bytes(b"")])
def test_a_damaged_artifact_is_computed_anew_with_a_warning(tmp_path, caplog, damage) -> None:
    cache = ArtifactCache(tmp_path)
    cache.get_or_compute(KEY, make)
    damage(cache.path_of(KEY))
    with caplog.at_level(logging.WARNING, "bco_lab"):
        assert cache.get_or_compute(KEY, make).arrays["values"].tolist() == VALUES.tolist()
    assert f"{cache.path_of(KEY)} is damaged and computed anew" in caplog.text
    assert ArtifactCache(tmp_path).get_or_compute(KEY, refuse).facts == {"truncated": 2}


def test_an_error_leaves_nothing_behind(tmp_path) -> None:
    cache = ArtifactCache(tmp_path)

    def fail() -> Artifact:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cache.get_or_compute(KEY, fail)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
    assert cache.uses == []


def test_a_folder_that_cannot_be_written_to_costs_only_the_keeping(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ArtifactCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING, "bco_lab"):
        assert cache.get_or_compute(KEY, make).facts == {"truncated": 2}
    assert "cannot be kept" in caplog.text
    assert [use.reused for use in cache.uses] == [False]


def _ask(root: Path, counter: Path, results: Path) -> None:
    def compute() -> Artifact:
        with counter.open("a") as file:
            file.write("computed\n")
        time.sleep(0.5)
        return make()

    kept = ArtifactCache(root).get_or_compute(KEY, compute)
    (results / str(os.getpid())).write_text(json.dumps(kept.arrays["values"].tolist()))


def test_of_several_processes_one_computes(tmp_path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    context = multiprocessing.get_context("spawn")
    asking = [context.Process(target=_ask, args=(tmp_path, tmp_path / "counter", results)) for _ in range(2)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "counter").read_text() == "computed\n"
    assert [json.loads(path.read_text()) for path in results.iterdir()] == [VALUES.tolist()] * 2


def test_digests_tell_types_shapes_and_borders_apart() -> None:
    values = [
        (np.array([1, 2], dtype=np.int64),),
        (np.array([1, 2], dtype=np.uint64),),
        (np.array([[1, 2]], dtype=np.int64),),
        (np.array([1], dtype=np.int64), np.array([2], dtype=np.int64)),
        ("ab",),
        ("a", "b"),
        (),
    ]
    assert len({digest_of(*each) for each in values}) == len(values)
    assert digest_of(VALUES[:, ::2]) == digest_of(np.ascontiguousarray(VALUES[:, ::2]))


def test_the_folder_follows_its_variables(monkeypatch) -> None:
    monkeypatch.setenv("BCO_LAB_CACHE", "/elsewhere")
    assert ArtifactCache().root == Path("/elsewhere/artifacts")
    monkeypatch.delenv("BCO_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/bco-lab")
