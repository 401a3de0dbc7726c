"""Kinds of modality by name: those that are shipped, registered, or brought by an installed
package."""

from importlib import import_module
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
#: Those that come with zipper, and where: none is imported before it is asked for.
SHIPPED_KINDS = {
    "text": "zipper.modality.text:Text",
    "speech": "zipper.modality.speech:SpeechUnits",
    "symbols": "zipper.modality.symbols:Symbols",
    "signal": "zipper.modality.signal:Signal",
    "image": "zipper.modality.image:Image",
    "codec": "zipper.modality.codec:Codec",
    "units": "zipper.modality.encoder:EncoderUnits",
}
SHIPPED = ("text", "speech")  # known by their files, which were there before kinds were
_registered: dict[str, Any] = {}


def register(kind: K) -> K:
    """Makes a class of modality known by its `name`, so that saved ones can be loaded in this
    process; also as a decorator. A package that is installed declares it instead, in the entry
    point group `zipper.modalities`: name = "package.module:Class". What is shipped keeps its name.
    """
    named: Any = kind
    _registered[named.name] = kind
    return kind


def of_kind(name: str) -> type[Any]:
    """The class of a kind, by its name: shipped, registered, or declared by an installed package,
    in that order. Raises a ZipperError for a name that nothing here knows."""
    found = _found(name)
    if found is None:
        known = [*SHIPPED_KINDS, *_registered, *entry_points(group="zipper.modalities").names]
        raise ZipperError(
            f"The kind of modality {name!a:.80} was asked for, which nothing here knows; known are "
            f"{', '.join(dict.fromkeys(known))}. Take one of these, or install the package that "
            "brings it."
        )
    return found


def save(modality: Modality, folder: Path) -> None:
    """A modality and its kind, into a folder of its own; text and speech are known by their
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
        named = read_json(folder / KIND).get("kind")
        found = _found(named)
        if found is None:
            raise ZipperError(
                f"{folder} holds a modality of the kind {named!a:.80}, which nothing here knows. "
                "Install the package that brings it (entry point group zipper.modalities), or call "
                "zipper.modality.register(YourClass) first."
            )
        loaded: Modality = found.load(folder)
        return loaded
    if (folder / SpeechUnits.CONFIG).is_file():
        return SpeechUnits.load(folder)
    if (folder / Text.DEFINITION).is_file():
        return Text.load(folder)
    raise ZipperError(
        f"{folder} holds no modality: none of {KIND}, {SpeechUnits.CONFIG} and {Text.DEFINITION} "
        "is there. Give the folder of one."
    )


def _found(name: Any) -> Any:
    """The class of a kind; None where nothing knows the name."""
    if not isinstance(name, str):
        return None
    if name in SHIPPED_KINDS:
        module, _, made = SHIPPED_KINDS[name].partition(":")
        return getattr(import_module(module), made)
    if name in _registered:
        return _registered[name]
    return next(
        (entry.load() for entry in entry_points(group="zipper.modalities", name=name)), None
    )
