"""Layouts: small corpora, rendered as the real ones lie on disk, give their samples; what does not
fit is named."""

import errno
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny

from zipper.data import layouts
from zipper.data.extraction import Policy, extract, processes
from zipper.errors import ZipperError

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}


def sound(path: Path, seconds: float = 0.2, rate_hz: int = 16_000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.sound(path, seconds, rate_hz, seed)


def rows(source: str, split: str | None = None) -> list[dict[str, Any]]:
    return [dict(sample.row) for sample in layouts.samples(source, split)]


def librispeech(folder: Path) -> Path:
    """As openslr.org/12: LibriSpeech/<subset>/<speaker>/<chapter>/, one list of transcripts a
    chapter, and papers at the top."""
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
        (root / f"{chapter}.trans.txt").write_text(
            "".join(f"{name}-{n:04d} {line}\n" for n, line in enumerate(lines))
        )
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
    assert [row["id"] for row in found] == [
        "84-121123-0000",
        "84-121123-0001",
        "84-121550-0000",
        "103-1240-0000",
    ]
    assert [row["text"] for row in rows(f"librispeech:{root}", "train-clean-100")] == ["TURN BLUE"]
    assert [row["split"] for row in rows(f"librispeech:{root / 'dev-clean'}")] == ["dev-clean"] * 3
    units = extract(f"librispeech:{root}", tmp_path / "units", MODALITIES, spread=processes(1))
    assert units[1]["text"] == tiny.text().encode("send two red lamp")
    assert units[1]["speech"] == tiny.units().encode(
        root / "dev-clean/84/121123/84-121123-0001.flac"
    )


def test_librispeech_with_gaps_names_them(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    (root / "dev-clean/84/121123/84-121123-0000.flac").unlink()
    sound(root / "dev-clean/84/121123/84-121123-0007.flac")
    (root / "dev-clean/84/121550/84-121550.trans.txt").unlink()
    units = extract(
        f"librispeech:{root}",
        tmp_path / "units",
        MODALITIES,
        Policy("skip", 0.9),
        spread=processes(1),
    )
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
    for n, (original, normalized) in enumerate(
        [("Call Anna, 2 times.", "Call Anna, two times."), ("Pay Peter!", "Pay Peter!")]
    ):
        name = f"1272_128104_00000{n}_000000"
        sound(chapter / f"{name}.wav", rate_hz=24_000, seed=n)
        (chapter / f"{name}.original.txt").write_text(original)
        (chapter / f"{name}.normalized.txt").write_text(normalized + "\n")
    (chapter / "1272_128104.trans.tsv").write_text(
        "1272_128104_000000_000000\tCall Anna, 2 times.\tCall Anna, two times.\n"
    )
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
    assert third.problem == "has no 1272_128104_000005_000000.normalized.txt beside it."
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
        "book_meta": {
            "id": "319",
            "title": "History of Holland",
            "genre": ["*Non-fiction"],
            "Dramatic Readings": False,
        },
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
        "speech": {
            "path": "960/history_holland_librivox_64kb_mp3/holland_01_64kb.flac",
            "start": 31.0,
            "stop": 40.0,
        },
        "split": "small",
        "voice": "960",
        "duration": 9.0,
    }
    units = extract(
        source, tmp_path / "units", {"speech": tiny.units()}, limit=2, spread=processes(1)
    )
    soundfile.write(
        tmp_path / "piece.flac", noise[31 * 16_000 : 40 * 16_000], 16_000, subtype="PCM_24"
    )
    assert units[1]["speech"] == tiny.units().encode(tmp_path / "piece.flac")
    (book / "holland_01_64kb.json").write_text(json.dumps(described | {"voice_activity": [[3, 1]]}))
    (sample,) = layouts.samples(source)
    assert (
        sample.problem
        == "cannot be cut: its voice_activity is no list of [start, stop] in seconds, one behind the other."
    )
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
    assert [row["text"] for row in found] == [
        tiny.text().encode(t) for t in ("call anna", "send", "pay", "turn red", "lamp")
    ]
    assert [row["speech"] for row in found] == [
        tiny.units().encode(tmp_path / "clips" / f"{n}.wav") for n in range(5)
    ]
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
    (tmp_path / "clips" / "metadata.csv").write_text(
        "\n".join(["file_name,sentence", *lines]) + "\n"
    )
    is_spoken(f"audiofolder:{tmp_path / 'clips'}#text=sentence", tmp_path)


def test_a_column_that_is_not_there_is_named(tmp_path: Path, spoken: Any) -> None:
    spoken.to_parquet(tmp_path / "a.parquet")
    sample = next(layouts.samples(f"parquet:{tmp_path / 'a.parquet'}#text=transcript"))
    assert sample.problem == "has no 'transcript'; it has id, split, audio, sentence."


@pytest.mark.parametrize(
    "source",
    ["rows.csv", "folder", "librivox:x", "librispeech:", "parquet:x#text", "parquet:x#=a", ":x"],
)
def test_a_source_that_is_none_is_told_the_kinds(source: str) -> None:
    kinds = "jsonl, librispeech, libritts, librilight, sounds, parquet, arrow, audiofolder"
    with pytest.raises(
        ZipperError, match=rf"{source!r} is no source. Give the path of a .jsonl manifest.*{kinds}"
    ):
        next(layouts.samples(source))


def test_a_source_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    for kind in ("librispeech", "libritts", "librilight", "sounds"):
        with pytest.raises(
            ZipperError, match=r"gone is no folder. Give the one that holds the corpus"
        ):
            next(layouts.samples(f"{kind}:{tmp_path / 'gone'}"))
        with pytest.raises(ZipperError, match="There is no sample in"):
            next(layouts.samples(f"{kind}:{tmp_path}"))
    for kind in ("parquet", "arrow", "audiofolder"):
        with pytest.raises(ZipperError, match=r"There is nothing at .*gone"):
            next(layouts.samples(f"{kind}:{tmp_path / 'gone*'}"))
    with pytest.raises(ZipperError, match=r"gone.jsonl does not exist"):
        next(layouts.samples(str(tmp_path / "gone.jsonl")))
    assert layouts.names("rows.jsonl#text=said") and not layouts.names("a#b.wav")


def test_a_folder_of_a_corpus_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = librispeech(tmp_path)
    real = os.scandir

    def listed(path: Any) -> Any:
        if str(path).endswith("121550"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(ZipperError, match="121550 cannot be listed: Permission denied"):
        rows(f"librispeech:{root}")


# --- the walk


def walked(source: layouts.Source) -> tuple[list[str], dict[str, int]]:
    """Ids of the samples, those with a problem marked by it, and what was passed over."""
    passed = Counter[str]()
    found = [
        f"{s.row['id']}{'!' * bool(s.problem)}" for s in layouts.samples(source, passed=passed)
    ]
    return found, dict(passed)


def test_a_ring_of_links_has_an_end_and_each_folder_comes_once(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    sound(root / "b" / "a.wav")
    sound(tmp_path / "far" / "c.wav")
    (tmp_path / "far" / "back").symlink_to(root / "b")
    for name, target in {
        "itself": root,
        "above": tmp_path,
        "all": Path("/"),
        "a": root / "b",
        "z": tmp_path / "far",
    }.items():
        (root / name).symlink_to(target)
    (root / "b" / "up").symlink_to("..")
    (root / "nowhere").symlink_to("gone")
    found, passed = walked(f"sounds:{root}")
    assert found == ["b/a", "z/c"]
    assert passed == {"folders that were met before": 6, "files without an ending that is known": 1}
    assert walked([root]) == (found, passed)


def test_two_links_that_hold_each_other_have_an_end(tmp_path: Path) -> None:
    for one, other in (("one", "other"), ("other", "one")):
        sound(tmp_path / one / f"{one}.wav")
        (tmp_path / one / "link").symlink_to(tmp_path / other)
    assert walked(f"sounds:{tmp_path / 'one'}")[0] == ["one", "link/other"]


def test_a_linked_corpus_is_read_through_its_link(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    (tmp_path / "link").symlink_to(root)
    (root / "copy").symlink_to(root / "dev-clean")
    wanted = rows(f"librispeech:{root}")
    assert rows(f"librispeech:{tmp_path / 'link'}") == wanted and len(wanted) == 4


def test_what_is_hidden_is_passed_over_and_counted(tmp_path: Path) -> None:
    for name in ("a.wav", "._a.wav", ".git/annex/x.wav", "b/.hidden.flac"):
        sound(tmp_path / name)
    (tmp_path / ".DS_Store").write_text("x")
    assert walked(f"sounds:{tmp_path}") == (["a"], {"hidden files and folders": 4})
    assert walked([tmp_path / "._a.wav"])[0] == ["._a"]  # who names a file means it


def test_every_ending_of_sound_is_a_sample_and_every_other_file_is_counted_by_its_own(
    tmp_path: Path,
) -> None:
    for name in ("a.wav", "b.AIFF", "c.au", "d.caf", "e.w64"):
        sound(tmp_path / "clips" / name)
    for name in (
        "f.m4a",
        "g.webm",
        "h.sph",
        "i.MP4",
        "notes.txt",
        "more.TXT",
        "LICENSE",
        "part.0001",
    ):
        (tmp_path / "clips" / name).write_bytes(b"no sound")
    source = f"sounds:{tmp_path / 'clips'}"
    units = extract(
        source,
        tmp_path / "units",
        {"speech": tiny.units()},
        Policy("skip", 0.9),
        spread=processes(1),
    )
    assert [units.name(n) for n in range(len(units))] == ["a", "b", "c", "d", "e"]
    told = json.loads((tmp_path / "units" / "provenance.json").read_text())
    assert (told["samples"], told["rows"], told["bad"]) == (9, 5, 4)
    assert told["passed"] == {"files .txt": 2, "files without an ending that is known": 2}
    bad = [json.loads(line) for line in (tmp_path / "units" / "bad.jsonl").read_text().splitlines()]
    assert [line["id"] for line in bad] == ["f", "g", "h", "i"]


def test_ids_are_different_in_and_across_folders(tmp_path: Path) -> None:
    for name in ("one/a.wav", "two/a.wav", "two/a.flac", "two/deep/a.wav", "b.wav"):
        sound(tmp_path / name)
    assert walked([tmp_path / "one", tmp_path / "two"])[0] == [
        "one/a",
        "two/a.flac",
        "two/a.wav",
        "two/deep/a",
    ]
    given = [
        tmp_path / "b.wav",
        tmp_path / "b.wav",
        tmp_path / "one",
        tmp_path / "one" / "a.wav",
        tmp_path / "one" / ".." / "one",
    ]
    assert walked(given) == (["b", "one/a"], {"files that were given twice": 3})


def test_a_file_of_any_name_is_read(tmp_path: Path) -> None:
    names = [
        "caf\u00e9.wav",
        "a\nb\u2028.wav",
        "x" * 200 + ".wav",
        "# 100%[1]*.wav",
        "~.wav",
        "%s{}'\".wav",
    ]
    for name in names:
        sound(tmp_path / "clips" / name)
    units = extract(
        f"sounds:{tmp_path / 'clips'}",
        tmp_path / "units",
        {"speech": tiny.units()},
        spread=processes(1),
    )
    assert sorted(units.name(n) for n in range(len(units))) == sorted(
        name.removesuffix(".wav") for name in names
    )


def test_what_is_no_file_is_a_bad_sample_and_is_not_waited_for(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    os.mkfifo(root / "dev-clean/84/121123/84-121123-0009.flac")
    (root / "dev-clean/84/121123/84-121123-0010.flac").symlink_to("84-121123-0010.flac")
    units = extract(
        f"librispeech:{root}",
        tmp_path / "units",
        MODALITIES,
        Policy("skip", 0.5),
        spread=processes(1),
    )
    assert len(units) == 4
    os.mkfifo(root / "dev-clean/84/121550/84-121550-1.trans.txt")
    with pytest.raises(ZipperError, match=r"121550-1\.trans\.txt is a folder or no plain file"):
        rows(f"librispeech:{root}")


# --- texts beside sounds


def test_a_line_of_transcripts_is_bad_alone(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2"
    for n in range(6):
        sound(chapter / f"1-2-{n}.flac")
    lines = [
        "\ufeff1-2-0 CALL",
        "",
        "1-2-1\tANNA \u2028 PAY\r",
        "1-2-2 CAF\udce9",
        "1-2-3",
        "1-2-4 SEND",
        "1-2-4 PAY",
        "../../x/1-2-9 TURN",
    ]
    (chapter / "1-2.trans.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = {sample.row["id"]: sample for sample in layouts.samples(f"librispeech:{tmp_path}")}
    assert {name: sample.row.get("text") for name, sample in found.items()} == {
        "../../x/1-2-9": "TURN",
        "1-2-0": "CALL",
        "1-2-1": "ANNA \u2028 PAY",
        "1-2-2": None,
        "1-2-3": "",
        "1-2-4": None,
        "1-2-5": None,
    }
    assert "is no UTF-8" in found["1-2-2"].problem and "has two lines" in found["1-2-4"].problem
    assert "has no line" in found["1-2-5"].problem


def test_libritts_in_latin_1_is_bad_where_it_is(tmp_path: Path) -> None:
    for n, text in enumerate(["Café.", "Call.", ""]):
        sound(tmp_path / "dev" / "1" / "2" / f"{n}.wav")
        (tmp_path / "dev" / "1" / "2" / f"{n}.normalized.txt").write_bytes(text.encode("latin-1"))
    first, second, third = layouts.samples(f"libritts:{tmp_path}")
    assert (
        first.problem.startswith("cannot be used: 0.normalized.txt is no UTF-8")
        and not second.problem
    )
    assert third.row["text"] == "" and not third.problem  # nobody speaks


def test_a_corpus_in_another_sound_format_is_read_and_a_second_sound_of_a_name_is_not(
    tmp_path: Path,
) -> None:
    root = librispeech(tmp_path)
    chapter = root / "dev-clean/84/121123"
    (chapter / "84-121123-0000.flac").unlink()
    sound(chapter / "84-121123-0000.wav")
    sound(chapter / "84-121123-0001.wav")
    found, passed = walked(f"librispeech:{root}")
    assert "84-121123-0000" in found and "dev-clean/84/121123/84-121123-0001.wav!" in found
    assert len(found) == 5 and passed == {"files .txt": 5}


@pytest.mark.parametrize(
    "voiced",
    [
        [[0, 1e308]],
        [[0, 10**400]],
        [[float("nan"), 1]],
        [[0, 1e6]] * 99,
        [[0, True]],
        {},
        [1],
        [[50, 55], [0, 5]],
    ],
)
def test_stretches_of_speech_that_cannot_be_are_refused(tmp_path: Path, voiced: Any) -> None:
    sound(tmp_path / "1" / "b" / "a.flac")
    (tmp_path / "1" / "b" / "a.json").write_text(json.dumps({"voice_activity": voiced}))
    (sample,) = layouts.samples(f"librilight:{tmp_path}")
    assert sample.problem.startswith("cannot be cut: ")


def test_no_file_at_all_is_one_sentence() -> None:
    with pytest.raises(ZipperError, match="No file was given"):
        list(layouts.samples([]))


def test_sound_in_which_nobody_speaks_is_counted(tmp_path: Path) -> None:
    for name, voiced in {"a": [], "b": [[0, 0.1]]}.items():
        sound(tmp_path / "1" / "b" / f"{name}.flac")
        (tmp_path / "1" / "b" / f"{name}.json").write_text(json.dumps({"voice_activity": voiced}))
    (tmp_path / "1" / "b" / "list.json").write_text("{}")
    assert walked(f"librilight:{tmp_path}") == (
        ["1/b/b-0000"],
        {"sounds in which nobody speaks": 1, "files .json": 1},
    )


# --- tables


def table(path: Path, n: int = 3, **columns: Any) -> Path:
    """Rows of ids."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = arrow.table({"text": ["call"] * n, "speech": [[1, 2]] * n} | columns)
    if path.suffix == ".parquet":
        parquet.write_table(
            made,
            path,
            write_page_checksum=True,
            row_group_size=10,
            use_dictionary=False,
            compression="none",
        )
    else:
        with (
            arrow.OSFile(str(path), "wb") as file,
            arrow.ipc.new_stream(file, made.schema) as stream,
        ):
            stream.write_table(made, max_chunksize=10)
    return path


def test_tables_have_the_split_of_their_name_or_folder(tmp_path: Path) -> None:
    names = [
        "data/train-00000-of-00001",
        "data/test-00000-of-00001",
        "dev/0000",
        "trained",
        "valid",
    ]
    for name in names:
        table(tmp_path / f"{name}.parquet", 1, mark=[name])
    source = f"parquet:{tmp_path}"
    found = {row.row["mark"]: row.row["split"] for row in layouts.samples(source)}
    wanted = ["train", "test", "validation", "train", "validation"]
    assert found == dict(zip(names, wanted, strict=True))
    assert [one.row["mark"] for one in layouts.samples(source, "test")] == [names[1]]
    (one,) = layouts.samples(f"{source}/*/0000.parquet")
    assert (one.row["mark"], one.row["split"]) == ("dev/0000", "validation")
    for place in ("dev", "dev/0000.parquet", "dev/*"):  # as far in as one may point
        (one,) = layouts.samples(f"{source}/{place}", "validation")
        assert one.row["mark"] == "dev/0000"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_one_damaged_empty_or_unlike_table_among_many_is_named(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b", "d"):
        table(tmp_path / "data" / f"{name}.{kind}")
    table(tmp_path / "data" / f"c.{kind}", 0)
    table(tmp_path / "data" / f"e.{kind}", speech=["x.wav"] * 3, extra=[1, None, 3])
    (tmp_path / "data" / f"b.{kind}").write_bytes(b"PAR1xx")
    (tmp_path / "data" / f"f.{kind}").write_bytes(b"")
    (tmp_path / "data" / "README.md").write_text("about")
    for place in ("data", f"data/*.{kind}"):
        policy, to = Policy("skip", 0.9), tmp_path / f"units-{len(place)}"
        units = extract(f"{kind}:{tmp_path / place}", to, MODALITIES, policy, spread=processes(1))
        told = json.loads((to / "provenance.json").read_text())
        assert len(units) == 6 and told["samples"] == 6 + 3 + 2
        assert told["passed"] == {f"files .{kind} without rows": 1} | (
            {"files .md": 1} if place == "data" else {}
        )
        bad = [json.loads(line) for line in (to / "bad.jsonl").read_text().splitlines()]
        assert [Path(line["where"].partition(",")[0]).name for line in bad] == [
            f"b.{kind}",
            *[f"e.{kind}"] * 3,
            f"f.{kind}",
        ]
        assert f"is no {kind} file that can be read" in bad[0]["why"]


def test_rows_of_a_damaged_part_of_a_parquet_file_are_bad_and_no_others(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", 30, mark=[f"mark {n:03d}" for n in range(30)])
    content = path.read_bytes()
    # The checksum of its page says so.
    path.write_bytes(content.replace(b"mark 015", b"mark 999", 1))
    found = list(layouts.samples(f"parquet:{path}"))
    assert [n for n, sample in enumerate(found) if sample.problem] == [*range(10, 20)]
    assert found[12].where == f"{path}, row 12" and found[29].row["mark"] == "mark 029"
    assert [sample.row["id"] for sample in found] == [f"train-{n:08d}" for n in range(30)]


def test_an_arrow_file_that_was_cut_is_told_even_between_two_batches(tmp_path: Path) -> None:
    whole = table(tmp_path / "a.arrow", 30).read_bytes()
    assert len([s for s in layouts.samples(f"arrow:{tmp_path / 'a.arrow'}") if not s.problem]) == 30
    kept = set()
    for cut in range(8, len(whole), 40):
        (tmp_path / "a.arrow").write_bytes(whole[:cut])
        found = list(layouts.samples(f"arrow:{tmp_path / 'a.arrow'}"))
        assert len([sample for sample in found if sample.problem]) == 1
        kept.add(len(found) - 1)
    assert kept == {0, 10, 20, 30}


def test_the_other_format_of_arrow_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    made = arrow.table({"text": ["call"], "speech": [[1, 2]]})
    with (
        arrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        arrow.ipc.new_file(file, made.schema) as writer,
    ):
        writer.write_table(made)
    assert rows(f"arrow:{tmp_path}")[0]["speech"] == [1, 2]


def test_a_row_of_a_table_that_python_cannot_say_is_bad_alone(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    days = arrow.array([0, 2**31 - 1, 1], arrow.int32()).cast(arrow.date32())
    parquet.write_table(arrow.table({"text": ["call"] * 3, "day": days}), tmp_path / "a.parquet")
    assert [bool(s.problem) for s in layouts.samples(f"parquet:{tmp_path / 'a.parquet'}")] == [
        False,
        True,
        False,
    ]
    latin = arrow.Array.from_buffers(
        arrow.string(),
        2,
        [None, arrow.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0"), arrow.py_buffer(b"call\xe9ab")],
    )
    with (
        arrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file,
        arrow.ipc.new_stream(file, arrow.schema({"text": "string"})) as stream,
    ):
        stream.write_batch(arrow.record_batch({"text": latin}))
    found = list(layouts.samples(f"arrow:{tmp_path / 'b.arrow'}"))
    assert any(sample.problem for sample in found)


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], ["text", "text"]),
        tmp_path / "a.parquet",
    )
    (sample,) = layouts.samples(f"parquet:{tmp_path / 'a.parquet'}")
    assert "it has two columns 'text'" in sample.problem


def test_paths_in_a_table_count_from_its_file_and_names_may_hold_any_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table(
        Path("sub/x[1] #2.parquet"),
        1,
        speech=["b.wav"],
        recording=[{"bytes": None, "path": "b.wav"}],
    )
    sound(tmp_path / "sub" / "b.wav")
    codes = tiny.units().encode(tmp_path / "sub" / "b.wav")
    sources = (
        f"parquet:{path}",
        f"parquet:{path}#speech=recording",
        f"parquet:{tmp_path / path}",
        "parquet:sub",
    )
    for number, source in enumerate(sources):
        (row,) = extract(source, tmp_path / f"units-{number}", MODALITIES, spread=processes(1))
        assert row["speech"] == codes


def test_sound_in_a_column_of_any_name_is_taken_or_named(tmp_path: Path) -> None:
    held = sound(tmp_path / "a.wav").read_bytes()
    codes = tiny.units().encode(tmp_path / "a.wav")
    for number, recording in enumerate(
        [held, {"bytes": held, "path": "a.wav"}, {"bytes": held}, {"path": "a.wav"}]
    ):
        path = tmp_path / f"{number}.parquet"
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.table({"text": ["call"], "recording": [recording]}), path
        )
        (row,) = extract(
            f"parquet:{path}", tmp_path / f"u{number}", MODALITIES, spread=processes(1)
        )
        assert row["speech"] == codes
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"text": ["call"], "file": ["a.wav"]}), tmp_path / "p.parquet"
    )
    extract(f"parquet:{tmp_path / 'p.parquet'}", tmp_path / "p", MODALITIES, spread=processes(1))
    assert json.loads((tmp_path / "p" / "provenance.json").read_text())["passed"] == {
        "field file": 1
    }


def test_an_audiofolder_counts_what_datasets_passes_over(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("a.wav", "b.wav"):
        sound(tmp_path / "f" / name)
    (tmp_path / "f" / "c.m4a").write_bytes(b"no sound")
    (tmp_path / "f" / "metadata.csv").write_text("file_name,text\na.wav,call\ngone.wav,send\n")
    found = {
        sample.row["id"]: sample.problem
        for sample in layouts.samples(f"audiofolder:{tmp_path / 'f'}")
    }
    assert [*found] == ["train-00000000", "train-00000001", "b.wav", "c.m4a"]
    assert all("no row of the metadata names it" in found[name] for name in ("b.wav", "c.m4a"))
    (tmp_path / "f" / "metadata.csv").unlink()
    (tmp_path / "f" / "metadata.jsonl").write_text("{")
    with pytest.raises(ZipperError, match="is no audiofolder that datasets reads"):
        rows(f"audiofolder:{tmp_path / 'f'}")


# --- sources


def test_one_corpus_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = librispeech(tmp_path)
    (tmp_path / "link").symlink_to(root)
    spellings = [
        "LibriSpeech",
        "LibriSpeech/",
        "./LibriSpeech",
        "~/LibriSpeech",
        "link",
        str(root),
        "LibriSpeech/../LibriSpeech",
    ]
    assert {layouts.spelled(f"librispeech:{place}") for place in spellings} == {
        f"librispeech:{root}"
    }
    assert {layouts.spelled(f"librispeech:{place}", tmp_path / "units") for place in spellings} == {
        "librispeech:../LibriSpeech"
    }
    assert layouts.spelled("parquet:x/*.parquet#b=2,a=1") == layouts.spelled(
        "parquet:x//*.parquet#a=1,b=2"
    )
    first = extract("librispeech:LibriSpeech", Path("units"), MODALITIES, spread=processes(1))
    for place in spellings:
        assert list(
            extract(f"librispeech:{place}", Path("~/units"), MODALITIES, spread=processes(1))
        ) == list(first)
    with pytest.raises(ZipperError, match="holds the units of another source"):
        extract("librispeech:LibriSpeech/dev-clean", Path("units"), MODALITIES, spread=processes(1))


def test_units_know_their_corpus_after_both_were_moved(tmp_path: Path) -> None:
    sound(tmp_path / "old" / "clips" / "a.wav")
    extract(
        f"sounds:{tmp_path / 'old' / 'clips'}",
        tmp_path / "old" / "units",
        {"speech": tiny.units()},
        spread=processes(1),
    )
    (tmp_path / "old").rename(tmp_path / "new")
    made: list[float] = []
    source, units = f"sounds:{tmp_path / 'new' / 'clips'}", {"speech": tiny.units()}
    extract(
        source,
        tmp_path / "new" / "units",
        units,
        spread=processes(1),
        report=lambda seen: made.append(seen["samples"]),
    )
    assert made == []


def test_manifests_may_have_other_endings_and_other_names_of_fields(tmp_path: Path) -> None:
    for name in ("a.json", "a.ndjson", "a.JSONL"):
        (tmp_path / name).write_text('{"said": "call", "text": "no", "id": null}\n')
        assert rows(str(tmp_path / name)) == [{"id": "1", "said": "call", "text": "no"}]
    (tmp_path / "manifest").write_text('{"said": "call", "text": "no"}\n')
    passed = Counter[str]()
    (sample,) = layouts.samples(f"jsonl:{tmp_path / 'manifest'}#text=said", passed=passed)
    assert sample.row == {"id": "1", "text": "call"} and passed == {"field text": 1}


def test_rows_of_other_splits_are_counted(tmp_path: Path) -> None:
    passed = Counter[str]()
    assert len([*layouts.samples(f"librispeech:{librispeech(tmp_path)}", "dev-clean", passed)]) == 3
    assert passed["rows of another split"] == 1


def test_an_empty_source_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        ZipperError,
        match=r"There is no sample in sounds:.* Passed over: files .txt \(1\). Does it lie "
        r"elsewhere",
    ):
        rows(f"sounds:{tmp_path}")
