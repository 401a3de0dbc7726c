"""Data: one manifest format, from its rows to token ids, and what a good sample is.

A manifest is JSONL. A row's key is the name of a modality ("text", "speech") or "field:modality";
its value is raw text, a list of
ids made earlier, or a sound: the path of a file beside the manifest, or {"path": ..., "start": 1.5,
"stop": 4.0} for a piece of one (seconds; instead of a path, "bytes" are the content of a file). Of
the other keys, "id", "split", "voice" and "duration" (seconds) mean something, "offset" (seconds)
makes a piece of the one sound of the row, and "audio_filepath" is its path, as NeMo writes it. A
sound under any other key is taken where it is the only one and says itself what it is (bytes, or
{"path": ..., "bytes": ...}). All other keys are passed over, and named by `take`. Corpora that come
in other forms are read by zipper.data.layouts.

A good sample has at least one field. Its ids are those that its modality has, without begin and
end; its text is text, and an empty one says that nobody speaks; its sound is what `audio.read`
takes, as long as the row says, within `TOLERANCE_S`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from zipper.audio.sound import Audio
from zipper.data.rows import PROVENANCE, Rows
from zipper.data.rows import Row as Row
from zipper.environment import MissingExtra
from zipper.errors import ZipperError
from zipper.modality import Kind, Modality, is_ids, whole
from zipper.modality.sound import LONGEST_S as LONGEST_S
from zipper.modality.sound import Sound, at, is_time, names_a_sound, time_s
from zipper.saving.files import as_json, lines, place, unique
from zipper.saving.files import write as write_file

#: Endings of files that hold sound, also those that cannot be read: they are tried, and refused by
#: name.
SOUNDS = (
    ".wav .wave .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .sph "
    ".nist .voc .raw .pcm .m4a .m4b .mp4 .aac .ac3 .eac3 .amr .3gp .wma .webm .weba .mka .mkv .mov "
    ".avi .flv .ape .wv .tta .spx .gsm .alac .dsf .shn"
).split()
#: How the content of such files begins.
_BEGIN = (
    b"RIFF",
    b"RF64",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b"caff",
    b".snd",
    b"NIST",
    b"riff",
    b"\xff\xfb",
    b"\xff\xf3",
)
#: Seconds and share by which a sound may be longer or shorter than its row says: durations get
#: rounded.
TOLERANCE_S = 0.5, 0.05
NEMO = "audio_filepath"


class Sample(NamedTuple):
    """A raw row. where: the place it has in its source, for messages. folder: what its paths are
    relative to. problem: why there is no row, as the end of a sentence that begins with `where`."""

    where: str
    row: Mapping[str, Any]
    folder: Path
    problem: str = ""


class Taken(NamedTuple):
    """What a raw row became: ids, its sounds by key, how long they are (or said to be, of ids
    alone), and the names of what was passed over in it."""

    row: Row
    heard: Mapping[str, Audio]
    seconds: float
    passed: tuple[str, ...]


def samples(path: Path) -> Iterator[Sample]:
    """The rows of a JSONL manifest, one by one; a line that is not a JSON object is a sample with a
    problem, a blank one none."""
    try:
        for number, line in lines(path):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode(), object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                yield Sample(where, {}, path.parent, f"is not JSON: {error}.")
                continue
            if isinstance(row, dict):
                yield Sample(where, row, path.parent)
            else:
                yield Sample(
                    where,
                    {},
                    path.parent,
                    f'holds a {type(row).__name__}; it must be an object like {{"text": ...}}.',
                )
    except ZipperError as error:
        raise ZipperError(
            f"The manifest {error} Give a JSONL file, one sample per line."
        ) from error


def manifest(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The raw rows of a JSONL manifest; a line that is not a JSON object is a ZipperError that
    names it."""
    return [dict(sample.row) for sample in good(path, limit)]


