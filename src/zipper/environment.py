"""What zipper stands on: which extra a module belongs to, which versions were tried, and the pip
command for either.

All of it is read: extras from the package's own metadata, tried versions from tried.json, which
`make matrix` writes. Nothing heavy is imported, and nothing here knows what is done with a module.
"""

import importlib
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from platform import python_version
from typing import Any

from zipper.errors import BrokenExtra as BrokenExtra
from zipper.errors import MissingExtra as MissingExtra

PACKAGE = "zipper-lm"
TRIED = Path(__file__).with_name("tried.json")
MOVING = ("torch", "transformers")  # what a tower is run by, and what changes under it


@cache
def extras() -> dict[str, tuple[str, ...]]:
    """The packages of each extra, `all` apart; no extras where zipper runs without being
    installed."""
    found: dict[str, tuple[str, ...]] = {}
    with suppress(PackageNotFoundError):
        for line in requires(PACKAGE) or ():
            package, marked = (
                re.match(r"[\w.-]+", line),
                re.search(r"extra == ['\"]([\w-]+)['\"]", line),
            )
            if package and marked and marked[1] != "all":
                found[marked[1]] = (*found.get(marked[1], ()), package[0])
    return found


def importable(package: str) -> str:
    """The module that a package of an extra is imported by."""
    others = {"pillow": "PIL", "pytest-xdist": "xdist", "scikit-learn": "sklearn"}
    return others.get(package, package.replace("-", "_"))


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{PACKAGE}[{extra}]'"


def extra(module: str) -> Any:
    """A module of an extra, imported when it is needed. Raises MissingExtra, which says how to
    install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library below it that does not load
        raise lacking(module, error) from error


def home(module: str) -> str | None:
    """The extra that brings a module; None where none does."""
    top = module.partition(".")[0]
    return next(
        (name for name, packages in extras().items() if top in map(importable, packages)), None
    )


def lacking(module: str, error: Exception) -> MissingExtra:
    """What an import that failed by this error means."""
    top, name = module.partition(".")[0], home(module)
    todo = install(name) if name else f"pip install {top}"
    if isinstance(error, ModuleNotFoundError) and (error.name or top).partition(".")[0] == top:
        return MissingExtra(f"This needs {top}, which is not installed. Do: {todo}")
    return BrokenExtra(
        f"This needs {top}, which is installed and does not load ({error}). Do: {todo}"
    )


def need(*names: str) -> None:
    """Raises MissingExtra unless every package of these extras can be imported: for long work,
    before it begins."""
    for name in names:
        for package in extras().get(name, ()):
            extra(importable(package))


@cache
def tried() -> Mapping[str, tuple[str, ...]]:
    """The versions of python, torch and transformers with which the tests were green, oldest
    first."""
    return {
        name: tuple(versions)
        for name, versions in json.loads(TRIED.read_text(encoding="utf-8")).items()
    }


def installed(name: str) -> str | None:
    """The version of a package that is imported, or would be; None where there is none. "python" is
    one, as 3.11."""
    if name == "python":
        return ".".join(python_version().split(".")[:2])
    # The truth, whatever metadata says.
    loaded = getattr(sys.modules.get(name), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, without what stands behind them: 2.13.0+cpu is (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def newer(name: str, found: str) -> bool:
    """Whether a version is newer than the newest that was tried, in as many numbers as that one
    has."""
    newest = numbers(tried()[name][-1])
    return numbers(found)[: len(newest)] > newest


def untried() -> dict[str, str]:
    """Which of torch and transformers are here in a version that is newer than the newest that was
    tried."""
    here = {name: installed(name) for name in MOVING}
    return {name: found for name, found in here.items() if found and newer(name, found)}


def known_ground() -> str:
    """The command that installs the newest versions that were tried."""
    return "pip install " + " ".join(f"'{name}=={tried()[name][-1]}'" for name in MOVING)


def moved() -> str:
    """The sentence that doubts the ground rather than what stands on it; "" where every version was
    tried or is older."""
    new = [
        f"{name} {found}, the newest that was tried is {tried()[name][-1]}"
        for name, found in untried().items()
    ]
    return (
        f"Here is {'; here is '.join(new)}: that may be the cause. Do: {known_ground()}"
        if new
        else ""
    )
