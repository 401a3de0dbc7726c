"""Data: one manifest format, and from its rows to token ids.

A manifest is JSONL. A row's key is the name of a modality ("text", "speech") or "field:modality"; its value is raw text, a list of
ids made earlier, or a sound: the path of a file beside the manifest, or {"path": ..., "start": 1.5, "stop": 4.0} for a piece of one
(seconds; instead of a path, "bytes" are the content of a file). Of the other keys, "id", "split", "duration" (seconds) and "voice"
mean something; the rest is kept aside. Corpora that come in other forms are read by zipper.layouts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from zipper import audio
from zipper.audio import Audio
from zipper.environment import MissingExtra
from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text
from zipper.rows import PROVENANCE, Rows
from zipper.rows import Row as Row


class Sample(NamedTuple):
    """A raw row. where: the place it has in its source, for messages. folder: what its paths are relative to. problem: why there is
    no row, as the end of a sentence that begins with `where`."""

    where: str
    row: Mapping[str, Any]
    folder: Path
    problem: str = ""


def samples(path: Path) -> Iterator[Sample]:
    """The rows of a JSONL manifest, one by one; a line that is not a JSON object is a sample with a problem."""
    if not path.is_file():
        raise ZipperError(f"The manifest {path} does not exist. Give a JSONL file, one sample per line.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                yield Sample(where, {}, path.parent, f"is not JSON: {error}.")
                continue
            if isinstance(row, dict):
                yield Sample(where, row, path.parent)
            else:
                yield Sample(where, {}, path.parent, f'holds a {type(row).__name__}; it must be an object like {{"text": ...}}.')


def manifest(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The raw rows of a JSONL manifest; a line that is not a JSON object is a ZipperError that names it."""
    rows = []
    for sample in islice(samples(path), limit):
        if sample.problem:
            raise ZipperError(f"{sample.where} {sample.problem}")
        rows.append(dict(sample.row))
    if not rows:
        raise ZipperError(f"The manifest {path} is empty. Give a JSONL file, one sample per line.")
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a manifest; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, modalities: Mapping[str, Modality], limit: int | None = None) -> Sequence[Row]:
    """A manifest as ids, in memory, or a folder of unit files, which stays on disk.

    A row with a known voice also gets the field "voiced": its speech behind the id of that voice.
    """
    if (path / PROVENANCE).is_file():
        return Rows.open(path, {name: modality.fingerprint for name, modality in modalities.items()})[:limit]
    return [encode(row, modalities, path.parent, f"{path}, line {n}") for n, row in enumerate(manifest(path, limit), 1)]


def encode(row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path, where: str) -> Row:
    """One raw row as ids; paths are relative to `folder`, `where` names the row in errors."""
    encoded: Row = {}
    for key, value in hear(row, modalities, folder, where).items():
        field, _, name = key.rpartition(":")
        if name not in modalities:
            continue
        modality = modalities[name]
        if isinstance(value, list):
            wrong = [i for i in value if not isinstance(i, int) or not 0 <= i < modality.vocabulary]
            if wrong:
                raise ZipperError(f"{where}: {key!r} holds {wrong[0]!r}; ids of {name!r} go from 0 to {modality.vocabulary - 1}.")
            encoded[field or name] = value
        elif isinstance(value, Audio if not isinstance(modality, Text) else str):
            try:
                encoded[field or name] = modality.encode(value)
            except MissingExtra:
                raise
            except ZipperError as error:
                raise ZipperError(f"{where}: {error}") from error
        else:
            raise ZipperError(f"{where}: {key!r} holds {value!r:.200}; give text, the path of a file or a list of ids.")
        if isinstance(modality, SpeechUnits) and not field:
            voice = [modality.voice_id(row["voice"])] if row.get("voice") in modality.voices else []
            encoded["voiced"] = voice + encoded[name]
    if not encoded:
        raise ZipperError(f"{where} has the keys {sorted(row)}; none of them names a modality of {sorted(modalities)}.")
    return encoded


def hear(row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path, where: str) -> dict[str, Any]:
    """The row with its sounds read: Audio in place of paths."""
    heard = dict(row)
    for key in sounds(row, modalities):
        value = row[key]
        at: Mapping[str, Any] = {"path": value} if isinstance(value, str) else value
        try:
            heard[key] = audio.read(at.get("bytes") or folder / at["path"], start_s=at.get("start", 0.0), stop_s=at.get("stop"))
        except MissingExtra:
            raise
        except ZipperError as error:
            raise ZipperError(f"{where}: {error}") from error
    return heard


def sounds(row: Mapping[str, Any], modalities: Mapping[str, Modality]) -> list[str]:
    """The keys of a row that stand for sound in files."""
    keys = [key for key in row if (name := key.rpartition(":")[2]) in modalities and not isinstance(modalities[name], Text)]
    return [key for key in keys if isinstance(row[key], str) or _names_a_sound(row[key])]


def _names_a_sound(value: Any) -> bool:
    """Whether it is {"path" or "bytes", "start", "stop"} with values that fit."""
    if not isinstance(value, Mapping) or value.keys() - {"path", "bytes", "start", "stop"}:
        return False
    times = [value[key] for key in ("start", "stop") if value.get(key) is not None]
    there = isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    return there and all(type(time) in (int, float) for time in times)
