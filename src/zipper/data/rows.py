"""Rows: encoded samples, and their unit files on disk.

A folder of unit files holds shards (safetensors: the ids of some hundred samples end to end, their
lengths, seconds and names), the modalities that made them, bad.jsonl (the samples that have no ids,
and why) and provenance.json, which names all of this and is written last. Shards are memory-mapped:
a corpus of any size opens in no time, and processes share its pages. This file knows neither raw
data nor models.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, final, overload

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer
from safetensors import safe_open
from safetensors.numpy import save_file

from zipper.errors import ZipperError
from zipper.saving.files import header, read_json, replacing, sha256

#: One sample, encoded: {field: ids without begin and end}.
Row = dict[str, list[int]]

PROVENANCE, BAD = "provenance.json", "bad.jsonl"
MOST_PROVENANCE_BYTES = 64 << 20  # 100 bytes a shard
_KIND = {"F32": np.float32, "I16": np.int16, "I32": np.int32, "U8": np.uint8}
_FILE = re.compile(r"units-[0-9a-f]{32}\.safetensors")
_BLOCK = 1000  # draws in which a mixture has exactly its weights


@final
class Rows(Sequence[Row]):
    """Samples in unit files: `rows[i]` is a dict of lists, `rows[a:b]` and `select` are views. A
    pickle holds paths and numbers."""

    def __init__(
        self, files: Sequence[Path], chosen: Integer[np.ndarray, " rows"] | None = None
    ) -> None:
        """files: shards. chosen: which of their samples, in which order, counted through all of
        them (None: all)."""
        self.files = tuple(files)
        self._shards = [_Shard(path) for path in self.files]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._chosen = np.arange(self._starts[-1]) if chosen is None else chosen

    @classmethod
    def open(cls, folder: Path, fingerprints: Mapping[str, str] | None = None) -> "Rows":
        """What `extraction.extract` wrote. fingerprints: of modalities; a ZipperError says if other
        ones made these ids."""
        found = provenance(folder)
        for name, wanted in (fingerprints or {}).items():
            if found["modalities"].get(name, wanted) != wanted:
                raise ZipperError(
                    f"The unit files in {folder} were made with another {name!r} than the one "
                    "given: ids would mean other things. "
                    f"Give {folder / 'modalities' / name}, or extract {found['source']} again."
                )
        return cls([folder / shard["file"] for shard in found["shards"]])

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """All of these, one after the other."""
        starts = np.cumsum([0, *(part._starts[-1] for part in parts)])
        chosen = [part._chosen + start for part, start in zip(parts, starts[:-1], strict=True)]
        files = list(chain.from_iterable(part.files for part in parts))
        return cls(files, np.concatenate(chosen))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, which: int | np.integer) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> "Rows": ...
    def __getitem__(self, which: int | np.integer | slice) -> "Row | Rows":
        if isinstance(which, slice):
            return self.select(np.arange(len(self))[which])
        shard, place = self._find(which)
        return shard.row(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.files, self._chosen)

    def name(self, which: int) -> str:
        """The id that a sample has in its source."""
        shard, place = self._find(which)
        return shard.names[place]

    def distinct(self) -> int:
        """How many ids its samples have between them; fewer than samples where some share one."""
        each = map(hash, chain.from_iterable(shard.names for shard in self._shards))
        return len(np.unique(np.fromiter(each, np.int64)[self._chosen]))

    @property
    def fields(self) -> list[str]:
        """Every field that some row has."""
        return sorted(set(chain.from_iterable(shard.fields for shard in self._shards)))

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Ids of each row, over all its fields."""
        return np.concatenate([np.zeros(0, np.int64), *(shard.lengths for shard in self._shards)])[
            self._chosen
        ]

    @cached_property
    def seconds(self) -> Float32[np.ndarray, " rows"]:
        """How long the sound of each row is; 0 where there is none."""
        return np.concatenate(
            [np.zeros(0, np.float32), *(shard.seconds for shard in self._shards)]
        )[self._chosen]

    def lengths_of(self, field: str) -> Int64[np.ndarray, " rows"]:
        """Ids of one field of each row, -1 where a row lacks it."""
        each = [shard.lengths_of(field) for shard in self._shards]
        return np.concatenate([np.zeros(0, np.int64), *each])[self._chosen]

    def select(self, which: Integer[np.ndarray, " some"] | Bool[np.ndarray, " rows"]) -> "Rows":
        """These rows, by number or by mask: `rows.select((rows.seconds >= 1) & (rows.lengths <=
        500))`."""
        return Rows(self.files, self._chosen[which])

    def _find(self, which: int | np.integer) -> "tuple[_Shard, int]":
        number = int(self._chosen[which])
        shard = bisect_right(self._starts, number) - 1
        return self._shards[shard], number - int(self._starts[shard])


def provenance(folder: Path) -> dict[str, Any]:
    """What a folder of unit files says of itself: source, modalities, counts, shards with their
    hashes."""
    if not (folder / PROVENANCE).is_file():
        raise ZipperError(
            f"{folder} holds no finished unit files (there is no {PROVENANCE}). Make them with "
            "zipper units."
        )
    found = read_json(folder / PROVENANCE, MOST_PROVENANCE_BYTES)
    try:
        whole = isinstance(found["modalities"], dict) and all(
            _FILE.fullmatch(shard["file"]) for shard in found["shards"]
        )
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ZipperError(
            f"{folder / PROVENANCE} is damaged, or no list of unit files. Delete it and run "
            "zipper units again."
        )
    return found


