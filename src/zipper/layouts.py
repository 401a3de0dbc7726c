"""Layouts: corpora read as they lie on disk, each as raw rows in the terms of zipper.data. Nothing here knows of ids.

A source is one string: the path of a JSONL manifest, or KIND:PLACE.

    librispeech:FOLDER   <subset>/<speaker>/<chapter>/<utterance>.flac and <speaker>-<chapter>.trans.txt (openslr.org/12)
    libritts:FOLDER      <subset>/<speaker>/<chapter>/<utterance>.wav, .normalized.txt, .original.txt (openslr.org/60)
    librilight:FOLDER    <subset>/<speaker>/<book>/<file>.flac and .json (arXiv:1912.07875), cut where nobody speaks; no text
    sounds:FOLDER        any sound files; no text
    parquet:GLOB, arrow:GLOB, audiofolder:FOLDER   what Hugging Face datasets reads; arrow takes a folder of save_to_disk too

Behind a "#" fields are named: "parquet:data/*.parquet#text=sentence,speech=recording" takes the columns of other names, and
"libritts:data/LibriTTS#text=original" the text with its numbers and capitals. Sound is decoded by soundfile alone.
"""

import math
import os
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from zipper import data
from zipper.data import Sample
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.files import read_json

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
LONGEST_PIECE_S = 30.0  # of Libri-Light; as long as the longest utterances of LibriSpeech (35 s)


def samples(source: str, split: str | None = None) -> Iterator[Sample]:
    """The raw rows of a source in an order that is always the same. split: only rows of this one (subset, in the Libri family).

    Each has an "id", and "split", "voice" (the speaker) where the source says them. What is there but is no sample (a sound without
    text, a line that is not JSON) comes as a sample with a problem. Raises ZipperError if the source is not there.
    """
    kind, place, columns = _parse(source)
    found = _KINDS[kind](place)
    first = next(found, None)
    if first is None:
        raise ZipperError(f"There is no sample in {source}. Does it lie elsewhere, or in another layout? See zipper units --help.")
    for sample in _chain(first, found):
        if split is None or sample.row.get("split", split) == split:
            missing = sorted({*columns.values()} - {*sample.row})
            if sample.problem or not missing:
                yield sample._replace(row={**sample.row, **{field: sample.row.get(c) for field, c in columns.items()}})
            else:
                yield sample._replace(problem=f"has no {missing[0]!r}; it has {', '.join(map(str, sample.row))}.")


def names(source: str) -> bool:
    """Whether a string is written like a source, right or wrong, and not like a path."""
    return source.endswith(".jsonl") or (":" in source and not Path(source).exists())


def _parse(source: str) -> tuple[str, str, dict[str, str]]:
    """Kind, place, {field: column}."""
    if source.endswith(".jsonl"):
        return "jsonl", source, {}
    kind, colon, rest = source.partition(":")
    place, _, named = rest.partition("#")
    pairs = [pair.partition("=") for pair in named.split(",") if pair]
    if kind not in _KINDS or not colon or not place or not all(field and column for field, _, column in pairs):
        raise ZipperError(
            f"{source!r} is no source. Give the path of a .jsonl manifest, KIND:PLACE or KIND:PLACE#FIELD=COLUMN,..., the "
            f"kind one of {', '.join(_KINDS)}."
        )
    return kind, place, {field: column for field, _, column in pairs}


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _walk(folder: str, *endings: str) -> Iterator[tuple[Path, dict[str, dict[str, Path]]]]:
    """Folder by folder: {stem: {ending: path relative to `folder`}} of the files with these endings, all in order."""
    root = Path(folder)
    if not root.is_dir():
        raise ZipperError(f"{root} is no folder. Give the one that holds the corpus.")

    def stop(error: OSError) -> None:  # os.walk would pass over it, and its samples would be missed by nobody
        raise ZipperError(f"{error.filename} cannot be listed: {error.strerror}. Make it readable, or take it out of {root}.")

    for above, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders.sort()
        found: dict[str, dict[str, Path]] = {}
        for name in sorted(names):
            ending = next((e for e in endings if name.lower().endswith(e)), None)
            if ending and not name.startswith("."):
                found.setdefault(name[: -len(ending)], {})[ending] = Path(above, name).relative_to(root)
        if found:
            yield Path(above), found


def _librispeech(folder: str) -> Iterator[Sample]:
    root = Path(folder)
    for chapter, files in _walk(folder, ".flac", ".trans.txt"):
        said: dict[str, str] = {}
        for entry in files.values():
            if ".trans.txt" in entry:
                lines = (root / entry[".trans.txt"]).read_text(encoding="utf-8").splitlines()
                said |= {name: text for name, _, text in (line.partition(" ") for line in lines) if name}
        sounds = {name: entry[".flac"] for name, entry in files.items() if ".flac" in entry}
        for name in sorted({*said, *sounds}):
            sound = sounds.get(name, (chapter / f"{name}.flac").relative_to(root))
            row = {"id": name, "speech": str(sound), **_place(chapter)}
            if said.get(name):
                yield Sample(str(root / sound), row | {"text": said[name]}, root)
            else:
                yield Sample(str(root / sound), row, root, "has no line in the .trans.txt of its chapter.")


