"""Data: one manifest format, and from its rows to token ids.

A manifest is JSONL. A row's key is the name of a modality ("text", "speech") or "field:modality"; its value is raw text, a path of
a file beside the manifest, or a list of ids made earlier. Other keys (id, voice, template ...) are kept aside or ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text

#: One sample, encoded: {field: ids without begin and end}.
Row = dict[str, list[int]]


def manifest(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The raw rows of a JSONL manifest; a line that is not a JSON object is a ZipperError that names it."""
    if not path.is_file():
        raise ZipperError(f"The manifest {path} does not exist. Give a JSONL file, one sample per line.")
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ZipperError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ZipperError(f'{path}, line {number} holds a {type(row).__name__}; it must be an object like {{"text": ...}}.')
            rows.append(row)
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


def read(path: Path, modalities: Mapping[str, Modality], limit: int | None = None) -> list[Row]:
    """A manifest as ids. A row with a known voice also gets the field "voiced": its speech behind the id of that voice."""
    return [encode(row, modalities, path.parent, f"{path}, line {n}") for n, row in enumerate(manifest(path, limit), 1)]


def encode(row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path, where: str) -> Row:
    """One raw row as ids; paths are relative to `folder`, `where` names the row in errors."""
    encoded: Row = {}
    for key, value in row.items():
        field, _, name = key.rpartition(":")
        if name not in modalities:
            continue
        modality = modalities[name]
        if isinstance(value, list):
            wrong = [i for i in value if not isinstance(i, int) or not 0 <= i < modality.vocabulary]
            if wrong:
                raise ZipperError(f"{where}: {key!r} holds {wrong[0]!r}; ids of {name!r} go from 0 to {modality.vocabulary - 1}.")
            encoded[field or name] = value
        elif isinstance(value, str):
            try:
                encoded[field or name] = modality.encode(value if isinstance(modality, Text) else folder / value)
            except ZipperError as error:
                raise ZipperError(f"{where}: {error}") from error
        else:
            raise ZipperError(f"{where}: {key!r} holds {value!r}; give text, the path of a file or a list of ids.")
        if isinstance(modality, SpeechUnits) and not field:
            voice = [modality.voice_id(row["voice"])] if row.get("voice") in modality.voices else []
            encoded["voiced"] = voice + encoded[name]
    if not encoded:
        raise ZipperError(f"{where} has the keys {sorted(row)}; none of them names a modality of {sorted(modalities)}.")
    return encoded
