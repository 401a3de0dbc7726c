"""Where a public original lies in the folder of a user, and which part of a corpus something
belongs to.

An original is a file, an archive or an unpacked folder; its name is only looked for, never
downloaded. Knows no corpus.
"""

import hashlib
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from zipper.errors import ZipperError


def original(data: Path, names: Sequence[str], home: str) -> Path:
    """The first file or folder in `data` that one of the patterns names.

    names: patterns as of `Path.glob`, the best first. home: where the public original lies. Raises
    ZipperError if nothing is there.
    """
    if data.is_dir():
        for pattern in names:
            if found := sorted(data.glob(pattern)):
                return found[0]
    wanted = " or ".join(names)
    there = "There is no such folder" if not data.is_dir() else "Nothing of that name is there"
    raise ZipperError(
        f"{wanted} was looked for in {data}. {there}. The public original: {home}. Put it there, "
        "or name another folder."
    )


def contents(place: Path, ending: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and content of each file with this ending in a folder, a ZIP or a TAR archive, sorted by
    name."""
    if place.is_dir():
        for path in sorted(place.rglob(f"*{ending}")):
            if path.is_file():
                yield path.relative_to(place).as_posix(), path.read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(ending) and not name.endswith("/"):
                    yield name, archive.read(name)
    elif tarfile.is_tarfile(place):
        # In the order of the archive: going back in a compressed one reads it all again.
        held: dict[str, bytes] = {}
        with tarfile.open(place) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(ending):
                    file = tar.extractfile(member)
                    held[member.name] = file.read() if file else b""
        yield from sorted(held.items())
    else:
        raise ZipperError(
            f"{place} is neither a folder nor a ZIP nor a TAR archive. Fetch it again."
        )


def part(key: str, shares: Mapping[str, float], rest: str = "train") -> str:
    """The part that owns a key, by its hash: whatever else a corpus holds, it stays there.

    shares: of all keys, by part; `rest` has what they leave.
    """
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return rest


def writable(rows: Sequence[dict[str, Any]], texts: Iterable[str]) -> list[dict[str, Any]]:
    """Rows whose text has no sign that none of these texts has: a tokenizer that was trained on
    them could not write it."""
    known = set(chain.from_iterable(texts))
    return [row for row in rows if known.issuperset(row["text"])]
