"""Manifests: rows of text, ids or sound become ids; what does not fit is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny

from zipper import data
from zipper.errors import ZipperError

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}


def manifest(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_ids_and_sound_become_ids(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    tiny.sound(tmp_path / "clips" / "one.wav")
    path = manifest(tmp_path, {"id": "a", "text": "call anna"}, {"text": [3, 1, 2], "speech": "clips/one.wav"}, {"speech": []})
    first, second, third = data.read(path, MODALITIES)
    assert first == {"text": tiny.text().encode("call anna")}
    codes = tiny.units().encode(tmp_path / "clips" / "one.wav")
    assert second == {"text": [3, 1, 2], "speech": codes, "voiced": codes}
    assert len(codes) == 25
    assert third == {"speech": [], "voiced": []}


def test_a_field_is_a_modality_or_a_name_and_a_modality(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"question:speech": [1, 2], "answer:speech": [3], "hint:text": "call", "template": 3, "x:image": [1]})
    assert data.read(path, MODALITIES) == [{"question": [1, 2], "answer": [3], "hint": tiny.text().encode("call")}]


def test_a_piece_of_a_sound_gives_the_ids_of_that_piece(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    soundfile.write(tmp_path / "all.flac", noise, 16_000, subtype="PCM_24")
    soundfile.write(tmp_path / "piece.flac", noise[8_000:24_000], 16_000, subtype="PCM_24")
    path = manifest(tmp_path, {"speech": {"path": "all.flac", "start": 0.5, "stop": 1.5}}, {"speech": {"path": "all.flac"}})
    piece, whole = data.read(path, MODALITIES)
    assert piece["speech"] == tiny.units().encode(tmp_path / "piece.flac")
    assert whole["speech"] == tiny.units().encode(tmp_path / "all.flac")
    row = {"speech": {"bytes": (tmp_path / "piece.flac").read_bytes(), "path": None}}
    assert data.encode(row, MODALITIES, tmp_path, "row 1") == piece
    for start, stop in [(2.5, None), (1.0, 0.5), (-1.0, 1.0)]:
        with pytest.raises(ZipperError, match=r"line 1: .*all.flac lasts 2.00 s; .* are no piece of it"):
            data.read(manifest(tmp_path, {"speech": {"path": "all.flac", "start": start, "stop": stop}}), MODALITIES)


def test_speech_with_a_known_voice_is_also_voiced(tmp_path: Path) -> None:
    path = manifest(
        tmp_path, {"speech": [5], "voice": "high"}, {"speech": [5], "voice": "somebody else"}, {"speech": [5], "voice": None}
    )
    high = tiny.units().voice_id("high")
    assert [row["voiced"] for row in data.read(path, MODALITIES)] == [[high, 5], [5], [5]]
    assert [row["speech"] for row in data.read(path, MODALITIES)] == [[5]] * 3


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"text": "call"}, {"text": "send"}, "this is not JSON")
    assert data.manifest(path, limit=2) == [{"text": "call"}, {"text": "send"}]


def test_a_written_manifest_reads_the_same_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    rows = [{"text": "übung \u2028 \n", "n": 1.5}, {"speech": [1]}]
    data.write(tmp_path / "new" / "rows.jsonl", rows)
    assert data.manifest(tmp_path / "new" / "rows.jsonl") == rows
    with pytest.raises(TypeError):
        data.write(tmp_path / "new" / "rows.jsonl", [{"text": object()}])
    assert data.manifest(tmp_path / "new" / "rows.jsonl") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows.jsonl, line 2 is not JSON"),
        ("", r"rows.jsonl, line 2 is not JSON"),
        ("[1, 2]", r"rows.jsonl, line 2 holds a list; it must be an object"),
        ('"text"', r"rows.jsonl, line 2 holds a str"),
        (
            {"id": 1, "words": "call"},
            r"line 2 has the keys \['id', 'words'\]; none of them names a modality of \['speech', 'text'\]",
        ),
        ({"speech": [0, 28]}, r"line 2: 'speech' holds 28; ids of 'speech' go from 0 to 27"),
        ({"speech": [-1]}, r"line 2: 'speech' holds -1"),
        ({"speech": [1.5]}, r"line 2: 'speech' holds 1.5"),
        ({"speech": ["1"]}, r"line 2: 'speech' holds '1'"),
        ({"text": [10_000]}, r"line 2: 'text' holds 10000; ids of 'text' go from 0 to 41"),
        ({"a:text": [10_000]}, r"line 2: 'a:text' holds 10000"),
        ({"speech": "gone.wav"}, r"line 2: .*gone.wav does not exist"),
        ({"speech": "rows.jsonl"}, r"line 2: .*rows.jsonl is not readable sound"),
        ({"text": "42 €"}, r"line 2: this tokenizer cannot write 2 4 €"),
        ({"text": None}, r"line 2: 'text' holds None; give text, the path of a file or a list of ids"),
        ({"speech": {"file": "x"}}, r"line 2: 'speech' holds \{'file': 'x'\}; give"),
        ({"speech": {"start": 1}}, r"line 2: 'speech' holds \{'start': 1\}; give"),
        ({"speech": {"path": "x", "start": "1"}}, r"line 2: 'speech' holds .*; give"),
        ({"speech": {"path": "gone.wav"}}, r"line 2: .*gone.wav does not exist"),
        ({"text": 7}, r"line 2: 'text' holds 7; give"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ZipperError, match=message):
        data.read(manifest(tmp_path, {"text": "call"}, row, {"text": "send"}), MODALITIES)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match=r"The manifest .*gone.jsonl does not exist. Give a JSONL file"):
        data.manifest(tmp_path / "gone.jsonl")
    with pytest.raises(ZipperError, match=r"does not exist"):
        data.manifest(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ZipperError, match=r"empty.jsonl is empty"):
        data.manifest(tmp_path / "empty.jsonl")
    (tmp_path / "noise.jsonl").write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ZipperError, match=r"noise.jsonl, line 1 is not JSON"):
        data.manifest(tmp_path / "noise.jsonl")
