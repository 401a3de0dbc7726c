"""Odd corpora, made from a seed: of all that lies in one, what is used, refused and passed over add
up, and nothing else happens.

A corpus is written together with an account of what was put in: marks of rows and files, each of
which must turn up as a sample, on the list of bad ones, or in the counts by name. Damaged tables
have no rows to count; their files must be named.
"""

import json
import os
import random
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny

from zipper.data.extraction import Policy, extract, processes
from zipper.errors import ZipperError

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}
NEVER = "\u2028\x0b\x0c\x1c\x85"  # what ends a line for str.splitlines alone


@dataclass
class Corpus:
    """What was put in.

    marks: of each sample the names, under one of which it is used or refused. files: those that
    must be named among the bad. noted: ids of samples that have the field "snr". endings: how many
    files lie there that mean nothing. whole: all of it can be read, so that every sample is known.
    """

    source: str
    marks: list[tuple[str, ...]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    noted: set[str] = field(default_factory=set)
    endings: Counter[str] = field(default_factory=Counter)
    whole: bool = True


@cache
def wave() -> bytes:
    """A tenth of a second of noise as a file."""
    chance = random.Random(0)
    samples = b"".join(struct.pack("<h", chance.randrange(-3000, 3000)) for _ in range(1600))
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + 3200,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        16_000,
        32_000,
        2,
        16,
        b"data",
        3200,
    )
    return head + samples


def value(chance: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, and some that it cannot."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: chance.choice([True, False]),
        lambda: chance.choice([0, -1, 2**31, 2**63, -(2**70), 10**30, 10**400, 3, 5]),
        lambda: chance.choice([0.0, -0.5, 1e308, float("nan"), float("inf"), 0.05, 1e-300]),
        lambda: chance.choice(
            [
                "",
                " ",
                "call",
                "Call, Anna!",
                "\ud83d",
                "a\0b",
                "привет",
                NEVER,
                "x" * 5000,
                "../..",
                "~",
                "~\0",
                "~\ud83d",
                "a.wav",
            ]
        ),
        lambda: chance.choice(
            [
                [],
                [2, 3],
                [0],
                [1],
                [24],
                [-1],
                [1.5],
                ["2"],
                [None],
                [[2]],
                [True],
                [2] * 500,
                [10**40],
            ]
        ),
        lambda: (
            {"path": chance.choice(["a.wav", "gone.wav", "", None, 3, "a\0", "x" * 300])}
            | piece(chance)
        ),
        lambda: {"bytes": chance.choice(["", "RIFF", None]), "path": "a.wav"},
    ]
    if depth < 3:
        kinds += [
            lambda: [value(chance, depth + 1) for _ in range(chance.randrange(3))],
            lambda: {
                chance.choice("abc"): value(chance, depth + 1) for _ in range(chance.randrange(3))
            },
        ]
    return chance.choice(kinds)()


def piece(chance: random.Random) -> dict[str, Any]:
    times = [0.0, 0.02, 0.05, 1e9, -1, float("nan"), None, "0", True, [1], 10**309]
    return {key: chance.choice(times) for key in ("start", "stop", "step") if chance.random() < 0.4}


def row(chance: random.Random, mark: str) -> dict[str, Any]:
    """A row of a manifest: mostly a good one, with something odd here and there."""
    made: dict[str, Any] = {
        "id": mark,
        "text": chance.choice(["call anna", "", "Send, two!", "pay 5", "caf\u00e9"]),
    }
    made["speech"] = chance.choice(
        [[2, 3], [], "a.wav", {"path": "a.wav"}, "gone.wav", {"path": "a.wav", "start": 0.02}]
    )
    if chance.random() < 0.2:
        made["audio_filepath"] = made.pop("speech")
    for key, odd in [
        ("offset", [0, 0.05, 9, -1, "0"]),
        ("duration", [0.1, 0.05, 7, "1", None]),
        ("voice", ["low", 3, None]),
    ]:
        if chance.random() < 0.2:
            made[key] = chance.choice(odd)
    for key in ("text", "speech", "split", "question:speech", "a:b:text", ":text", "text:"):
        if chance.random() < 0.12:
            made[key] = value(chance)
    return made


