"""The command line, run in this process or in one of its own, on feedback logs written by the test."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import write_log

from bco_lab.app.main import main


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what was wrong."""
        return next(line for line in self.err.splitlines() if line.startswith("bco-lab: error: "))


Command = Callable[..., Finished]


@pytest.fixture
def environment(model_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, the converted demo model, no network."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BCO_LAB_CACHE", str(model_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return folder


@pytest.fixture
def bco_lab(environment: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["bco-lab", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        _forget_log_handlers()
        return Finished(int(end.value.code or 0), captured.out, captured.err)

    return run


def _forget_log_handlers() -> None:
    # `--info` makes Hydra log to the standard output of that moment, which is another one in the next test
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture
def start(environment: Path) -> Callable[[Sequence[str]], subprocess.Popen[str]]:
    """Starts the command in a process of its own."""

    def run(arguments: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bco_lab.app.main", *arguments],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def feedback_log(tmp_path: Path) -> Path:
    """Thirty rows of thumbs on ten prompts."""
    rows = [
        {"prompt": f"Question {i % 10}?", "completion": f"answer {'good ' * (i % 4)}{i}", "label": i % 3 == 0}
        for i in range(30)
    ]
    return write_log(tmp_path / "feedback.jsonl", rows)
