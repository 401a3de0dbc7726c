"""What a modality is to the rest of zipper: raw data to ids and back. It knows nothing of towers.

`Modality` is what a tower needs of it; `Kind` is what people need beyond that: how a value is read
from a row or a command line, written to a file, shown on a page and compared with another. Inherit
from `Kind` and write what differs from the defaults.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from zipper.errors import ZipperError
from zipper.saving.files import write

#: Of a metric, a pair for each sample: over a corpus it is the sum of the first numbers by the sum
#: of the second ones, e.g. word errors by words.
Scores = Mapping[str, Sequence[tuple[float | int, float | int]]]

#: Of a string that is encoded at once; War and Peace has three times as many.
MOST_LETTERS = 1 << 20


@runtime_checkable
class Modality(Protocol):
    """Raw <-> ids.

    name: of its kind, by which a saved one is loaded. begin, end: the ids around a segment.
    vocabulary: counts all ids. fingerprint: a sha256 of what defines the mapping: two modalities
    with the same fingerprint give the same ids.
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


class Kind:
    """Defaults for all that a modality may do beyond `Modality`.

    A list of whole numbers is ids for every kind, and never comes here.
    """

    name: str
    #: What is read from a row or a command line, in words, for errors.
    takes: ClassVar[str] = "a value that `encode` takes"
    #: A value as people write one, for programs that show how.
    like: ClassVar[str] = "..."
    #: Ending of the file that `write` makes; "" where a value is told in a line (`told`).
    suffix: ClassVar[str] = ""
    #: Of rows: the key that names a prefix of a segment, and the field that then holds its id, as
    #: "voice" ("voice~speech" in a task is speech behind it); "" where there is none.
    prefixed: ClassVar[str] = ""

    #: The depth at which others read a tower of this kind best: of pre-trained text its embeddings,
    #: where words differ most. None: where it is fused.
    shows: ClassVar[int | None] = None

    #: Whether it is taken from a model (`of_model`) and there is nothing to fit.
    modelled: ClassVar[bool] = False
    #: Ids of every segment, where its length alone says its end; 0 where an id does.
    length: int = 0

    begin: int
    end: int
    vocabulary: int

    @property
    def prefixes(self) -> Mapping[str, int]:
        """Names of what may stand first in a segment (voices, styles), and their ids."""
        return {}

    def encode(self, raw: Any) -> list[int]:
        """See `Modality.encode`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> Any:
        """See `Modality.decode`."""
        raise NotImplementedError

    def accepts(self, value: Any) -> bool:
        """Whether a value of a row is of the form that `read` takes; what is in it, `read` says."""
        return True

    def read(self, value: Any, folder: Path = Path()) -> Any:
        """What `encode` takes, from a row of a manifest, a command line, or raw already.

        folder: where the paths of a manifest begin. Raises ZipperError for anything else.
        """
        return value

    def noted(self, raw: Any) -> tuple[list[int], str]:
        """Its ids, and in a word what of it has none and was passed over ("" for nothing)."""
        return self.encode(raw), ""

    def files(self, value: Any, folder: Path = Path()) -> list[Path]:
        """The files that a value of a row names, whether they are there or not."""
        return []

    def there(self, raw: Any) -> bool:
        """Whether there is anything to write: a model may end a segment at once."""
        return True

    def write(self, raw: Any, path: Path) -> None:
        """Into a file with the ending `suffix`, whole or not at all."""
        write(path, f"{json.dumps(self.told(raw))}\n".encode())

    def told(self, raw: Any) -> Any:
        """As JSON has it, for a line on a screen."""
        return raw

    def html(self, raw: Any) -> str:
        """As people look at it on a page: markup that loads nothing."""
        told = self.told(raw)
        return f"<span>{escape(told if isinstance(told, str) else json.dumps(told))}</span>"

    def track(self, writer: Any, name: str, raw: Any, step: int) -> None:
        """Give it to TensorBoard, where a line (`told`) does not say it all; `writer` is its
        SummaryWriter."""

    def stream(self, ids: Iterable[int]) -> Iterator[Any]:
        """Raw data while its ids are made, in parts; here one part at the end."""
        yield self.decode([*ids])

    def seconds(self, raw: Any) -> float:
        """How long it lasts; 0 where it has no time."""
        return 0.0

    @staticmethod
    def says_nothing(raw: Any) -> bool:
        """Whether there is nothing in it for another modality to say, as in silence."""
        return False

    def about(self) -> Mapping[str, Any]:
        """What people should know of it, in few words: {"rate": "25 units a second"}."""
        return {}

    def scores(self, wanted: Sequence[Any], made: Sequence[Any]) -> Scores:
        """How near each value made is to the one wanted, by metric."""
        pairs = zip(wanted, made, strict=True)
        told = [(self.told(one), self.told(other)) for one, other in pairs]
        return {"exact": [(float(one == other), 1.0) for one, other in told]}

    @classmethod
    def fitted(cls, *values: Any, **settings: Any) -> "Kind":
        """A modality for data like this: `fitted(values, setting=...)`.

        values: a sequence of paths of files, or of what a field of a manifest holds. Raises
        ZipperError where there is nothing to fit, or not enough.
        """
        raise ZipperError(f"There is nothing to fit in the kind {cls.name!r}; make one in Python.")

    @classmethod
    def of_model(cls, *source: Any, **settings: Any) -> "Kind":
        """A modality by a model that exists: `of_model(source, setting=...)`; nothing is fitted.

        source: a hub id or a folder. Raises ZipperError where there is no such model.
        """
        raise ZipperError(f"The kind {cls.name!r} stands on no model; fit it to data.")

    @classmethod
    def example(cls, folder: Path) -> str:
        """Write a small set of real data of this kind, with a manifest.jsonl; returns the options
        of `zipper fit` that suit it, such as "--set codes=64"."""
        raise ZipperError(f"The kind {cls.name!r} has no example.")


def shown_by_kind(modalities: Mapping[str, Modality]) -> dict[str, int]:
    """{name: depth} of the towers that are not read where they are fused (`Kind.shows`)."""
    kinds = {name: whole(modality) for name, modality in modalities.items()}
    return {name: kind.shows for name, kind in kinds.items() if kind.shows is not None}


def whole(modality: Modality) -> Kind:
    """A modality with the defaults of `Kind` for what it does not define itself."""
    return modality if isinstance(modality, Kind) else cast(Kind, _Whole(modality))


class _Whole(Kind):
    def __init__(self, inner: Modality) -> None:
        self._inner = inner

    def __getattribute__(self, name: str) -> Any:
        held = object.__getattribute__
        if name.startswith("_"):
            return held(self, name)
        inner = held(self, "_inner")
        return getattr(inner, name) if hasattr(inner, name) else held(self, name)


def short(raw: str) -> str:
    """A string as it is. Raises a ZipperError for one of more than MOST_LETTERS."""
    if len(raw) > MOST_LETTERS:
        raise ZipperError(
            f"A string of {len(raw):,} characters was given; at most {MOST_LETTERS:,} are encoded "
            "at once. Cut it."
        )
    return raw


def is_ids(value: Any) -> bool:
    """Whether it is ids already: a list of whole numbers, also an empty one."""
    return isinstance(value, list) and all(
        isinstance(each, Integral) and not isinstance(each, bool) for each in value
    )
