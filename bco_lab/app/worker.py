"""One process of a distributed run: `python -m bco_lab.app.worker RUN_DIR`. It reads the run directory, never Hydra."""

import sys
from pathlib import Path


def main() -> int:
    """Run, and report an error once, not once for each process."""
    from bco_lab.app.main import guarded
    from bco_lab.app.pipeline import run

    return guarded(lambda: run(Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
