"""Layouts: small corpora, rendered as the real ones lie on disk, give their samples; what does not fit is named."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny

from zipper import layouts
from zipper.errors import ZipperError
from zipper.extraction import Policy, extract, processes

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}


def sound(path: Path, seconds: float = 0.2, rate_hz: int = 16_000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.sound(path, seconds, rate_hz, seed)


def rows(source: str, split: str | None = None) -> list[dict[str, Any]]:
    return [dict(sample.row) for sample in layouts.samples(source, split)]


def librispeech(folder: Path) -> Path:
    """As openslr.org/12: LibriSpeech/<subset>/<speaker>/<chapter>/, one list of transcripts a chapter, and papers at the top."""
    root = folder / "LibriSpeech"
    said = {
        "dev-clean/84/121123/84-121123": ["CALL ANNA", "SEND TWO RED LAMP"],
        "dev-clean/84/121550/84-121550": ["PAY PETER"],
        "train-clean-100/103/1240/103-1240": ["TURN BLUE"],
    }
    for chapter, lines in said.items():
        for n, _ in enumerate(lines):
            sound(root / f"{chapter}-{n:04d}.flac", seed=n)
        name = Path(chapter).name
        (root / f"{chapter}.trans.txt").write_text("".join(f"{name}-{n:04d} {line}\n" for n, line in enumerate(lines)))
    for paper in ("SPEAKERS.TXT", "CHAPTERS.TXT", "BOOKS.TXT", "README.TXT", "LICENSE.TXT"):
        (root / paper).write_text(";ID  |SEX| SUBSET           |MINUTES| NAME\n")
    return root


def test_librispeech_as_it_lies_on_disk(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    found = rows(f"librispeech:{root}")
    assert found[0] == {
        "id": "84-121123-0000",
        "text": "CALL ANNA",
        "speech": "dev-clean/84/121123/84-121123-0000.flac",
        "voice": "84",
        "split": "dev-clean",
    }
    assert [row["id"] for row in found] == ["84-121123-0000", "84-121123-0001", "84-121550-0000", "103-1240-0000"]
    assert [row["text"] for row in rows(f"librispeech:{root}", "train-clean-100")] == ["TURN BLUE"]
    assert [row["split"] for row in rows(f"librispeech:{root / 'dev-clean'}")] == ["dev-clean"] * 3
    units = extract(f"librispeech:{root}", tmp_path / "units", MODALITIES, spread=processes(1))
    assert units[1]["text"] == tiny.text().encode("send two red lamp")
    assert units[1]["speech"] == tiny.units().encode(root / "dev-clean/84/121123/84-121123-0001.flac")


def test_librispeech_with_gaps_names_them(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    (root / "dev-clean/84/121123/84-121123-0000.flac").unlink()
    sound(root / "dev-clean/84/121123/84-121123-0007.flac")
    (root / "dev-clean/84/121550/84-121550.trans.txt").unlink()
    units = extract(f"librispeech:{root}", tmp_path / "units", MODALITIES, Policy("skip", 0.9), spread=processes(1))
    assert len(units) == 2
    bad = [json.loads(line) for line in (tmp_path / "units" / "bad.jsonl").read_text().splitlines()]
    assert [(line["id"], line["why"].partition(".flac ")[2].split(".")[0]) for line in bad] == [
        ("84-121123-0000", "does not exist"),
        ("84-121123-0007", "has no line in the "),
        ("84-121550-0000", "has no line in the "),
    ]


def test_libritts_as_it_lies_on_disk(tmp_path: Path) -> None:
    """As openslr.org/60: 24 kHz, two texts an utterance, lists of the chapter beside."""
    chapter = tmp_path / "LibriTTS" / "dev-clean" / "1272" / "128104"
    for n, (original, normalized) in enumerate([("Call Anna, 2 times.", "Call Anna, two times."), ("Pay Peter!", "Pay Peter!")]):
        name = f"1272_128104_00000{n}_000000"
        sound(chapter / f"{name}.wav", rate_hz=24_000, seed=n)
        (chapter / f"{name}.original.txt").write_text(original)
        (chapter / f"{name}.normalized.txt").write_text(normalized + "\n")
    (chapter / "1272_128104.trans.tsv").write_text("1272_128104_000000_000000\tCall Anna, 2 times.\tCall Anna, two times.\n")
    (chapter / "1272_128104.book.tsv").write_text("Call Anna.\tCall Anna.\n")
    sound(chapter / "1272_128104_000005_000000.wav", rate_hz=24_000)
    source = f"libritts:{tmp_path / 'LibriTTS'}"
    first, second, third = layouts.samples(source)
    assert first.row == {
        "id": "1272_128104_000000_000000",
        "speech": "dev-clean/1272/128104/1272_128104_000000_000000.wav",
        "split": "dev-clean",
        "voice": "1272",
        "text": "Call Anna, two times.",
        "original": "Call Anna, 2 times.",
    }
    assert second.row["text"] == "Pay Peter!" and not second.problem
    assert third.problem == "has no 1272_128104_000005_000000.normalized.txt beside it, or an empty one."
    assert next(layouts.samples(f"{source}#text=original")).row["text"] == "Call Anna, 2 times."


def test_librilight_as_it_lies_on_disk(tmp_path: Path) -> None:
    """As arXiv:1912.07875: long files, each with a .json that says where somebody speaks."""
    book = tmp_path / "small" / "960" / "history_holland_librivox_64kb_mp3"
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 110).astype(np.float32)
    book.mkdir(parents=True)
    soundfile.write(book / "holland_01_64kb.flac", noise, 16_000, subtype="PCM_24")
    voiced = [[0.4, 12.32], [13.0, 25.0], [26.0, 29.9], [31.0, 40.0], [46.0, 110.0]]
    described = {
        "speaker": "960",
        "book_meta": {"id": "319", "title": "History of Holland", "genre": ["*Non-fiction"], "Dramatic Readings": False},
        "snr": 5.391,
        "voice_activity": voiced,
    }
    (book / "holland_01_64kb.json").write_text(json.dumps(described))
    source = f"librilight:{tmp_path / 'small'}"
    found = rows(source)
    assert [(row["speech"]["start"], row["speech"]["stop"]) for row in found] == [
        (0.4, 29.9),
        (31.0, 40.0),
        (46.0, 62.0),
        (62.0, 78.0),
        (78.0, 94.0),
        (94.0, 110.0),
    ]
    assert found[1] == {
        "id": "960/history_holland_librivox_64kb_mp3/holland_01_64kb-0001",
        "speech": {"path": "960/history_holland_librivox_64kb_mp3/holland_01_64kb.flac", "start": 31.0, "stop": 40.0},
        "split": "small",
        "voice": "960",
        "duration": 9.0,
    }
    units = extract(source, tmp_path / "units", {"speech": tiny.units()}, limit=2, spread=processes(1))
    soundfile.write(tmp_path / "piece.flac", noise[31 * 16_000 : 40 * 16_000], 16_000, subtype="PCM_24")
    assert units[1]["speech"] == tiny.units().encode(tmp_path / "piece.flac")
    (book / "holland_01_64kb.json").write_text(json.dumps(described | {"voice_activity": [[3, 1]]}))
    (sample,) = layouts.samples(source)
    assert sample.problem == "cannot be cut: its voice_activity is no list of [start, stop] in seconds."
    (book / "holland_01_64kb.json").unlink()
    (sample,) = layouts.samples(source)
    assert sample.problem == "cannot be cut: there is no .json beside it."


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    for name in ("b.wav", "a/c.FLAC", "a.ogg"):
        sound(tmp_path / name, rate_hz=16_000)
    (tmp_path / "notes.txt").write_text("no sound")
    assert rows(f"sounds:{tmp_path}") == [
        {"id": "a", "speech": "a.ogg"},
        {"id": "b", "speech": "b.wav"},
        {"id": "a/c", "speech": "a/c.FLAC"},
    ]


@pytest.fixture
def spoken(tmp_path: Path) -> Any:
    """A small data set of Hugging Face's kind, sound inside."""
    datasets = pytest.importorskip("datasets")
    paths = [sound(tmp_path / "clips" / f"{n}.wav", seed=n) for n in range(5)]
    columns = {
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "sentence": ["call anna", "send", "pay", "turn red", "lamp"],
    }
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())