def _libritts(folder: str) -> Iterator[Sample]:
    root = Path(folder)
    for chapter, files in _walk(folder, ".wav", ".normalized.txt", ".original.txt"):
        for name, entry in files.items():
            sound = entry.get(".wav", (chapter / f"{name}.wav").relative_to(root))
            row = {"id": name, "speech": str(sound), **_place(chapter)}
            for field, ending in {"text": ".normalized.txt", "original": ".original.txt"}.items():
                if ending in entry:
                    row[field] = (root / entry[ending]).read_text(encoding="utf-8").strip()
            problem = "" if row.get("text") else f"has no {name}.normalized.txt beside it, or an empty one."
            yield Sample(str(root / sound), row, root, problem)


def _librilight(folder: str) -> Iterator[Sample]:
    root = Path(folder)
    for book, files in _walk(folder, ".flac", ".json"):
        for name, entry in files.items():
            if ".flac" not in entry:
                continue  # other lists of the corpus
            sound, row = entry[".flac"], _place(book)
            name = f"{row['voice']}/{book.name}/{name}"
            try:
                if ".json" not in entry:
                    raise ZipperError("there is no .json beside it")
                described = read_json(root / entry[".json"])
                pieces = _pieces(described.get("voice_activity"))
            except ZipperError as error:
                yield Sample(str(root / sound), row | {"id": name}, root, f"cannot be cut: {error}.")
                continue
            for n, (start, stop) in enumerate(pieces):
                piece = {"path": str(sound), "start": start, "stop": stop}
                where = f"{root / sound}, {start:.2f} to {stop:.2f} s"
                yield Sample(where, row | {"id": f"{name}-{n:04d}", "speech": piece, "duration": stop - start}, root)


def _pieces(voiced: Any) -> list[tuple[float, float]]:
    """Stretches of speech, as many in a row as fit into `LONGEST_PIECE_S`; a longer one is halved until it does."""
    if not isinstance(voiced, list) or not all(
        isinstance(s, list) and len(s) == 2 and all(type(t) in (int, float) for t in s) and 0 <= s[0] < s[1] for s in voiced
    ):
        raise ZipperError("its voice_activity is no list of [start, stop] in seconds")
    pieces: list[tuple[float, float]] = []
    for start, stop in voiced:
        parts = 1 << max(0, math.ceil(math.log2((stop - start) / LONGEST_PIECE_S)))
        for n in range(parts):
            begin, end = (start + (stop - start) * i / parts for i in (n, n + 1))
            if pieces and end - pieces[-1][0] <= LONGEST_PIECE_S:
                pieces[-1] = (pieces[-1][0], end)
            else:
                pieces.append((begin, end))
    return pieces


def _place(chapter: Path) -> dict[str, Any]:
    """Subset and speaker, from where a chapter or book lies."""
    speaker = chapter.absolute().parent
    return {"split": speaker.parent.name, "voice": speaker.name}


def _sounds(folder: str) -> Iterator[Sample]:
    root = Path(folder)
    for _, files in _walk(folder, *SOUNDS):
        for entry in files.values():
            for sound in entry.values():
                yield Sample(str(root / sound), {"id": str(sound.with_suffix("")), "speech": str(sound)}, root)


def _hugging_face(kind: str) -> Callable[[str], Iterator[Sample]]:
    """A reader by the library `datasets`, streaming: nothing is copied into its cache, and sound stays bytes in a file."""

    def read(place: str) -> Iterator[Sample]:
        datasets = extra("datasets")
        files = sorted(glob(place, recursive=True)) if has_magic(place) else [place]
        if not files or not Path(files[0]).exists():
            raise ZipperError(
                f"There is nothing at {place}. Give {'a folder' if kind == 'audiofolder' else 'a file or a pattern'}."
            )
        if kind == "arrow" and Path(place).is_dir():
            loaded = datasets.load_from_disk(place)
            splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        elif kind == "audiofolder":
            splits = datasets.load_dataset(kind, data_dir=place, streaming=True)
        else:
            splits = {"train": datasets.load_dataset(kind, data_files={"train": files}, streaming=True)["train"]}
        for split, dataset in splits.items():
            spoken = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Audio)]
            for name in spoken:
                # Left as it is, a path or the content of a file: else torchcodec is asked for.
                left = datasets.Value("string") if kind == "audiofolder" else datasets.Audio(decode=False)
                dataset = dataset.cast_column(name, left)
            for n, row in enumerate(dataset):
                if len(spoken) == 1:
                    row.setdefault("speech", row[spoken[0]])
                yield Sample(f"{place}, {split}, row {n}", {"id": f"{split}-{n:08d}", "split": split, **row}, Path())

    return read


_KINDS: dict[str, Callable[[str], Iterator[Sample]]] = {
    "jsonl": lambda place: data.samples(Path(place)),
    "librispeech": _librispeech,
    "libritts": _libritts,
    "librilight": _librilight,
    "sounds": _sounds,
    **{kind: _hugging_face(kind) for kind in ("parquet", "arrow", "audiofolder")},
}
