"""What a modality is to the rest of zipper: raw data to ids and back. It knows nothing of
towers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from zipper.errors import ZipperError
from zipper.saving.files import place


@runtime_checkable
class Modality(Protocol):
    """Raw <-> ids. `begin` and `end` are the ids around a segment, `vocabulary` counts all ids,
    `fingerprint` is a sha256 of what
    defines the mapping: two modalities with the same fingerprint give the same ids.
    """

    name: str
    begin: int
    end: int
    vocabulary: int

    @property
    def fingerprint(self) -> str:
        """sha256, in hex."""

    def encode(self, raw: Any) -> list[int]:
        """Ids without begin and end. Raises ZipperError for raw data that has no ids."""

    def decode(self, ids: Sequence[int]) -> Any:
        """Raw data; ids that stand for none (begin, end, voices) are passed over."""

    def save(self, folder: str | Path) -> None:
        """Write the whole definition into a folder."""

    @classmethod
    def load(cls, folder: str | Path) -> "Modality":
        """Read what `save` wrote. Raises ZipperError for anything else."""


def load(folder: str | Path) -> Modality:
    """The modality that a folder holds: speech units or a tokenizer, told apart by their files."""
    from zipper.modality.speech import SpeechUnits
    from zipper.modality.text import Text

    folder = place(folder)
    if (folder / SpeechUnits.CONFIG).is_file():
        return SpeechUnits.load(folder)
    if (folder / Text.DEFINITION).is_file():
        return Text.load(folder)
    raise ZipperError(
        f"{folder} holds no modality: neither {SpeechUnits.CONFIG} nor {Text.DEFINITION} is "
        "there. Give the folder of one."
    )
