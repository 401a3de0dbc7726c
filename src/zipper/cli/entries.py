"""Commands that other installed packages bring: entry points of the group `zipper.commands`, each a
`typer.Typer`. Knows none of them.

A package that cannot be loaded, or that brings a name which is taken, costs one line on stderr and
nothing else.
"""

import os
import sys
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

GROUP = "zipper.commands"

Commands = dict[str, TyperCommand | TyperGroup]


def brought(taken: Collection[str], beside: typer.Typer | None = None) -> Commands:
    """The commands of other packages, by name.

    taken: names that are not theirs to give. beside: commands of a package that is not installed.
    """
    found = {} if beside is None else _made(beside)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            app: Any = entry.load()
            if app is beside:
                continue
            if not isinstance(app, typer.Typer):
                raise TypeError(f"it is a {type(app).__name__}, a typer.Typer was wanted")
            new = _made(app)
            if twice := sorted(new.keys() & {*taken, *found}):
                raise ValueError(f"there is another {', '.join(twice)}")
        except Exception as error:  # in code that is not ours: anything
            _say(entry, error)
            continue
        found |= new
    return found


def _made(app: typer.Typer) -> Commands:
    """The commands of an app, ready to be called; raises what typer does where one is not well
    made."""
    whole = typer.Typer(add_completion=False, rich_markup_mode=None)
    whole.add_typer(app)
    group = get_command(whole)
    assert isinstance(group, TyperGroup)
    return {
        name: command
        for name, command in group.commands.items()
        if isinstance(command, TyperCommand | TyperGroup)
    }


def _say(entry: EntryPoint, error: Exception) -> None:
    if "_ZIPPER_COMPLETE" in os.environ:  # a shell asks, at every touch of a key
        return
    whose = entry.dist.name if entry.dist else entry.value
    said = f"{type(error).__name__}: {error}".split()
    print(f"zipper: the commands of {whose} ({entry.value}) are left out:", *said, file=sys.stderr)
