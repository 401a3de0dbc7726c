"""Commands that look: at a model, at a run, at what zipper stands on."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from zipper.cli.options import (
    LOOK,
    AllowMismatch,
    Bases,
    Json,
    SavedModel,
    command,
    named,
    pipeline,
    writable,
)
from zipper.errors import ZipperError

app = typer.Typer()


@command(app, LOOK, "zipper show runs/demo/model")
def show(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="a saved model: folder or hub id; or the folder of a run",
            show_default="the shipped model",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="page to write of a run", show_default="run.html in its folder"
        ),
    ] = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    as_json: Json = False,
) -> None:
    """Show a model: towers, junctions, what trains, gates, size; or a run: its curves as a page."""
    from zipper.inspection import describe, text
    from zipper.training import history

    if model and (Path(model) / history.METRICS).is_file():
        if towers or allow_mismatch:
            raise ZipperError(
                f"--tower and --allow-mismatch are for a model, and {model} is a run. Leave them "
                "out, or name its model."
            )
        _show_run(Path(model), output, as_json)
        return
    if output:
        raise ZipperError(
            f"-o is for the page of a run; {model or 'the shipped model'} is a model. Leave it out."
        )
    found = describe(pipeline(model, towers, allow_mismatch), _folder(model))
    print(json.dumps(found, indent=1) if as_json else text(found))


def _show_run(folder: Path, output: Path | None, as_json: bool) -> None:
    """The curves of a run as a page, how it went as text."""
    from zipper.training import history

    run = history.History.read(folder)
    page = output or folder / "run.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise ZipperError(f"{page} was given for a page of HTML. Let its name end in .html.")
    writable(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    history.write(page, run)
    said = run.summary() | {"page": str(page)}
    print(json.dumps(said, indent=1) if as_json else f"{history.text(said)}\npage        {page}")


@command(app, LOOK, "zipper verify")
def verify(
    model: SavedModel = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    only: Annotated[
        str, typer.Option(metavar="PROMISE", help="those that begin with this", show_default="all")
    ] = "",
    as_json: Json = False,
) -> int:
    """Try a model's promises: frozen towers unharmed, no leaks, packed and cached as one; 1 if one
    is broken."""
    import torch

    from zipper.model import Zipper
    from zipper.pipeline import PINS
    from zipper.saving import checkpoint
    from zipper.verify import verify as run_verification

    folder = _folder(model)
    if (folder / PINS).is_file():
        zipped = pipeline(model, towers, allow_mismatch).zip
    else:  # a model that was saved without modalities has promises too
        bases = named("--tower", towers)
        zipped = Zipper.from_pretrained(folder, bases, torch.float32, allow_mismatch)
    pins = checkpoint.read_json(folder / checkpoint.CONFIG)["config"]["towers"]
    pinned = {name: tower["digest"] for name, tower in pins.items()}
    checks = run_verification(zipped, only=only, pinned=pinned)
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{'ok    ' if check.held else 'BROKEN'}  {check.promise}: {check.measured}")
    return int(not all(check.held for check in checks))


@command(app, LOOK, "zipper towers llama bloom")
def towers(
    family: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FAMILY",
            help="names of transformers' causal-LM mapping, or imagegpt",
            show_default="all",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which decoders of the installed transformers can be towers, by trying tiny ones."""
    from tqdm import tqdm

    from zipper.towers import families

    chosen = tqdm(family or families.names(), desc="towers", unit="family", disable=None)
    found = [families.tried(name) for name in chosen]
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
    else:
        print(families.text(found))


@command(app, LOOK, "zipper doctor")
def doctor(as_json: Json = False) -> int:
    """Say what zipper stands on here, and whether it works; 1 if something installed does not."""
    from zipper import doctor as ward

    found = ward.examine()
    print(json.dumps(ward.record(found), indent=1) if as_json else ward.text(found))
    return int(not ward.works(found))


def _folder(model: str | None) -> Path:
    """Where the files of the given model are."""
    from zipper.pipeline import SHIPPED
    from zipper.saving import hub

    return hub.fetch(model).folder if model else SHIPPED