def is_spoken(source: str, tmp_path: Path) -> None:
    found = extract(source, tmp_path / "units", MODALITIES, shard=2, spread=processes(1))
    assert [row["text"] for row in found] == [tiny.text().encode(t) for t in ("call anna", "send", "pay", "turn red", "lamp")]
    assert [row["speech"] for row in found] == [tiny.units().encode(tmp_path / "clips" / f"{n}.wav") for n in range(5)]
    assert [found.name(n) for n in range(2)] == ["train-00000000", "train-00000001"]
    assert "torchcodec" not in sys.modules


def test_parquet_of_hugging_face(tmp_path: Path, spoken: Any) -> None:
    for n in range(2):
        spoken.shard(2, n, contiguous=True).to_parquet(tmp_path / f"train-{n}.parquet")
    is_spoken(f"parquet:{tmp_path}/*.parquet#text=sentence", tmp_path)


def test_a_folder_of_save_to_disk(tmp_path: Path, spoken: Any) -> None:
    spoken.save_to_disk(tmp_path / "saved")
    is_spoken(f"arrow:{tmp_path / 'saved'}#text=sentence,speech=audio", tmp_path)


def test_arrow_files_of_hugging_face(tmp_path: Path, spoken: Any) -> None:
    spoken.save_to_disk(tmp_path / "saved")
    is_spoken(f"arrow:{tmp_path}/saved/*.arrow#text=sentence", tmp_path)


