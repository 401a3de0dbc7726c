"""How a command is run: bad input, failures and interrupts become one line and an exit code, and
other libraries keep quiet. Knows no command."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import typer

from zipper import environment
from zipper.errors import ZipperError


class Answer(NamedTuple):
    """What a command ended with; unlike a number, it is not what `--help` ends with."""

    code: int


def answered(name: str, command: Callable[..., Any] | None) -> Callable[..., Answer]:
    """A command that gives an answer where it returned an exit code, or nothing, or raised.

    name: how its lines on stderr begin. Wrong usage passes: it is told with the usage (`refuse`).
    """

    def answer(**given: Any) -> Answer:
        try:
            with _one_voice():
                found = {key: _at_home(value) for key, value in given.items()}
                return Answer((command(**found) if command else 0) or 0)
        except (typer.TyperException, typer.Exit, typer.Abort):
            raise
        except ZipperError as error:
            return _say(name, 2, str(error))
        except KeyboardInterrupt:
            return _say(name, 1, "interrupted")
        except BrokenPipeError:
            return Answer(1)
        except Exception as error:
            if os.environ.get("ZIPPER_DEBUG"):
                raise
            return _failed(name, error)

    return answer


def refuse(error: typer.TyperException) -> int:
    """Say what was wrong with what was typed; returns the exit code."""
    context = getattr(error, "ctx", None)  # only errors of usage have one
    if context is not None:
        print(context.get_usage(), file=sys.stderr)
    name = context.command_path if context is not None else "zipper"
    return _say(name, error.exit_code, error.format_message()).code


def _failed(name: str, error: Exception) -> Answer:
    """The line for what nobody foresaw; a module that is missing was imported by a recipe, or by a
    library."""
    if isinstance(error, ModuleNotFoundError) and environment.home(error.name or ""):
        return _say(name, 2, str(environment.lacking(str(error.name), error)))
    said = f"failed by {type(error).__name__}: {error} (ZIPPER_DEBUG=1 shows where)"
    return _say(name, 1, said)


def _say(name: str, code: int, message: str) -> Answer:
    """One line, whatever was quoted in it."""
    print(f"{name}:", *message.split(), file=sys.stderr)
    return Answer(code)


def _at_home(value: Any) -> Any:
    """`~` in paths: shells leave it where it stands behind a sign."""
    from zipper.saving.files import place

    if isinstance(value, Path):
        return place(value)
    if isinstance(value, list | tuple):
        return [_at_home(item) for item in value]
    return value


@contextmanager
def _one_voice() -> Iterator[None]:
    """Other libraries draw no bars and give no advice; they are heard where they fail. A warning of
    ours, or of CUDA, is one line.

    Only here, and only while a command runs: who imports zipper keeps his settings, and those of
    the environment and of -W hold.
    """
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if logging.lastResort:  # what has no handler of its own
        logging.lastResort.setLevel(logging.ERROR)
    for action, module in (
        ("default", r"zipper(\.|$)"),
        ("default", r"torch\.cuda(\.|$)"),
        ("ignore", ""),
    ):
        warnings.filterwarnings(action, module=module, append=True)  # type: ignore[arg-type]
    told = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"zipper: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = told
