"""``progidiff worker``: the background process that holds the model."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command. Its options are the worker's own, which starts without this program where speed
    counts.
    """
    app.command(
        "worker",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        short_help="Answer requests on standard input and output (started by other programs).",
    )(worker)


def worker(ctx: typer.Context) -> None:
    """Answer requests on standard input and output until they end; the log goes to standard error."""
    from progidiff.worker.server import main

    main(ctx.args)
