"""What commands share: how they are written down, options that several take, and what is asked of
names and places before the work begins.

Packages that bring commands of their own use it too. Nothing heavy is imported until a command
runs.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, final

import typer
from typer.core import TyperCommand, TyperGroup

from zipper.errors import ZipperError

#: Parts of `zipper --help`: what one does with a command.
USE, MAKE, LOOK, LABORATORY = "Use", "Make", "Look", "Laboratory"

Function = TypeVar("Function", bound=Callable[..., Any])


@final
class Panels(TyperGroup):
    """Commands whose help lists them by what one does with them, on lines that are not cut off."""

    context_class = typer.Context  # what a callback asks for; typer makes one of its base class

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See click's `Group.format_commands`."""
        shown = {name: command for name, command in self.commands.items() if not command.hidden}
        width = max(map(len, shown), default=0)
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in shown.items():
            panel = getattr(command, "rich_help_panel", None)  # typer's own commands have one
            row = (name.ljust(width), command.get_short_help_str(limit=1000))
            panels.setdefault(panel if isinstance(panel, str) else "More", []).append(row)
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


@final
class Plain(TyperCommand):
    """A command whose help names arguments without their types, and of which an option takes all
    words up to the next option where its metavar says `...`: `--links a b` is `--links a --links
    b`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command.parse_args`."""
        greedy = {
            param.opts[0]
            for param in self.params
            if param.param_type_name == "option" and str(param.metavar).endswith("...")
        }
        words: list[str] = []
        option = ""  # the greedy one whose words these are
        for word, before in zip(args, ["", *args], strict=False):
            option = before if before in greedy else "" if word.startswith("-") else option
            words += [option, word] if option and before != option else [word]
        return super().parse_args(ctx, words)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """See click's `Command.format_options`."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            name, about = param.get_help_record(ctx) or ("", "")
            if param.param_type_name == "argument":
                rows["Arguments"].append((name.partition(" <")[0], about))
            elif name:
                rows["Options"].append((name, about))
        for section, lines in rows.items():
            if lines:
                with formatter.section(section):
                    formatter.write_dl(lines)


def command(
    app: typer.Typer, panel: str, example: str, name: str | None = None
) -> Callable[[Function], Function]:
    """Makes a function a command; its docstring is the help.

    example: a line that works, shown below the options. name: that of the function by default.
    """
    below = f"\b\nexample: {example}"  # \b: as it stands
    return app.command(name, cls=Plain, rich_help_panel=panel, epilog=below)


# --- numbers


def count(text: str | int) -> int:
    """A number from 1. Raises BadParameter."""
    digits = str(text)
    # More than 15 digits are no count, and no size either.
    if not (digits.isdecimal() and len(digits) < 16 and int(digits)):
        raise typer.BadParameter(f"{digits!r} is not a number from 1")
    return int(digits)


def threads(text: str | int) -> int:
    """A number from 0. Raises BadParameter."""
    return 0 if str(text) == "0" else count(text)


def number(text: str | float) -> float:
    """A number that is finite. Raises BadParameter."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise typer.BadParameter(f"{str(text)!r} is not a number")
    return found


# --- options that several commands take

Model = Annotated[
    str | None,
    typer.Option(
        help="a saved model: folder or hub id", show_default="the one that comes with the package"
    ),
]
SavedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="a saved model: folder or hub id", show_default="the shipped one"
    ),
]
Bases = Annotated[
    list[str] | None,
    typer.Option(
        "--tower",
        metavar="NAME=PATH",
        help="where a frozen tower of the model lies now: folder or hub id",
    ),
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="load it on another base, tokenizer or codebook than it was made with",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print as JSON")]


# --- what is asked before the work


def named(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """NAME=VALUE items as a dict. Raises ZipperError."""
    items = items or ()
    found = dict(item.partition("=")[::2] for item in items)
    if wrong := [item for item in items if not all(item.partition("="))]:
        raise ZipperError(f"{option} {wrong[0]!r} is not NAME=VALUE. Write e.g. text=runs/tower.")
    if len(found) < len(items):
        raise ZipperError(
            f"{option} says of one name two things: {', '.join(items)}. Leave one out."
        )
    return found


def pipeline(model: str | None, towers: Sequence[str] | None, allow_mismatch: bool) -> Any:
    """The `zipper.pipeline.Pipeline` that the options name."""
    from zipper.pipeline import Pipeline

    return Pipeline.from_pretrained(model, named("--tower", towers), allow_mismatch=allow_mismatch)


def writable(path: Path, read: Iterable[str | Path] = ()) -> None:
    """Raise ZipperError unless a file can be written there, folders made where they are missing:
    before the work, not after it. read: what would be lost if it were written over."""
    if path.exists() and any(Path(one).exists() and path.samefile(one) for one in read):
        raise ZipperError(
            f"{path} is what would be read, and writing there would lose it. Choose another place."
        )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ZipperError(f"{path} is a folder, a file was wanted.")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ZipperError(
            f"{path} cannot be written: {above} is no folder that you may write in. Choose "
            "another place."
        )


def absent(path: Path) -> None:
    """Raise ZipperError unless this is a new folder that can be made."""
    if path.exists():
        raise ZipperError(f"{path} exists. Choose a new folder.")
    writable(path)
