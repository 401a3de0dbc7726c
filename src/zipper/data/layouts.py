"""Layouts: corpora read as they lie on disk, each as raw rows in the terms of
zipper.data.manifests. Nothing here knows of ids.

A source is one string: the path of a JSONL manifest (.jsonl, .ndjson, .json with a row a line), or
KIND:PLACE.

    jsonl:FILE           a manifest of any name
    librispeech:FOLDER   <subset>/<speaker>/<chapter>/<utterance>.flac and
                         <speaker>-<chapter>.trans.txt (openslr.org/12)
    libritts:FOLDER      <subset>/<speaker>/<chapter>/<utterance>.wav, .normalized.txt,
                         .original.txt (openslr.org/60)
    librilight:FOLDER    <subset>/<speaker>/<book>/<file>.flac and .json (arXiv:1912.07875), cut
                         where nobody speaks; no text
    sounds:FOLDER        any sound files; no text
    parquet:PLACE        files, patterns or folders of them; the split by the name of the file or
                         its folder (test-00000-of-00001.parquet, test/0000.parquet), else train
    arrow:PLACE          the same, or a folder of save_to_disk
    audiofolder:FOLDER   what Hugging Face datasets reads by that name
    made:FILE            rows of a manifest with what `zipper run-batch` made of them

Behind a "#" fields are named: "parquet:data/*.parquet#text=sentence,speech=recording" takes the
columns of other names, and "libritts:data/LibriTTS#text=original" the text with its numbers and
capitals. Sound is decoded by soundfile alone.

Whatever lies in a source is a sample, a sample with a problem, or passed over and counted by name.
One walk serves all: in order, through linked folders too, but each folder once; what is hidden
(._a.wav of macOS, .git) is passed over.
"""

import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from zipper.data import manifests as data
from zipper.data.manifests import SOUNDS, Sample
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text
from zipper.saving.checkpoint import sha256
from zipper.saving.files import lines, read_json
from zipper.saving.files import place as place_of
from zipper.tasks import Task, fields_of

#: What sound and what is said in it are called in rows.
SPEECH, TEXT = SpeechUnits.name, Text.name

LONGEST_PIECE_S = 30.0  # of Libri-Light; as long as the longest utterances of LibriSpeech (35 s)
MANIFESTS = (".jsonl", ".ndjson", ".json")
BATCH = 64  # rows of a table that are in memory at once; sound may lie in them
# of Arrow; a stream that was cut between two batches reads like a whole one
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
MOST_LOST = 10_000  # rows of a damaged part of a table that are named one by one

#: What `samples` reads: the string above, or the paths of sound files and of folders of them.
Source = str | Sequence[Path]
#: What was passed over: {name: how often}.
Passed = Counter[str]


def samples(
    source: Source, split: str | None = None, passed: Passed | None = None
) -> Iterator[Sample]:
    """The raw rows of a source in an order that is always the same. split: only rows of this one
    (subset, in the Libri family).

    Each has an "id", and "split", "voice" (the speaker) where the source says them. What is there
    but is no sample (a sound without text, a line that is not JSON) comes as a sample with a
    problem; what is none of this is counted in `passed`. Raises ZipperError if the source is not
    there or holds no sample.
    """
    passed = Counter() if passed is None else passed
    kind, place, columns = "sounds", source, dict[str, str]()
    if isinstance(source, str):
        kind, place, columns = _parse(source)
    number = 0
    try:
        for number, sample in enumerate(_KINDS[kind](place, passed), 1):
            row = {
                key: value for key, value in sample.row.items() if key != "id" or value is not None
            }
            sample = sample._replace(row={"id": str(number), **row})
            if split is not None and sample.row.get("split", split) != split:
                passed["rows of another split"] += 1
            else:
                yield _renamed(sample, columns, passed) if columns else sample
    except OSError as error:
        raise ZipperError(
            f"{error.filename or source} cannot be read: {error.strerror or error}."
        ) from error
    if not number:
        over = (
            f" Passed over: {', '.join(f'{name} ({n})' for name, n in sorted(passed.items()))}."
            if passed
            else ""
        )
        raise ZipperError(
            f"There is no sample in {_shown(source)}.{over} Does it lie elsewhere, or in another "
            "layout? See zipper units --help."
        )


