"""Kinds of modality by name: those that are shipped, registered, or brought by an installed
package."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from zipper.errors import ZipperError
from zipper.modality.kind import Kind as Kind
from zipper.modality.kind import Modality as Modality
from zipper.modality.kind import Scores as Scores
from zipper.modality.kind import is_ids as is_ids
from zipper.modality.kind import whole as whole
from zipper.saving.files import place, read_json, write_json

K = TypeVar("K", bound=type)

#: Says of a folder which kind of modality it holds.
KIND = "modality.json"
SHIPPED = ("text", "speech")
_registered: dict[str, Any] = {}


def register(kind: K) -> K:
    """Makes a class of modality known by its `name`, so that saved ones can be loaded in this
    process; also as a decorator. A package that is installed declares it instead, in the entry
    point group `zipper.modalities`: name = "package.module:Class". What is shipped keeps its name.
    """
    named: Any = kind
    _registered[named.name] = kind
    return kind


def save(modality: Modality, folder: Path) -> None:
    """A modality and its kind, into a folder of its own; those that are shipped are known by their
    files."""
    modality.save(folder)
    if modality.name not in SHIPPED:
        write_json(folder / KIND, {"kind": modality.name})


def load(folder: str | Path) -> Modality:
    """The modality that a folder holds, by the kind that it names. The folder names no code: who
    knows the kind is shipped, registered or installed. Raises a ZipperError where nobody does.

    Speech units and tokenizers name no kind: they are told apart by their files.
    """
    from zipper.modality.speech import SpeechUnits
    from zipper.modality.text import Text

    folder = place(folder)
    if (folder / KIND).is_file():
        kind = read_json(folder / KIND).get("kind")
        loaded: Modality = _known(kind, folder, (Text, SpeechUnits)).load(folder)
        return loaded
    if (folder / SpeechUnits.CONFIG).is_file():
        return SpeechUnits.load(folder)
    if (folder / Text.DEFINITION).is_file():
        return Text.load(folder)
    raise ZipperError(
        f"{folder} holds no modality: none of {KIND}, {SpeechUnits.CONFIG} and {Text.DEFINITION} "
        "is there. Give the folder of one."
    )


def _known(kind: Any, folder: Path, shipped: Sequence[Any]) -> Any:
    """The class of a kind."""
    known = _registered | {each.name: each for each in shipped}
    if isinstance(kind, str) and kind in known:
        return known[kind]
    for entry in entry_points(group="zipper.modalities", name=str(kind)):
        return entry.load()
    raise ZipperError(
        f"{folder} holds a modality of the kind {kind!a:.80}, which nothing here knows. Install "
        "the package that brings it (entry point group zipper.modalities), or call "
        "zipper.modality.register(YourClass) first."
    )