def good(path: Path, limit: int | None = None) -> list[Sample]:
    """The rows of a manifest, all of them JSON objects. Raises a ZipperError that names the first
    that is none, and for an empty file."""
    found = list(islice(samples(path), limit))
    if bad := next((sample for sample in found if sample.problem), None):
        raise ZipperError(f"{bad.where} {bad.problem}")
    if not found:
        raise ZipperError(f"The manifest {path} is empty. Give a JSONL file, one sample per line.")
    return found


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a manifest; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(f"{as_json(row)}\n" for row in rows).encode())


def read(path: Path, modalities: Mapping[str, Modality], limit: int | None = None) -> Sequence[Row]:
    """A manifest as ids, in memory, or a folder of unit files, which stays on disk.

    A row of a modality with voices also gets the field "voice": the id of its voice, none where
    that is unknown ("voice~speech" in a task is speech behind its voice).
    """
    path = place(path)
    if (path / PROVENANCE).is_file():
        return Rows.open(
            path, {name: modality.fingerprint for name, modality in modalities.items()}
        )[:limit]
    return [
        encode(sample.row, modalities, sample.folder, sample.where) for sample in good(path, limit)
    ]


def encode(
    row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path, where: str
) -> Row:
    """One raw row as ids; paths are relative to `folder`, `where` names the row in errors."""
    return take(row, modalities, folder, where).row


def take(
    row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path, where: str
) -> Taken:
    """One raw row as ids, and what there is to say of it. Whatever is wrong with it is a
    ZipperError that begins with `where`."""
    try:
        return _take(row, modalities, folder)
    except MissingExtra:  # no row is bad because of it
        raise
    except ZipperError as error:
        raise ZipperError(f"{where}: {error}") from error
    except Exception as error:  # by place, not by type: what a row can do to a library has no end
        raise ZipperError(
            f"{where}: it cannot be read ({type(error).__name__}: {error})."
        ) from error


def _take(row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path) -> Taken:
    settled = settle(row, modalities)
    encoded, prefixed = Row(), Row()
    heard, passed, known, seconds = dict[str, Audio](), list[str](), {"id", "split"}, 0.0
    for key, value in settled.items():
        field, colon, name = key.rpartition(":")
        if name not in modalities:
            continue
        modality, known = whole(modalities[name]), known | {key}
        if (field or name) in encoded or (colon and not field):
            raise ZipperError(
                f"{key!r} gives no field of its own. Write NAME or FIELD:NAME, each field once."
            )
        ids, raw, left = _value(key, value, modality, folder)
        encoded[field or name] = ids
        seconds += 0.0 if raw is None else modality.seconds(raw)
        if isinstance(raw, Audio):
            heard[key] = raw
        if left:
            passed.append(f"{left} of {key}")
        if (says := modality.prefixed) and not field:
            prefixed[says] = []
            if row.get(says) in [*modality.prefixes]:
                prefixed[says] = [modality.prefixes[row[says]]]
                known |= {says}
    if not encoded:
        raise ZipperError(
            f"it has the keys {sorted(row)}; none of them names a modality of {sorted(modalities)}."
        )
    if "duration" in settled and is_time(settled["duration"]):
        said, known = float(settled["duration"]), known | {"duration"}
        if len(heard) == 1 and not _alike(seconds, said):
            raise ZipperError(
                f"'duration' says {said:g} s, its sound has {seconds:.2f} s. Put it right, or "
                "write an offset."
            )
        seconds = seconds or said
    passed += [
        f"field {key:.100}"
        for key, value in settled.items()
        if value is not None and key not in known
    ]
    return Taken(prefixed | encoded, heard, float(seconds), tuple(passed))


def _value(key: str, value: Any, modality: Kind, folder: Path) -> tuple[list[int], Any, str]:
    """The ids of a value, its raw data (None where it is ids already), and what of it was passed
    over."""
    if is_ids(value) or (isinstance(value, list) and not modality.accepts(value)):
        return _ids(key, value, modality), None, ""
    if not modality.accepts(value):
        raise ZipperError(f"{key!r} holds {value!r:.200}; give {modality.takes} or a list of ids.")
    raw = modality.read(value, folder)
    ids, left = modality.noted(raw)
    return _ids(key, ids, modality), raw, left