def names(source: str) -> bool:
    """Whether a string is written like a source, right or wrong, and not like a path."""
    return source.partition("#")[0].lower().endswith(MANIFESTS) or (
        ":" in source and not os.path.exists(place_of(source))
    )


def is_manifest(source: str) -> bool:
    """Whether it is the path of a manifest."""
    return _parse(source)[0] == "jsonl" and not source.startswith("jsonl:")


def spelled(source: Source, folder: Path | None = None) -> str:
    """The one spelling of a source, however it was written; seen from a folder, so that both may be
    moved together."""

    def seen(path: str | Path) -> str:
        real = os.path.realpath(place_of(path))
        return os.path.relpath(real, os.path.realpath(folder)) if folder else real

    if not isinstance(source, str):
        return " ".join(map(seen, source))
    kind, place, columns = _parse(source)
    named = ",".join(f"{field}={column}" for field, column in sorted(columns.items()))
    return f"{kind}:{seen(place)}{'#' * bool(named)}{named}"


def _parse(source: str) -> tuple[str, str, dict[str, str]]:
    """Kind, place, {field: column}."""
    kind, colon, rest = source.partition(":")
    if source.lower().endswith(MANIFESTS) and (kind not in _KINDS or not colon):
        return "jsonl", source, {}
    place, _, named = (
        (rest, "", "")
        if os.path.exists(place_of(rest))
        else rest.rpartition("#")
        if "#" in rest
        else (rest, "", "")
    )
    pairs = [pair.partition("=") for pair in named.split(",") if pair]
    if (
        kind not in _KINDS
        or not colon
        or not place
        or not all(field and column for field, _, column in pairs)
    ):
        raise ZipperError(
            f"{source!r} is no source. Give the path of a .jsonl manifest, KIND:PLACE or "
            f"KIND:PLACE#FIELD=COLUMN,..., the kind one of {', '.join(_KINDS)}."
        )
    return kind, place, {field: column for field, _, column in pairs}


def _shown(source: Source) -> str:
    return source if isinstance(source, str) else ", ".join(map(str, source))


def _renamed(sample: Sample, columns: Mapping[str, str], passed: Passed) -> Sample:
    """Its fields under the names that were asked for; one whose place is taken is passed over."""
    if sample.problem:
        return sample
    if missing := sorted({*columns.values()} - {*sample.row}):
        return sample._replace(
            problem=f"has no {missing[0]!r}; it has {', '.join(map(str, sample.row))}."
        )
    passed.update(
        f"field {field:.100}"
        for field in columns
        if sample.row.get(field) is not None and field not in columns.values()
    )
    rest = {
        key: value
        for key, value in sample.row.items()
        if key not in columns.values() and key not in columns
    }
    return sample._replace(
        row={**rest, **{field: sample.row[column] for field, column in columns.items()}}
    )


# --- the walk ---


