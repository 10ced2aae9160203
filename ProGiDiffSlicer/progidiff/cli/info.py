"""``progidiff info``: what a model is made of, and what its card says."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from progidiff.errors import InputError


class Backbone(StrEnum):
    """Published backbones whose parameter table can be made without their weights."""

    SD15 = "sd15"
    SD21 = "sd21"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    config: Annotated[
        Backbone | None,
        typer.Option(help="Parameter table of the method on a Stable Diffusion version, without weights."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model folder; without it and --config, the bundled model."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Parameter table of a configuration, or parameters and card of a model folder."""
    if config is not None and model is not None:
        raise InputError("Give either --config or --model, not both.")
    from progidiff.model.parameters import print_info
    from progidiff.places import default_model_folder

    chosen = config.value if config is not None else model or default_model_folder()
    result = print_info(chosen, as_json=as_json)
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else result)
