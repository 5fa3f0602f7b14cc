"""Content-addressed artifacts on disk: what is costly to compute is computed by whoever comes first.

An artifact is one safetensors file named after its key. Its header holds the key in full, a checksum of the content and
facts about it. It appears whole or not at all; one that is damaged is computed anew. Nothing is pickled.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bco_lab.files import atomic_path

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
_HEADER = ("key", "checksum", "facts")


def cache_folder() -> Path:
    """Where artifacts and converted models are kept: $BCO_LAB_CACHE, else bco-lab under the user's cache folder."""
    chosen = os.environ.get("BCO_LAB_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bco-lab"


@dataclass(frozen=True)
class ArtifactKey:
    """Everything that an artifact's numbers depend on.

    Attributes:
        kind: What it is; also its folder. A word of lower-case letters and hyphens.
        version: Of the code that computes it: another version is another artifact.
        parts: JSON-able; equal parts, equal numbers.
    """

    kind: str
    version: int
    parts: Mapping[str, Any]

    def canonical(self) -> str:
        """The key as text, equal for equal keys."""
        return json.dumps({"kind": self.kind, "version": self.version, "parts": self.parts}, sort_keys=True)

    @property
    def digest(self) -> str:
        """40 hex digits of the SHA-256 of the key."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:40]


@dataclass(frozen=True, eq=False)
class Artifact:
    """What is kept.

    Attributes:
        arrays: Name to values.
        facts: JSON-able, what else is known of them.
    """

    arrays: Arrays
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Use:
    """One artifact that was computed or read.

    Attributes:
        kind: Of the artifact.
        reused: Whether it was there already.
        seconds: It took to compute or to read, waiting included.
        digest: Of its key.
    """

    kind: str
    reused: bool
    seconds: float
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """A kept artifact.

    Attributes:
        kind: Of the artifact.
        digest: Of its key.
        path: Of its file.
        size: Bytes.
        modified: Seconds since 1970.
    """

    kind: str
    digest: str
    path: Path
    size: int
    modified: float


class Claim:
    """An artifact that somebody waits for.

    Attributes:
        found: What was there; None: compute it and `keep` it.
        kept: Whether it was computed and kept.
    """

    def __init__(self, found: Artifact | None, write: Callable[[Artifact], None]) -> None:
        self.found = found
        self.kept = False
        self._write = write

    def keep(self, artifact: Artifact) -> Artifact:
        """Write what was computed, and return it."""
        self._write(artifact)
        self.kept = True
        return artifact


class ArtifactCache:
    """Artifacts in a folder, shared by every process that can see it.

    Args:
        root: The folder; None: `artifacts` in `cache_folder()`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_folder() / "artifacts"
        self.uses: list[Use] = []

    def get_or_compute(self, key: ArtifactKey, compute: Callable[[], Artifact]) -> Artifact:
        """The artifact of a key: read if it is there and whole, else computed and kept.

        Of several processes that ask at the same time one computes, the others wait and read.

        Args:
            key: What the numbers depend on.
            compute: Makes the artifact; an error in it leaves nothing behind.
        """
        with self.claim(key) as claim:
            return claim.found if claim.found is not None else claim.keep(compute())

    @contextmanager
    def claim(self, key: ArtifactKey) -> Iterator["Claim"]:
        """Say that an artifact is wanted; where it is not there, nobody else computes it while this is open.

        For those who cannot compute in a function, such as several processes together.
        """
        started = time.monotonic()
        path = self.path_of(key)
        artifact = self._read(path, key)
        with nullcontext() if artifact is not None else self._locked(path):
            if artifact is None:
                artifact = self._read(path, key)  # another process may have been faster
            claim = Claim(artifact, lambda made: self._write(path, key, made))
            yield claim
            if artifact is not None or claim.kept:
                reused = artifact is not None
                self._note(Use(key.kind, reused, round(time.monotonic() - started, 3), key.digest))

    def path_of(self, key: ArtifactKey) -> Path:
        """Where the artifact of a key is kept."""
        return self.root / key.kind / f"{key.digest}.safetensors"

    def _locked(self, path: Path) -> AbstractContextManager[Any]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".lock").touch()
        except OSError:  # a folder that cannot be written to: nothing to keep others from
            return nullcontext()
        return FileLock(path.with_suffix(".lock"))

    def entries(self) -> list["Entry"]:
        """What is kept, by kind, oldest first."""
        found = []
        for path in self.root.glob("*/*.safetensors"):
            status = path.stat()
            found.append(Entry(path.parent.name, path.stem, path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry.kind, entry.modified))

    def problem_of(self, entry: "Entry") -> str | None:
        """What is wrong with a kept artifact; None where it is whole."""
        try:
            header, arrays = _load(entry.path)
        except (SafetensorError, OSError) as error:
            return str(error)
        problem = _problem(header, arrays)
        if problem is None and hashlib.sha256(header["key"].encode()).hexdigest()[:40] != entry.digest:
            return "it belongs to another key"
        return problem

    def remove(self, entry: "Entry") -> None:
        """Delete a kept artifact, unless somebody is computing it anew."""
        lock = entry.path.with_suffix(".lock")
        with FileLock(lock):
            entry.path.unlink(missing_ok=True)

    def _note(self, use: Use) -> None:
        self.uses.append(use)
        logger.info("cache: %s %s in %.1f s", use.kind, "reused" if use.reused else "computed", use.seconds)

    def _read(self, path: Path, key: ArtifactKey) -> Artifact | None:
        if not path.is_file():
            return None
        try:
            header, arrays = _load(path)
        except (SafetensorError, OSError) as error:
            problem: str | None = str(error)
        else:
            problem = _problem(header, arrays)
            if problem is None and header["key"] != key.canonical():
                problem = "it belongs to another key"
        if problem is None:
            return Artifact(arrays, json.loads(header["facts"]))
        logger.warning("cache: %s is damaged and computed anew: %s", path, problem)
        return None

    def _write(self, path: Path, key: ArtifactKey, artifact: Artifact) -> None:
        arrays = {name: np.ascontiguousarray(values) for name, values in artifact.arrays.items()}
        facts = json.dumps(dict(artifact.facts), sort_keys=True)
        header = {"key": key.canonical(), "checksum": _checksum(arrays, facts), "facts": facts}
        try:
            with atomic_path(path) as temporary:
                save_file(arrays, temporary, metadata=header)
        except OSError as error:  # a full or read-only disk is no reason to lose what was computed
            logger.warning("cache: %s cannot be kept: %s", path, error)


def digest_of(*values: NDArray[Any] | str) -> str:
    """40 hex digits of the SHA-256 of arrays (their type, shape and bytes) and texts, in this order."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            content, label = value.encode(), "text"
        else:
            content, label = np.ascontiguousarray(value).tobytes(), f"{value.dtype.str}{list(value.shape)}"
        digest.update(f"{label}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:40]


def _load(path: Path) -> tuple[dict[str, str], Arrays]:
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return file.metadata() or {}, arrays


def _problem(header: Mapping[str, str], arrays: Arrays) -> str | None:
    """Why a file must not be used; None if it may."""
    if set(header) != set(_HEADER) or header["checksum"] != _checksum(arrays, header["facts"]):
        return "its checksum is wrong"
    try:
        facts = json.loads(header["facts"])
    except ValueError:
        facts = None
    return None if isinstance(facts, dict) else "its facts are no JSON object"


def _checksum(arrays: Arrays, facts: str) -> str:
    return digest_of(facts, *(part for name in sorted(arrays) for part in (name, arrays[name])))