def walk(root: Path, passed: Passed) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below this one and the names of what is in it, in order: what lies here first,
    then what is linked.

    Each folder comes once, so that a ring of links has an end; one that holds `root` itself is not
    entered. What is hidden is passed over. Raises ZipperError for a folder that cannot be listed:
    its samples would be missed by nobody.
    """
    if not root.is_dir():
        raise ZipperError(f"{root} is no folder. Give the one that holds the corpus.")

    def stop(error: OSError) -> None:
        raise ZipperError(
            f"{error.filename} cannot be listed: {error.strerror}. Make it readable, or take it "
            f"out of {root}."
        )

    met, waiting = set[tuple[int, int]](), deque([root])
    while waiting:
        for above, folders, names in os.walk(waiting.popleft(), onerror=stop):
            status = os.stat(above)
            if (status.st_dev, status.st_ino) in met:
                _over(passed, "folders that were met before")
                folders.clear()
                continue
            met.add((status.st_dev, status.st_ino))
            shown = sorted(name for name in folders if not name.startswith("."))
            visible = sorted(name for name in names if not name.startswith("."))
            _over(
                passed,
                "hidden files and folders",
                len(folders) + len(names) - len(shown) - len(visible),
            )
            folders[:] = [name for name in shown if not os.path.islink(os.path.join(above, name))]
            for name in sorted({*shown} - {*folders}):
                if _holds(Path(above, name), root):
                    _over(passed, "folders that were met before")
                else:
                    waiting.append(Path(above, name))
            if visible:
                yield Path(above), visible


def _holds(folder: Path, other: Path) -> bool:
    outer, inner = os.path.realpath(folder), os.path.realpath(other)
    return os.path.commonpath([outer, inner]) == outer


def _over(passed: Passed, name: str, count: int = 1) -> None:
    """Counts what is passed over."""
    if count:
        passed[name] += count


def _others(passed: Passed, names: Iterable[str]) -> None:
    """Files that mean nothing to a layout, counted by their endings."""
    for name in names:
        ending = Path(name).suffix.lower()
        known = re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", ending)
        _over(passed, f"files {ending}" if known else "files without an ending that is known")


def _is_sound(name: str) -> bool:
    return name.lower().endswith(tuple(SOUNDS))


def _by_stem(names: Sequence[str], *endings: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{stem: {ending: name}} for files with these endings and, as "sound", for the first one of
    sound; and all other files."""
    found: dict[str, dict[str, str]] = {}
    rest = []
    for name in names:
        ending = next((e for e in endings if name.lower().endswith(e)), None)
        kind = ending or "sound"
        stem = name[: -len(ending)] if ending else Path(name).stem
        if (ending or _is_sound(name)) and kind not in found.get(stem, {}):
            found.setdefault(stem, {})[kind] = name
        else:
            rest.append(name)
    return found, rest


def _left(folder: Path, names: Sequence[str], root: Path, passed: Passed) -> Iterator[Sample]:
    """What a corpus has no place for: sound is a sample with a problem, all else is passed over."""
    for name in names:
        if _is_sound(name):
            at = (folder / name).relative_to(root)
            yield Sample(
                str(folder / name),
                {"id": str(at)},
                root,
                "has the name of another sound or transcript beside it.",
            )
    _others(passed, (name for name in names if not _is_sound(name)))


def _text(path: Path) -> str:
    """What a small text file says. Raises ZipperError where it is none."""
    try:
        return " ".join(line.decode() for _, line in lines(path)).strip()
    except UnicodeDecodeError as error:
        raise ZipperError(
            f"{path.name} is no UTF-8 ({error.reason} at byte {error.start})."
        ) from error


# --- the layouts ---


def _jsonl(place: str, passed: Passed) -> Iterator[Sample]:
    return data.samples(place_of(place))


def _librispeech(place: str, passed: Passed) -> Iterator[Sample]:
    root = place_of(place)
    for chapter, names in walk(root, passed):
        files, rest = _by_stem(names, ".trans.txt")
        said: dict[str, tuple[str, str]] = {}  # text, problem
        for entry in files.values():
            for _, line in lines(chapter / entry[".trans.txt"]) if ".trans.txt" in entry else ():
                name, text, problem = _said(line)
                if name in said:
                    problem = "has two lines in the .trans.txt of its chapter."
                said[name] = text, problem
        sounds = {name: entry["sound"] for name, entry in files.items() if "sound" in entry}
        for name in sorted({*said, *sounds}):
            sound = (chapter / sounds.get(name, f"{name.replace('/', '_')}.flac")).relative_to(root)
            text, problem = said.get(name, ("", "has no line in the .trans.txt of its chapter."))
            row = {"id": name, SPEECH: str(sound), **_place(chapter)}
            yield Sample(str(root / sound), row if problem else row | {TEXT: text}, root, problem)
        yield from _left(chapter, rest, root, passed)