def _ids(key: str, ids: list[Any], modality: Kind) -> list[int]:
    """Checked: they are numbers that the modality has, and lie between begin and end."""
    last = modality.vocabulary - 1
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i <= last]:
        raise ZipperError(
            f"{key!r} holds {wrong[0]!r:.200}; ids of {modality.name!r} go from 0 to {last}."
        )
    if ends := [i for i in ids if i in (modality.begin, modality.end)]:
        raise ZipperError(
            f"{key!r} holds {ends[0]}, which begins or ends a segment of {modality.name!r}: the "
            "model would read it twice. Give the ids between them (add_special_tokens=False)."
        )
    return ids


def settle(row: Mapping[str, Any], modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """The row in our own terms: what NeMo's keys mean, a sound under another name, an offset as a
    piece.

    Raises ZipperError where that can mean two things.
    """
    found = dict(row)
    speech = [name for name, modality in modalities.items() if isinstance(modality, Sound)]
    if len(speech) == 1 and not any(key.rpartition(":")[2] == speech[0] for key in row):
        others = [key for key in row if key.rpartition(":")[2] not in modalities]
        named = (
            [NEMO]
            if isinstance(row.get(NEMO), str)
            else [key for key in others if _says_that_it_is_sound(row[key])]
        )
        if len(named) > 1:
            raise ZipperError(
                f"it has several sounds ({', '.join(named)}), none of them as {speech[0]!r}. Say "
                "which one is meant."
            )
        if named:
            found[speech[0]] = found.pop(named[0])
    keys = sounds(found, modalities)
    if found.get("offset") is None or not keys:
        return found
    start, stop = time_s("offset", found.pop("offset")), found.get("duration")
    if len(keys) > 1 or (
        isinstance(found[keys[0]], Mapping) and {"start", "stop"} & found[keys[0]].keys()
    ):
        raise ZipperError(
            f"it has an offset, and a piece or several sounds ({', '.join(keys)}). Write start "
            "and stop in the sound."
        )
    found[keys[0]] = at(found[keys[0]]) | {
        "start": start,
        "stop": None if stop is None else start + time_s("duration", stop),
    }
    return found


def sounds(row: Mapping[str, Any], modalities: Mapping[str, Modality]) -> list[str]:
    """The keys of a row that stand for sound in files."""
    named = [key for key in row if isinstance(modalities.get(key.rpartition(":")[2]), Sound)]
    return [key for key in named if not isinstance(row[key], list) and names_a_sound(row[key])]


def _says_that_it_is_sound(value: Any) -> bool:
    """Whether it is the content of a sound file, or says by its keys that it is a file and by its
    ending which."""
    if isinstance(value, bytes):
        return value.startswith(_BEGIN)
    if (
        not isinstance(value, Mapping)
        or not value.keys() & {"path", "bytes"}
        or not names_a_sound(value)
    ):
        return False
    return str(value.get("path")).lower().endswith(tuple(SOUNDS)) or _says_that_it_is_sound(
        value.get("bytes")
    )


def _alike(seconds: float, said: float) -> bool:
    return abs(seconds - said) <= max(TOLERANCE_S[0], TOLERANCE_S[1] * said)


def files(row: Mapping[str, Any], modalities: Mapping[str, Modality], folder: Path) -> list[Path]:
    """The files that a row names and that are there; none for a row that `take` refuses."""
    try:
        named = [
            (whole(modalities[name]), value)
            for key, value in settle(row, modalities).items()
            if (name := key.rpartition(":")[2]) in modalities and not is_ids(value)
        ]
        every = chain.from_iterable(modality.files(value, folder) for modality, value in named)
        return [path for path in every if path.is_file()]
    except Exception:
        return []
