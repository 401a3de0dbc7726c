"""The command line: what is typed becomes one call of a command, and its answer an exit code: 0
done, 1 failed, 2 wrong usage or input.

Commands stand beside their options, in files by what one does: `use`, `make`, `look`. Others are
brought by installed packages (`zipper.cli.entries`); the laboratory is one of them, and nothing
here knows it. Heavy imports stand inside the commands, so that `zipper --help` answers at once.
"""

import os
import sys
from collections.abc import Iterator, Sequence

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from zipper.cli.answers import Ended, answered, refuse
from zipper.cli.entries import brought
from zipper.cli.options import Panels


def main(arguments: Sequence[str] | None = None, beside: typer.Typer | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage and `--help` end in SystemExit.

    arguments: the words behind `zipper`; None = those of this process. beside: commands of a
    package that is not installed.
    """
    # Waiting threads that spin for long starve each other on small machines, those that never spin
    # are woken late: 3,000 rounds are some microseconds (docs/log.md). Must be set before torch is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    words = sys.argv[1:] if arguments is None else [*arguments]
    try:
        found = program(words, beside).main(words, prog_name="zipper", standalone_mode=False)
    except Ended as ended:
        return ended.code
    except typer.TyperException as error:
        raise SystemExit(refuse(error)) from None
    if found is None:
        return 0
    raise SystemExit(found)  # the 0 of --help


def program(words: Sequence[str] = (), beside: typer.Typer | None = None) -> TyperGroup:
    """All commands, each of which returns nothing or raises `Ended`.

    words: what was typed. Where it names one of our own commands, other packages are not asked:
    they would cost time, and one that is broken has nothing to do with it. beside: as in `main`.
    """
    from zipper.cli import look, make, use

    app = typer.Typer(
        cls=Panels,
        help="Zip decoders that were pre-trained alone into one model.",
        subcommand_metavar="COMMAND ...",
        rich_markup_mode=None,  # plain text: rich costs more than all of the rest
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    for part in (use.app, make.app, look.app):
        app.add_typer(part)
    top = get_command(app)
    assert isinstance(top, TyperGroup)
    if not (words and words[0] in top.commands):
        top.commands.update(brought(top.commands, beside))
    for context in commands(top):
        command = context.command
        if command.callback is not None:
            command.callback = answered(context.command_path, command.callback)
    return top


def commands(top: TyperGroup | None = None) -> Iterator[typer.Context]:
    """Every command of a program (by default `program()`), each before those below it, as a context
    that knows its `command` and its `command_path`, e.g. `zipper bench decode`.

    Their help is told at 100 columns.
    """
    top = top or program()
    yield from _below(top, _whole(top))


def markdown() -> str:
    """docs/cli.md, made from the commands themselves."""
    top = program()
    parts = ["# Command line\n\nMade by `make docs` from the commands; do not edit.\n"]
    parts.append(f"```text\n{_whole(top).get_help()}\n```\n")
    parts += [
        f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"
        for context in commands(top)
    ]
    return "\n".join(parts)


def _whole(top: TyperGroup) -> typer.Context:
    """What typer makes of the program when it is called, in a window of 100 columns."""
    return typer.Context(top, info_name="zipper", terminal_width=100, **top.context_settings)


def _below(group: TyperGroup, above: typer.Context) -> Iterator[typer.Context]:
    """Contexts of the commands below one, each before those below it."""
    for name, command in group.commands.items():
        assert isinstance(command, TyperCommand | TyperGroup)
        context = typer.Context(command, above, info_name=name, **command.context_settings)
        yield context
        if isinstance(command, TyperGroup):
            yield from _below(command, context)