def _said(line: bytes) -> tuple[str, str, str]:
    """Name, text and problem of a line of transcripts."""
    name, *text = line.split(None, 1)
    try:
        return name.decode(), b"".join(text).decode().strip(), ""
    except UnicodeDecodeError as error:
        return (
            name.decode(errors="replace"),
            "",
            f"has a line in the .trans.txt of its chapter that is no UTF-8 ({error.reason}).",
        )


def _libritts(place: str, passed: Passed) -> Iterator[Sample]:
    root = place_of(place)
    texts = {TEXT: ".normalized.txt", "original": ".original.txt"}
    for chapter, names in walk(root, passed):
        files, rest = _by_stem(names, *texts.values())
        for name, entry in files.items():
            sound = (chapter / entry.get("sound", f"{name}.wav")).relative_to(root)
            row, problem = {"id": name, SPEECH: str(sound), **_place(chapter)}, ""
            for field, ending in texts.items():
                try:
                    row |= {field: _text(chapter / entry[ending])} if ending in entry else {}
                except ZipperError as error:
                    problem = f"cannot be used: {error}"
            if TEXT not in row:
                problem = problem or f"has no {name}.normalized.txt beside it."
            yield Sample(str(root / sound), row, root, problem)
        yield from _left(chapter, rest, root, passed)


def _librilight(place: str, passed: Passed) -> Iterator[Sample]:
    root = place_of(place)
    for book, names in walk(root, passed):
        files, rest = _by_stem(names, ".json")
        for name, entry in files.items():
            if "sound" not in entry:  # other lists of the corpus
                rest.append(entry[".json"])
                continue
            sound, row = (book / entry["sound"]).relative_to(root), _place(book)
            name = f"{row['voice']}/{book.name}/{name}"
            try:
                if ".json" not in entry:
                    raise ZipperError("there is no .json beside it")
                pieces = _pieces(read_json(book / entry[".json"]).get("voice_activity"))
            except ZipperError as error:
                yield Sample(
                    str(root / sound), row | {"id": name}, root, f"cannot be cut: {error}."
                )
                continue
            _over(passed, "sounds in which nobody speaks", not pieces)
            for n, (start, stop) in enumerate(pieces):
                piece = {"path": str(sound), "start": start, "stop": stop}
                where = f"{root / sound}, {start:.2f} to {stop:.2f} s"
                yield Sample(
                    where,
                    row | {"id": f"{name}-{n:04d}", SPEECH: piece, "duration": stop - start},
                    root,
                )
        yield from _left(book, rest, root, passed)


def _pieces(voiced: Any) -> list[tuple[float, float]]:
    """Stretches of speech, as many in a row as fit into `LONGEST_PIECE_S`; a longer one is halved
    until it does."""
    if (
        not isinstance(voiced, list)
        or not all(
            isinstance(s, list)
            and len(s) == 2
            and all(type(t) in (int, float) for t in s)
            and 0 <= s[0] < s[1] <= data.LONGEST_S
            for s in voiced
        )
        or sum(stop - start for start, stop in voiced) > data.LONGEST_S
        or any(before[1] > after[0] for before, after in pairwise(voiced))
    ):
        raise ZipperError(
            "its voice_activity is no list of [start, stop] in seconds, one behind the other"
        )
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