def manifest(folder: Path, chance: random.Random) -> Corpus:
    """Lines of rows, some of them none; ends of lines, blank lines and a mark of byte order
    wherever they may stand."""
    (folder / "a.wav").write_bytes(wave())
    corpus, lines = (
        Corpus(
            str(
                folder
                / chance.choice(
                    ["rows.jsonl", "m.json", "\u00fc [1]#.jsonl", os.fsdecode(b"\xff.jsonl")]
                )
            )
        ),
        [],
    )
    ends = chance.choice(["\n", "\r\n", "\n\n \n", "\r"])
    number = 0
    for n in range(chance.randrange(1, 9)):
        number += 1 if n == 0 else ends.count("\n") or ends.count("\r")
        made = row(chance, f"mark{n}" if chance.random() < 0.9 else "mark0")
        if made["id"] != "mark0" and chance.random() < 0.3:
            made["snr"] = chance.choice([3, "x", [0.5], {}])
            corpus.noted.add(made["id"])
        odd = chance.random()
        line = json.dumps(made, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if odd < 0.25:
            broken = [
                line[: len(line) // 2],
                b"[]",
                b'"a"',
                b"\0" * 9,
                b"{" * 9,
                line + b"}",
                b"\xff\xfe" + line,
                b"9" * 5000,
            ]
            broken += [
                b"[" * 5000,
                b'{"a": 1, "a": 2}',
                line.replace(b"call", b"c\xe9ll") + b"\x80",
                b"nan",
                b"null",
            ]
            line = chance.choice(broken)
        corpus.marks.append((f"line {number}",) if odd < 0.25 else (made["id"], f"line {number}"))
        lines.append(line)
    content = ends.encode().join(lines) + chance.choice([b"", ends.encode()])
    Path(corpus.source).write_bytes(chance.choice([b"", b"\xef\xbb\xbf"]) + content)
    return corpus


def sounds(folder: Path, chance: random.Random) -> Corpus:
    """Folders of sound and other files, of odd names, linked in rings."""
    corpus, places = Corpus(f"sounds:{folder}"), [folder]
    (folder / "first.wav").write_bytes(wave())
    corpus.marks.append(("first",))
    for n in range(chance.randrange(1, 12)):
        place = chance.choice(places)
        odd = chance.choice(
            [
                "",
                "\u00fc",
                os.fsdecode(b"\xff\xe9"),
                " ",
                "\n",
                "[x]",
                "#",
                "~",
                "x" * 200,
                "'",
                "$(a)",
                NEVER,
                "a:b",
            ]
        )
        kind = chance.randrange(7)
        if kind == 0:
            places.append(place / f"d{n}{odd}")
            places[-1].mkdir()
        elif kind == 1:
            (place / f"ring{n}").symlink_to(
                chance.choice([*places, folder.parent, Path("/"), Path(f"ring{n}"), Path("gone")])
            )
            broken = not (place / f"ring{n}").is_dir()
            corpus.endings["broken"] += broken
        elif kind == 2:
            name = chance.choice([f".hidden{n}.wav", f"._{n}.wav"])
            (place / name).write_bytes(wave())
        elif kind == 3:
            ending = chance.choice([".txt", ".TXT", ".json", ".lab", ".wavy", ""])
            (place / f"other{n}{ending}").write_bytes(b"\xff" * n)
            corpus.endings[ending.lower()] += 1
        elif kind == 4:
            os.mkfifo(place / f"pipe{n}.wav")
            corpus.marks.append((f"pipe{n}",))
        else:
            name = f"s{n}{odd}{chance.choice(['.wav', '.WAV', '.flac', '.m4a', '.mp3', '.sph', '.webm'])}"
            (place / name).write_bytes(
                chance.choice(
                    [wave(), wave(), wave()[:-900], wave()[:30], b"", b"RIFF" * 99, b"\0" * 99]
                )
            )
            corpus.marks.append((os.path.splitext(name)[0],))
    return corpus


def libri(folder: Path, chance: random.Random) -> Corpus:
    """Chapters of LibriSpeech or LibriTTS with gaps, lines that are none and texts in other
    encodings."""
    kind = chance.choice(["librispeech", "libritts"])
    corpus = Corpus(f"{kind}:{folder}")
    for chapter in range(chance.randrange(1, 4)):
        place = folder / "dev" / "1" / str(chapter)
        place.mkdir(parents=True)
        lines = []
        for n in range(chance.randrange(1, 5)):
            name = f"1-{chapter}-{n:04d}"
            said = chance.choice(
                [
                    b"CALL ANNA",
                    b"Call, Anna!",
                    b"",
                    b"caf\xe9",
                    b"42",
                    "a\u2028b".encode(),
                    b"x\0y",
                    b"\xef\xbb\xbfCALL",
                ]
            )
            there = chance.random()
            if there < 0.9:
                ending = chance.choice([".flac", ".wav", ".FLAC"])
                (place / f"{name}{ending}").write_bytes(
                    chance.choice([wave(), wave(), b"", wave()[:99]])
                )
            if there > 0.1:
                lines.append(name.encode() + chance.choice([b" ", b"\t"]) + said)
                if kind == "libritts":
                    (
                        place / f"{name}{chance.choice(['.normalized.txt', '.NORMALIZED.TXT'])}"
                    ).write_bytes(said)
            corpus.marks.append((name,))
            if there < 0.9 and chance.random() < 0.1:
                (place / f"{name}.wave").write_bytes(wave())
                corpus.marks.append((f"{name}.wave",))
        if kind == "librispeech":
            (place / f"1-{chapter}.trans.txt").write_bytes(
                chance.choice([b"\n", b"\r\n", b"\n\n", b"\r"]).join(lines)
            )
        else:
            (place / f"1_{chapter}.trans.tsv").write_bytes(b"a\tb\tc\n")
            corpus.endings[".tsv"] += 1
        if chance.random() < 0.3:
            (place / "again").symlink_to(folder)
    return corpus


def light(folder: Path, chance: random.Random) -> Corpus:
    """Books of Libri-Light whose descriptions are odd."""
    corpus = Corpus(f"librilight:{folder}")
    book = folder / "small" / "1" / "book"
    book.mkdir(parents=True)
    for n in range(chance.randrange(1, 6)):
        (book / f"s{n}.flac").write_bytes(chance.choice([wave(), wave(), b""]))
        voiced = chance.choice(
            [
                [[0, 0.1]],
                [[0, 0.05], [0.05, 0.1]],
                [[0, 99]],
                [[5, 1]],
                [[0, float("nan")]],
                "x",
                None,
                [[0, 1e300]],
                [[0]],
            ]
        )
        content = json.dumps({"voice_activity": voiced}).encode()
        content = chance.choice([content, content, content[:-3], b"", b"\xff", b"[]", b"\0" * 9])
        if chance.random() < 0.9:
            (book / f"s{n}.json").write_bytes(content)
        corpus.marks.append((f"s{n}", f"s{n}-0000"))
    return corpus


def tables(folder: Path, chance: random.Random) -> Corpus:
    """Parquet or arrow files, alike and unlike, whole and damaged."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = chance.choice(["parquet", "arrow"])
    corpus = Corpus(f"{kind}:{chance.choice([str(folder), f'{folder}/*', f'{folder}/*.{kind}'])}")
    (folder / "a.wav").write_bytes(wave())
    corpus.endings[".wav"] += corpus.source.endswith(folder.name)
    if corpus.source.endswith("/*"):
        corpus.files.add("a.wav")
    for n in range(chance.randrange(1, 4)):
        path = folder / f"t{n}{chance.choice(['', '[0]', ' ', 'ü'])}.{kind}"
        size, base = chance.choice([0, 1, 5, 30]), f"t{n}-"
        ids = [f"{base}{i}" for i in range(size)]
        columns: dict[str, Any] = {
            "id": ids,
            "text": chance.choice([["call"] * size, ["Send, 5"] * size, [None] * size, [1] * size]),
        }
        columns |= chance.choice(
            [
                {"speech": [[2, 3]] * size},
                {"speech": ["a.wav"] * size},
                {"recording": [{"bytes": wave(), "path": "b.wav"}] * size},
                {"recording": [wave()] * size, "other": [b"x"] * size},
                {"speech": [b""] * size, "snr": [0.5] * size},
                {"speech": [{"path": "a.wav", "start": 0.02}] * size},
                {"file": ["a.wav"] * size},
            ]
        )
        made = arrow.table(columns)
        if kind == "parquet":
            parquet.write_table(made, path, write_page_checksum=True, row_group_size=10)
        else:
            writer = chance.choice([arrow.ipc.new_stream, arrow.ipc.new_file])
            with arrow.OSFile(str(path), "wb") as file, writer(file, made.schema) as out:
                out.write_table(made, max_chunksize=10)
        damage, content = chance.random(), path.read_bytes()
        if damage < 0.4:
            cut, at = chance.randrange(len(content)), chance.randrange(len(content))
            spoiled = [
                content[:cut],
                content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :],
                b"",
                content[:at] + content[at + 9 :],
            ]
            path.write_bytes(chance.choice(spoiled))
            corpus.whole = False
        else:
            corpus.marks += [(name,) for name in ids]
        if size == 0 and damage >= 0.4:
            corpus.endings["empty"] += 1
    return corpus


KINDS = (manifest, sounds, libri, light, tables)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A hang is an error."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fate(number: int, folder: Path) -> str:
    """Make corpus number so and so, extract it, and hold it against its account; what became of
    it."""
    chance = random.Random(number)
    (folder / "in").mkdir(parents=True)
    corpus = KINDS[number % len(KINDS)](folder / "in", chance)
    try:
        with within(60):
            units = extract(
                corpus.source,
                folder / "out",
                MODALITIES,
                Policy("skip", 1.0),
                spread=processes(1),
                shard=7,
            )
    except ZipperError as error:
        assert str(error).strip() and len(str(error)) < 5_000
        assert not (folder / "out" / "provenance.json").exists()
        assert not corpus.whole or "There is no sample in" in str(error), error
        return "refused"
    told = json.loads((folder / "out" / "provenance.json").read_text(encoding="utf-8"))
    bad = [json.loads(line) for line in (folder / "out" / "bad.jsonl").read_bytes().splitlines()]
    assert told["samples"] == told["rows"] + told["bad"] == len(units) + len(bad)
    used = [units.name(n) for n in range(len(units))]
    assert len([*units]) == len(units) and all(line["why"] for line in bad)
    places = [os.path.basename(line["where"]) for line in bad]
    said = {
        *used,
        *map(os.path.basename, used),
        *(line["id"] for line in bad),
        *(os.path.basename(line["id"]) for line in bad),
        *places,
    }
    said |= {place.rpartition(", ")[2] for place in places} | {
        os.path.splitext(name)[0] for name in said if "-" not in name
    }
    lost = [names for names in corpus.marks if not said.intersection(names)]
    assert len(lost) == told["passed"].get("sounds in which nobody speaks", 0), (
        lost,
        said,
        told["passed"],
    )
    assert corpus.files <= said
    assert told["passed"].get("field snr", 0) == len(corpus.noted.intersection(used))
    if corpus.whole:
        known = [count for name, count in told["passed"].items() if name.startswith("files ")]
        assert sum(known) == sum(corpus.endings.values()), (corpus.endings, told["passed"])
    if number % len(KINDS) < 3:  # in the others a file may hold any number of samples
        assert told["samples"] == len(corpus.marks), (corpus.marks, said)
    return "used" if len(bad) == 0 else "mixed"


def test_of_100_odd_corpora_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    fates = Counter(fate(number, tmp_path / str(number)) for number in range(100))
    assert fates["used"] and fates["mixed"] and fates["refused"]


@pytest.mark.slow
def test_of_500_odd_corpora_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    fates = Counter(fate(number, tmp_path / str(number)) for number in range(500))
    assert fates["refused"] < 50 and fates["used"] > 20