def test_audiofolder_of_hugging_face(tmp_path: Path, spoken: Any) -> None:
    lines = [f"{n}.wav,{spoken.select_columns('sentence')[n]['sentence']}" for n in range(5)]
    (tmp_path / "clips" / "metadata.csv").write_text("\n".join(["file_name,sentence", *lines]) + "\n")
    is_spoken(f"audiofolder:{tmp_path / 'clips'}#text=sentence", tmp_path)


def test_a_column_that_is_not_there_is_named(tmp_path: Path, spoken: Any) -> None:
    spoken.to_parquet(tmp_path / "a.parquet")
    sample = next(layouts.samples(f"parquet:{tmp_path / 'a.parquet'}#text=transcript"))
    assert sample.problem == "has no 'transcript'; it has id, split, audio, sentence, speech."


@pytest.mark.parametrize("source", ["rows.csv", "folder", "librivox:x", "librispeech:", "parquet:x#text", "parquet:x#=a", ":x"])
def test_a_source_that_is_none_is_told_the_kinds(source: str) -> None:
    kinds = "jsonl, librispeech, libritts, librilight, sounds, parquet, arrow, audiofolder"
    with pytest.raises(ZipperError, match=rf"{source!r} is no source. Give the path of a .jsonl manifest.*{kinds}"):
        next(layouts.samples(source))


def test_a_source_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    for kind in ("librispeech", "libritts", "librilight", "sounds"):
        with pytest.raises(ZipperError, match=r"gone is no folder. Give the one that holds the corpus"):
            next(layouts.samples(f"{kind}:{tmp_path / 'gone'}"))
        with pytest.raises(ZipperError, match="There is no sample in"):
            next(layouts.samples(f"{kind}:{tmp_path}"))
    for kind in ("parquet", "arrow", "audiofolder"):
        with pytest.raises(ZipperError, match=r"There is nothing at .*gone"):
            next(layouts.samples(f"{kind}:{tmp_path / 'gone*'}"))
    with pytest.raises(ZipperError, match=r"gone.jsonl does not exist"):
        next(layouts.samples(str(tmp_path / "gone.jsonl")))


def test_a_folder_of_a_corpus_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = librispeech(tmp_path)
    real = os.scandir

    def listed(path: Any) -> Any:
        if str(path).endswith("121550"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(ZipperError, match="121550 cannot be listed: Permission denied"):
        rows(f"librispeech:{root}")