def _sounds(place: str | Sequence[Path], passed: Passed) -> Iterator[Sample]:
    """A folder of sound files, or several of them and single files, which are samples whatever
    their names. Ids are paths below the folder that holds all, without an ending where they are
    different without it.
    """
    places = [
        Path(os.path.abspath(place_of(p))) for p in ([place] if isinstance(place, str) else place)
    ]
    if not places:
        raise ZipperError("No file was given. Give sound files, or folders of them.")
    single: dict[Path, list[str]] = {}
    folders = [path for path in dict.fromkeys(places) if path.is_dir() or isinstance(place, str)]
    for path in sorted({*places} - {*folders}):
        single.setdefault(path.parent, []).append(path.name)
    root = Path(os.path.commonpath([*single, *folders]))
    met = set[str]()
    _over(passed, "files that were given twice", len(places) - len({*places}))
    walked = chain.from_iterable(walk(path, passed) for path in folders)
    for folder, names in [*single.items(), *walked]:
        given = single.get(folder) is names
        heard = [name for name in names if given or _is_sound(name)]
        _others(passed, {*names} - {*heard})
        stems = Counter(Path(name).stem for name in heard)
        for name in heard:
            at = (folder / name).relative_to(root)
            if os.path.join(os.path.realpath(folder), name) in met:
                _over(passed, "files that were given twice")
                continue
            met.add(os.path.join(os.path.realpath(folder), name))
            row = {"id": str(at if stems[at.stem] > 1 else at.with_suffix("")), SPEECH: str(at)}
            yield Sample(str(root / at), row, root)


# --- tables ---


def _tables(kind: str) -> Callable[[str, Passed], Iterator[Sample]]:
    """A reader of parquet or arrow files by pyarrow, a batch at a time; sound stays the bytes of a
    file."""

    def read(place: str, passed: Passed) -> Iterator[Sample]:
        extra("pyarrow")
        for split, files in _splits(kind, place, passed).items():
            number = 0
            for path in files:
                empty = True
                for row, where, problem in _rows(kind, path):
                    empty = False
                    row = {
                        "id": f"{split}-{number:08d}",
                        "split": split,
                        **{k: v for k, v in row.items() if k != "id" or v is not None},
                    }
                    yield Sample(f"{path}{where}", row, path.parent, problem)
                    number += 1
                _over(passed, f"files .{kind} without rows", empty)

    return read


_SPLIT = re.compile(r"(train|test|validation|valid|dev)(?=[-._]|$)")


def _splits(kind: str, place: str, passed: Passed) -> dict[str, list[Path]]:
    """The files of each split: of a file, a pattern, a folder of them, or what `save_to_disk`
    left."""
    at = place_of(place)
    if kind == "arrow" and (at / "dataset_dict.json").is_file():
        found = read_json(at / "dataset_dict.json").get("splits")
        if isinstance(found, list) and all(isinstance(split, str) for split in found):
            return {split: _saved(at / split) for split in found}
        raise ZipperError(
            f"{at / 'dataset_dict.json'} names no splits. Was it written by save_to_disk?"
        )
    if kind == "arrow" and (at / "state.json").is_file():
        return {_state(at).get("_split") or "train": _saved(at)}
    found = (
        [at]
        if os.path.exists(at)
        else sorted(map(Path, glob(str(at), recursive=True)))
        if has_magic(str(at))
        else []
    )
    if not found:
        raise ZipperError(f"There is nothing at {place}. Give a file, a folder or a pattern.")
    files: dict[Path, None] = {}
    for path in found:
        if not path.is_dir():
            files[path] = None
            continue
        for folder, names in walk(path, passed):
            mine = [name for name in names if name.lower().endswith(f".{kind}")]
            files |= dict.fromkeys(folder / name for name in mine)
            _others(passed, {*names} - {*mine})
    root = next(folder for folder in (at, *at.parents) if folder.is_dir())
    own = Path(os.path.abspath(root)).name
    above = Path(own if _SPLIT.fullmatch(own) else "")  # test/, but not test-corpus/
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(above / file.relative_to(root)), []).append(file)
    return splits


def _split_of(table: Path) -> str:
    """The split that the name of a table says, or the folder nearest to it, as the hub names them
    (test-00000-of-00001.parquet, test/0000.parquet); train where none does."""
    for word in reversed(table.parts):
        if said := _SPLIT.match(word):
            return "validation" if said[1] in ("valid", "dev") else said[1]
    return "train"


