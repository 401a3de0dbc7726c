"""How a command is run: bad input, failures and interrupts become one line and an exit code, and
other libraries keep quiet. Knows no command."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import typer

from zipper import environment
from zipper.errors import ZipperError


@final
class Ended(Exception):
    """A command ended with an exit code that is not 0, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def answered(name: str, command: Callable[..., Any]) -> Callable[..., None]:
    """A command that raises `Ended` where it returned an exit code or failed.

    name: how its lines on stderr begin. Wrong usage passes: it is told with the usage (`refuse`).
    """

    def answer(**given: Any) -> None:
        try:
            with _one_voice():
                code = command(**{key: _at_home(value) for key, value in given.items()})
        except (typer.TyperException, typer.Exit, typer.Abort):
            raise
        except ZipperError as error:
            raise _said(name, 2, str(error)) from error
        except KeyboardInterrupt:
            raise _said(name, 1, "interrupted") from None
        except BrokenPipeError:
            raise Ended(1) from None
        except Exception as error:
            if os.environ.get("ZIPPER_DEBUG"):
                raise
            raise _failed(name, error) from error
        if code:
            raise Ended(code)

    return answer


def refuse(error: typer.TyperException) -> int:
    """Say what was wrong with what was typed; returns the exit code."""
    context = getattr(error, "ctx", None)  # only errors of usage have one
    if context is not None:
        print(context.get_usage(), file=sys.stderr)
    name = context.command_path if context is not None else "zipper"
    return _said(name, error.exit_code, error.format_message()).code


def _failed(name: str, error: Exception) -> Ended:
    """The line for what nobody foresaw; a module that is missing was imported by a recipe, or by a
    library."""
    if isinstance(error, ModuleNotFoundError) and environment.home(error.name or ""):
        return _said(name, 2, str(environment.lacking(str(error.name), error)))
    told = f"failed by {type(error).__name__}: {error} (ZIPPER_DEBUG=1 shows where)"
    return _said(name, 1, told)


def _said(name: str, code: int, message: str) -> Ended:
    """Print one line, whatever was quoted in it."""
    print(f"{name}:", *message.split(), file=sys.stderr)
    return Ended(code)


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
