"""Where a run happens: in this process, or in several that share it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bco_lab.app import run_directory
from bco_lab.app.checks import build


@dataclass(frozen=True)
class LocalLauncher:
    """One process: this one."""

    def launch(self, run_dir: Path) -> None:
        """Run what the folder's configuration describes."""
        from bco_lab.app.pipeline import run

        run(run_dir)


@dataclass(frozen=True)
class DistributedLauncher:
    """Data parallel: `accelerate launch` on GPUs, torchrun with gloo on CPUs.

    `accelerate launch --cpu --num_processes N` starts one process only, hence torchrun there.

    Args:
        num_processes: Processes on this machine.
        main_process_port: Port of the rendezvous; 0: a free one.
        threads_per_process: Torch threads of each process on CPUs; None: the cores, shared out.
    """

    num_processes: int = 2
    main_process_port: int = 0
    threads_per_process: int | None = None
    sharding: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be >= 1")

    def launch(self, run_dir: Path) -> None:
        """Start the workers on the folder's configuration and wait.

        Raises:
            ChildProcessError: A worker failed; its own message is above and in run.log.
        """
        import torch

        environment = os.environ | self.sharding
        if torch.cuda.is_available():
            command = self._accelerate(torch.cuda.device_count())
        else:
            command = self._torchrun()
            threads = self.threads_per_process or max(1, (os.cpu_count() or 1) // self.num_processes)
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run([*command, "-m", "bco_lab.app.worker", str(run_dir)], env=environment)
        if finished.returncode != 0:
            raise ChildProcessError(
                f"a worker failed with status {finished.returncode}; see {run_dir / run_directory.LOG}"
            )

    def _accelerate(self, devices: int) -> list[str]:
        if devices < self.num_processes:
            raise ValueError(f"launcher.num_processes={self.num_processes} but this machine has {devices} GPU(s)")
        return [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"),
            *("--num_processes", str(self.num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", str(self.main_process_port)),
            *(["--multi_gpu"] if self.num_processes > 1 else []),
        ]

    def _torchrun(self) -> list[str]:
        where = ["--standalone"] if self.main_process_port == 0 else ["--master-port", str(self.main_process_port)]
        return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(self.num_processes)]


@dataclass(frozen=True)
class ShardedLauncher(DistributedLauncher):
    """Fully sharded data parallel (FSDP2): weights, gradients and optimizer state are split over the processes."""

    sharding: ClassVar[dict[str, str]] = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_processes < 2:
            raise ValueError(f"num_processes={self.num_processes} must be >= 2: there is nothing to split over one")


def launch(run_dir: Path) -> float | None:
    """Run, or go on with, what is prepared in a folder; print its summary and return its objective."""
    from rich.console import Console

    from bco_lab.app.summary import render_summary

    cfg = run_directory.read_config(run_dir)
    result = run_directory.finished_result(run_dir)
    if result is None:
        launcher: Any = build(cfg, "launcher")
        launcher.launch(run_dir)
        result = run_directory.finished_result(run_dir)
        assert result is not None
    else:
        print(f"{run_dir} is finished already.")
    render_summary(Console(), result)
    objective: float | None = result["objective"]
    return objective