def _state(folder: Path) -> dict[str, Any]:
    return read_json(folder / "state.json")


def _saved(folder: Path) -> list[Path]:
    """The files of one split that `save_to_disk` wrote."""
    listed = _state(folder).get("_data_files")
    if not isinstance(listed, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in listed
    ):
        raise ZipperError(
            f"{folder / 'state.json'} lists no files. Was it written by save_to_disk?"
        )
    return [folder / file["filename"] for file in listed]


def _rows(kind: str, path: Path) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Row, place in the file and problem of each row of a table; a file or a part of one that is
    damaged is one with a problem."""
    number = 0
    try:
        if not os.path.isfile(path):
            raise ZipperError(
                "it does not exist" if not os.path.exists(path) else "it is no plain file"
            )
        for batch, lost, why in _parquet(path) if kind == "parquet" else _arrow(path):
            if batch is None:
                for n in range(number, number + lost) if lost <= MOST_LOST else (number,):
                    more = f" and {lost - 1} more" if lost > MOST_LOST else ""
                    yield {}, f", row {n}{more}", f"cannot be read: {why}."
                number += lost
                continue
            for n, (row, problem) in enumerate(_listed(batch), number):
                yield row, f", row {n}", problem
            number += batch.num_rows
    except Exception as error:  # what pyarrow makes of a damaged file has no end
        yield (
            {},
            f", behind row {number - 1}" * bool(number),
            f"is no {kind} file that can be read: "
            f"{' '.join(str(error).split()) or type(error).__name__}.",
        )


def _listed(batch: Any) -> list[tuple[dict[str, Any], str]]:
    """Each row of a batch, and what is wrong with it: text that is no UTF-8, dates that Python does
    not know."""
    try:
        return [(row, "") for row in batch.to_pylist()]
    except Exception as error:
        if batch.num_rows == 1:
            return [({}, f"cannot be read ({type(error).__name__}: {error}).")]
        alone = (_listed(batch.slice(n, 1)) for n in range(batch.num_rows))
        return list(chain.from_iterable(alone))


#: A batch of a table; or None, how many rows are lost, and why.
_Batch = tuple[Any, int, str]


def _parquet(path: Path) -> Iterator[_Batch]:
    with (
        path.open("rb") as file,
        extra("pyarrow.parquet").ParquetFile(file, page_checksum_verification=True) as table,
    ):
        _all_different(table.schema_arrow.names)
        for group in range(table.num_row_groups):
            left = table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(BATCH, row_groups=[group]):
                    batch.validate(full=True)
                    left -= batch.num_rows
                    yield batch, 0, ""
            except Exception as error:  # this group's
                yield None, left, " ".join(str(error).split())


def _arrow(path: Path) -> Iterator[_Batch]:
    pa = extra("pyarrow")
    with path.open("rb") as file:
        try:
            batches, stream = iter(pa.ipc.open_stream(file)), True
        except pa.ArrowInvalid:  # the other one of its two formats
            file.seek(0)
            table = pa.ipc.open_file(file)
            batches, stream = (table.get_batch(n) for n in range(table.num_record_batches)), False
        for batch in batches:
            _all_different(batch.schema.names)
            batch.validate(full=True)
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH), 0, ""
        if stream:
            file.seek(-len(END_OF_STREAM), os.SEEK_END)
            if file.read() != END_OF_STREAM:
                raise ZipperError("it was cut: its end is not marked, so that rows may be missing")


def _all_different(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ZipperError(f"it has two columns {twice[0]!r}")


def _audiofolder(place: str, passed: Passed) -> Iterator[Sample]:
    """By the library `datasets`, streaming: nothing is copied into its cache. Sounds that it passes
    over have a problem."""
    datasets = extra("datasets")
    root, named = place_of(place), set[str]()
    if not root.is_dir():
        raise ZipperError(f"There is nothing at {place}. Give a folder.")
    try:
        for split, dataset in datasets.load_dataset(
            "audiofolder", data_dir=str(root), streaming=True
        ).items():
            for name in [
                name
                for name, feature in (dataset.features or {}).items()
                if isinstance(feature, datasets.Audio)
            ]:
                # Left as it is: else torchcodec is asked for.
                dataset = dataset.cast_column(name, datasets.Value("string"))
            for n, row in enumerate(dataset):
                row[SPEECH] = row.pop("audio")
                named.add(os.path.realpath(row[SPEECH]))
                yield Sample(
                    f"{place}, {split}, row {n}",
                    {"id": f"{split}-{n:08d}", "split": split, **row},
                    root,
                )
    except ZipperError:
        raise
    except Exception as error:
        raise ZipperError(
            f"{place} is no audiofolder that datasets reads ({' '.join(str(error).split())})."
        ) from error
    for folder, names in walk(root, passed):
        for name in names:
            if _is_sound(name) and os.path.realpath(folder / name) not in named:
                why = (
                    "is passed over by datasets: no row of the metadata names it, or it does not "
                    "know the ending."
                )
                yield Sample(
                    str(folder / name), {"id": str((folder / name).relative_to(root))}, root, why
                )
        _others(passed, (name for name in names if not _is_sound(name)))


def about(made: Path) -> Path:
    """The file that says of which manifest and task the answers in a file are."""
    return made.with_name(f"{made.name}.of.json")


def _answers(made: Path) -> dict[int, Mapping[str, Any]]:
    """{row: its line}."""
    found = {}
    for number, line in lines(made):
        try:
            told = json.loads(line)
            found[told["row"]] = told
        except (ValueError, KeyError, TypeError) as error:
            raise ZipperError(
                f"{made}, line {number} is none of `zipper run-batch`; let that command end."
            ) from error
    return found


def _made(place: str, passed: Passed) -> Iterator[Sample]:
    answers = place_of(place)
    said = read_json(about(answers))
    if not all(isinstance(said.get(name), str) for name in ("data", "task")):
        raise ZipperError(
            f"{about(answers)} does not say of which manifest and task {answers.name} is. Run "
            "zipper run-batch anew."
        )
    manifest = answers.parent / said["data"]
    if said.get("manifest") not in (None, sha256(manifest)):
        raise ZipperError(
            f"{manifest} is another than {answers} was made of: its rows would get the answers of "
            "others. Bring the old one back, or run zipper run-batch anew."
        )
    task = Task.parse(said["task"])
    fixed = None if task.chosen else [lane.item for lane in task.segments_produced]
    lines_of = _answers(answers)
    for number, sample in enumerate(data.samples(manifest)):
        line = lines_of.get(number)
        if line is None or "made" not in line:
            _over(passed, "rows that are not done" if line is None else "rows without an answer")
            continue
        row = dict(sample.row)
        for place_in, one in enumerate(line["made"]):
            *_, last = fields_of(fixed[place_in]) if fixed else [one["tower"]]
            field = last if last == one["tower"] else f"{last}:{one['tower']}"
            if field in row:
                raise ZipperError(
                    f"{sample.where} has a field {field!r}, and {answers} holds one that was made. "
                    f"Name it in the task, such as 'made:{one['tower']}', and do that anew."
                )
            content = one["content"]
            # Where run-batch writes files; whatever else is a text, also one that a file is called.
            if isinstance(content, str) and content.startswith(f"{answers.name}.files/"):
                content = str(answers.parent.resolve() / content)
            row[field] = content
        yield sample._replace(row=row)


_KINDS: dict[str, Callable[[Any, Passed], Iterator[Sample]]] = {
    "jsonl": _jsonl,
    "librispeech": _librispeech,
    "libritts": _libritts,
    "librilight": _librilight,
    "sounds": _sounds,
    "parquet": _tables("parquet"),
    "arrow": _tables("arrow"),
    "audiofolder": _audiofolder,
    "made": _made,
}