def check(folder: Path) -> None:
    """Raises a ZipperError that names the first shard that is not the one that was written. Reads
    every byte."""
    for shard in provenance(folder)["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or sha256(path) != shard["sha256"]:
            raise ZipperError(
                f"{path} is missing or damaged. Run zipper units again: it makes only what is not "
                "there."
            )


def write_shard(
    path: Path,
    rows: Sequence[Row],
    names: Sequence[str],
    seconds: Sequence[float],
    record: Mapping[str, Any],
) -> None:
    """One shard, whole or not at all, the same bytes for the same arguments. record: kept with it,
    see `read_record`."""
    tensors: dict[str, np.ndarray] = {
        "names": np.frombuffer(json.dumps(list(names)).encode(), np.uint8),
        "seconds": np.array(seconds, np.float32),
    }
    for field in set(chain.from_iterable(rows)):
        ids = np.array([*chain.from_iterable(row.get(field, ()) for row in rows)], np.int64)
        tensors[f"ids.{field}"] = ids.astype(np.int16 if ids.max(initial=0) < 1 << 15 else np.int32)
        tensors[f"lengths.{field}"] = np.array(
            [len(row[field]) if field in row else -1 for row in rows], np.int32
        )
    with replacing(path) as beside:
        # One entry: the order of several is not defined.
        save_file(tensors, beside, {"record": json.dumps(record, sort_keys=True)})


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a shard; None if there is no whole shard."""
    if not path.is_file():
        return None
    try:
        header(path)
    except ZipperError:
        return None
    with safe_open(path, "numpy") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record


class _Shard:
    """One mapped file; nothing but the lengths is read when it is opened."""

    def __init__(self, path: Path) -> None:
        entries = header(path)
        content = np.memmap(path, np.uint8, "r").view(np.ndarray)
        self.fields = sorted(
            name.removeprefix("lengths.") for name in entries if name.startswith("lengths.")
        )
        try:
            self._arrays = {
                name: content[e.start : e.stop].view(_KIND[e.dtype]) for name, e in entries.items()
            }
            self.seconds = self._arrays["seconds"]
            self._ends = {
                field: np.maximum(self.lengths_of(field), 0).cumsum() for field in self.fields
            }
            ids = {field: len(self._arrays[f"ids.{field}"]) for field in self.fields}
        except KeyError as error:
            raise ZipperError(
                f"{path} is no unit file: {error} was not expected in it, or is missing."
            ) from error
        for field, ends in self._ends.items():
            if len(ends) != len(self) or ids[field] != (ends[-1] if len(ends) else 0):
                raise ZipperError(
                    f"{path} is damaged: the lengths of {field!r} do not add up. Run zipper units "
                    "again."
                )

    def __len__(self) -> int:
        return len(self.seconds)

    def row(self, place: int) -> Row:
        found = {}
        for field in self.fields:
            length, end = (
                int(self._arrays[f"lengths.{field}"][place]),
                int(self._ends[field][place]),
            )
            if length >= 0:
                found[field] = self._arrays[f"ids.{field}"][end - length : end].tolist()
        return found

    @property
    def names(self) -> list[str]:
        names: list[str] = json.loads(self._arrays["names"].tobytes())
        return names

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        return sum(
            (np.maximum(self.lengths_of(field), 0) for field in self.fields),
            np.zeros(len(self), np.int64),
        )

    def lengths_of(self, field: str) -> Int64[np.ndarray, " rows"]:
        return self._arrays.get(f"lengths.{field}", np.full(len(self), -1, np.int32)).astype(
            np.int64
        )


def draws(
    which: range, seed: int, sizes: Sequence[int], weights: Sequence[float]
) -> list[tuple[int, int]]:
    """The draws number `which` from several sources mixed by weights: (source, row of it), a
    function of the arguments alone.

    Of every 1,000 draws a source has its share, rounded, in an order of chance; it is read in
    epochs, each a permutation of it. A source with a positive weight has one draw in 1,000 at
    least.
    """
    if (
        len(sizes) != len(weights)
        or min(sizes, default=0) < 1
        or min(weights, default=-1) < 0
        or not 0 < sum(weights) < np.inf
    ):
        raise ZipperError(
            f"sources of {list(sizes)} rows were to be mixed by {list(weights)}: each needs rows "
            "and a weight from 0 on."
        )
    shares = np.array(weights, np.float64) / sum(weights) * _BLOCK
    counts = np.where(shares > 0, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    if (many := np.count_nonzero(counts)) > _BLOCK:
        raise ZipperError(f"{many} sources were to be mixed; {_BLOCK} are the most. Join some.")
    for source in np.argsort(np.floor(shares) - shares, kind="stable")[
        : max(0, _BLOCK - counts.sum())
    ]:
        counts[source] += 1
    while counts.sum() > _BLOCK:  # what sources of less than one draw were given
        counts[counts.argmax()] -= 1
    found = []
    for k in which:
        block, within = divmod(k, _BLOCK)
        source, before = _block(seed, block, tuple(counts.tolist()))[within]
        epoch, place = divmod(block * int(counts[source]) + before, sizes[source])
        found.append((source, int(_permutation(seed, epoch, sizes[source], source)[place])))
    return found


@lru_cache(maxsize=4)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(source, how many draws of it came before in this block) for each draw of a block."""
    if counts.count(0) == len(counts) - 1:  # one source: nothing to draw
        return [(max(range(len(counts)), key=counts.__getitem__), k) for k in range(_BLOCK)]
    sources = np.random.default_rng(mixed_seed(seed, block, 4)).permutation(
        np.repeat(np.arange(len(counts)), counts)
    )
    before = [0] * len(counts)
    found = []
    for source in sources.tolist():
        found.append((source, before[source]))
        before[source] += 1
    return found


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, size: int, source: int) -> Integer[np.ndarray, " rows"]:
    parts = [seed, epoch, 2]
    if source:
        parts.append(source)
    return np.random.default_rng(mixed_seed(*parts)).permutation(size).astype(np.int32)


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
