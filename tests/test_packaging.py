"""The wheel carries its configuration: the command works from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import Trainer

import bco_lab
from bco_lab import BCOConfig, BCOTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("bco_lab-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_the_wheel_holds_every_configuration_file_and_module(unpacked: Path) -> None:
    for folder, inside in (("conf", "bco_lab/conf"), ("bco_lab", "bco_lab")):
        shipped = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.suffix in (".yaml", ".py")}
        packed = {p.relative_to(unpacked / inside) for p in (unpacked / inside).rglob("*")}
        assert len(shipped) > 20
        assert shipped <= packed


def test_the_installed_command_runs_from_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    code = "import bco_lab.app.main as m, sys; print(m.conf_folder()); sys.argv = ['bco-lab', '--cfg', 'job']; m.main()"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    run = [sys.executable, "-c", code]
    shown = subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines()[0] == str(unpacked / "bco_lab" / "conf")
    assert "beta: 0.1" in shown
    assert not list(tmp_path.iterdir())


def test_the_library_is_one_import_away() -> None:
    assert issubclass(BCOTrainer, Trainer)
    assert BCOConfig.__dataclass_fields__["beta"].default == 0.1
    with pytest.raises(AttributeError, match="has no attribute 'BCO'"):
        _ = bco_lab.BCO
