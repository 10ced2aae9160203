"""``python -m progidiff``: the worker, and the command line for everything else."""

from __future__ import annotations

import sys


def main() -> None:
    """Start the worker without the command line's imports: its client waits for the first answer."""
    if sys.argv[1:2] == ["worker"]:
        from progidiff.worker.server import main as worker

        worker(sys.argv[2:])
    from progidiff.cli.app import app

    app(prog_name="progidiff")


if __name__ == "__main__":
    main()
