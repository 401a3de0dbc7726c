"""Manifests: rows of text, ids or sound become ids; what does not fit is refused by file and
line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny

from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.tasks import Task

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}


def manifest(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def test_text_ids_and_sound_become_ids(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    tiny.sound(tmp_path / "clips" / "one.wav")
    path = manifest(
        tmp_path,
        {"id": "a", "text": "call anna"},
        {"text": [3, 4, 2], "speech": "clips/one.wav"},
        {"speech": []},
    )
    first, second, third = data.read(path, MODALITIES)
    assert first == {"text": tiny.text().encode("call anna")}
    codes = tiny.units().encode(tmp_path / "clips" / "one.wav")
    assert second == {"text": [3, 4, 2], "speech": codes, "voice": []}
    assert len(codes) in (25, 26)  # the grid of units may begin before the sound
    assert third == {"speech": [], "voice": []}


def test_a_field_is_a_modality_or_a_name_and_a_modality(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        {
            "question:speech": [1, 2],
            "answer:speech": [3],
            "hint:text": "call",
            "template": 3,
            "x:image": [1],
        },
    )
    assert data.read(path, MODALITIES) == [
        {"question": [1, 2], "answer": [3], "hint": tiny.text().encode("call")}
    ]


def test_a_piece_of_a_sound_gives_the_ids_of_that_piece(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    soundfile.write(tmp_path / "all.flac", noise, 16_000, subtype="PCM_24")
    soundfile.write(tmp_path / "piece.flac", noise[8_000:24_000], 16_000, subtype="PCM_24")
    path = manifest(
        tmp_path,
        {"speech": {"path": "all.flac", "start": 0.5, "stop": 1.5}},
        {"speech": {"path": "all.flac"}},
    )
    piece, whole = data.read(path, MODALITIES)
    assert piece["speech"] == tiny.units().encode(tmp_path / "piece.flac")
    assert whole["speech"] == tiny.units().encode(tmp_path / "all.flac")
    row = {"speech": {"bytes": (tmp_path / "piece.flac").read_bytes(), "path": None}}
    assert data.encode(row, MODALITIES, tmp_path, "row 1") == piece
    nan, infinite = float("nan"), float("inf")
    for start, stop, message in [
        (2.5, None, "all.flac lasts 2.00 s; .* are no piece of it"),
        (1.0, 0.5, "its piece from 1 to 0.5 s is none"),
        (1, 1, "its piece from 1 to 1 s is none"),
        (-1.0, 1.0, "'start' holds -1.0; give seconds"),
        (nan, None, "'start' holds nan; give seconds"),
        (0.0, infinite, "'stop' holds inf; give seconds"),
        (0.0, 10**400, "'stop' holds 10*; give seconds"),
        (True, None, "'start' holds True; give seconds"),
        ("1", None, "'start' holds '1'; give seconds"),
        (1.0, 9.0, r"all.flac lasts 2.00 s; 1.0 to 9.0 s are no piece of it"),
    ]:
        row = {"path": str(tmp_path / "all.flac"), "start": start, "stop": stop}
        with pytest.raises(ZipperError, match=f"row 1: .*{message}"):
            data.encode({"speech": row}, MODALITIES, tmp_path, "row 1")


def test_speech_is_learnt_behind_its_voice_where_that_is_known(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        {"speech": [5], "voice": "high"},
        {"speech": [5], "voice": "somebody else"},
        {"speech": [5], "voice": None},
    )
    high = tiny.units().voice_id("high")
    rows = data.read(path, MODALITIES)
    assert rows == [{"speech": [5], "voice": voice} for voice in ([high], [], [])]
    # "voiced" is what the pair was called when it was stored as a field of its own.
    for item in ("voice~speech", "voiced:speech"):
        learnt = [Task((), (item,)).segments(row) for row in rows]
        assert [segment.content for (segment,) in learnt] == [[high, 5], [5], [5]]
        assert {segment.tower for (segment,) in learnt} == {"speech"}
    with pytest.raises(ZipperError, match=r"a field 'voice', the row has \['speech'\]"):
        Task((), ("voice~speech",)).segments({"speech": [5]})
    of_before = {"speech": [5], "voiced": [high, 5]}
    assert Task((), ("voiced:speech",)).segments(of_before)[0].content == [high, 5]


def test_a_row_that_gives_its_voiced_speech_itself_keeps_it(tmp_path: Path) -> None:
    for row in (
        {"voiced:speech": [27, 3], "speech": [3]},
        {"speech": [3], "voiced:speech": [27, 3], "voice": "low"},
    ):
        found = data.encode(row, MODALITIES, tmp_path, "row")
        assert {name: found[name] for name in ("speech", "voiced")} == {
            "speech": [3],
            "voiced": [27, 3],
        }
        assert Task((), ("voiced:speech",)).segments(found)[0].content == [27, 3]


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
        (
            '{"text": "call", "text": "send"}',
            r"rows.jsonl, line 2 is not JSON: a key is given twice",
        ),
        ('{"n": ' + "9" * 5000 + "}", r"rows.jsonl, line 2 is not JSON"),
        ("[" * 100_000, r"rows.jsonl, line 2 is not JSON: maximum recursion"),
        ("[1, 2]", r"rows.jsonl, line 2 holds a list; it must be an object"),
        ('"text"', r"rows.jsonl, line 2 holds a str"),
        (
            {"id": 1, "words": "call"},
            r"line 2: it has the keys \['id', 'words'\]; none of them names a modality of "
            r"\['speech', 'text'\]",
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
        (
            {"text": None},
            r"line 2: 'text' holds None; give text or a list of ids",
        ),
        ({"speech": {"file": "x"}}, r"line 2: 'speech' holds \{'file': 'x'\}; give"),
        ({"speech": {"start": 1}}, r"line 2: 'speech' holds \{'start': 1\}; give"),
        ({"speech": {"path": "x", "start": "1"}}, r"line 2: 'start' holds '1'; give seconds"),
        ({"speech": {"path": None, "bytes": None}}, r"line 2: 'speech' holds \{.*\}; give"),
        ({"speech": ""}, r"line 2: its sound is empty"),
        ({"speech": [True]}, r"line 2: 'speech' holds True; ids"),
        ({"a:text": "call", "a:speech": [1]}, r"line 2: 'a:speech' gives no field of its own"),
        ({"text": "call", ":text": "send"}, r"line 2: ':text' gives no field of its own"),
        (
            {"speech": [1, 24]},
            r"line 2: 'speech' holds 24, which begins or ends a segment of 'speech'",
        ),
        ({"question:speech": [25]}, r"line 2: 'question:speech' holds 25, which begins or ends"),
        ({"text": [0, 5]}, r"line 2: 'text' holds 0, which begins or ends a segment of 'text'"),
        ({"text": [5, 1, 5]}, r"line 2: 'text' holds 1, which begins or ends"),
        ({"text": "call \ud83d"}, r"line 2: .* holds the character '\\ud83d', which is no text"),
        ({"text": "call\0"}, r"line 2: .* holds the character '\\x00', which is no text"),
        ({"speech": "x" * 300 + ".wav"}, r"line 2: "),
        ({"speech": "a\0b.wav"}, r"line 2: "),
        ({"speech": "\ud83d.wav"}, r"line 2: .*does not exist"),
        ({"speech": "~\0"}, r"line 2: "),
        ({"speech": "~\ud83d"}, r"line 2: "),
        ({"speech": {"path": "gone.wav"}}, r"line 2: .*gone.wav does not exist"),
        ({"text": 7}, r"line 2: 'text' holds 7; give"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ZipperError, match=message):
        data.read(manifest(tmp_path, {"text": "call"}, row, {"text": "send"}), MODALITIES)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ZipperError, match=r"The manifest .*gone.jsonl does not exist. Give a JSONL file"
    ):
        data.manifest(tmp_path / "gone.jsonl")
    with pytest.raises(ZipperError, match=r"is a folder or no plain file"):
        data.manifest(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    with pytest.raises(ZipperError, match=r"pipe.jsonl is a folder or no plain file"):
        data.manifest(tmp_path / "pipe.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(ZipperError, match=r"blank.jsonl is empty"):
        data.manifest(tmp_path / "blank.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ZipperError, match=r"empty.jsonl is empty"):
        data.manifest(tmp_path / "empty.jsonl")
    (tmp_path / "noise.jsonl").write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ZipperError, match=r"noise.jsonl, line 1 is not JSON"):
        data.manifest(tmp_path / "noise.jsonl")


def test_lines_end_where_files_say_and_nowhere_else(tmp_path: Path) -> None:
    """Blank ones are none, wherever they stand, and count as lines; a byte order mark is no
    text."""
    path, odd = tmp_path / "rows.jsonl", "a\u2028b\x0bc\x0cd\x1ce\x85f"
    rows = [
        json.dumps({"id": n, "said": odd}, ensure_ascii=False).replace("\\u000b", "\\u000B")
        for n in range(3)
    ]
    path.write_bytes(b"\xef\xbb\xbf" + f"\n\r\n{rows[0]}\r\n \t\n{rows[1]}\n\n{rows[2]}".encode())
    assert data.manifest(path) == [{"id": n, "said": odd} for n in range(3)]
    path.write_bytes(b"\r" + f"{rows[0]}\r{rows[1]}".encode())
    assert len(data.manifest(path)) == 2
    path.write_text('\n{"text": "call"}\n\n{"text": "42"}\n')
    with pytest.raises(ZipperError, match=r"rows.jsonl, line 4: this tokenizer cannot write"):
        data.read(path, MODALITIES)


def test_a_line_that_is_no_utf_8_is_that_lines_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "call"}\n{"text": "caf\xe9"}\n{"text": "send"}\n')
    assert [sample.problem[:11] for sample in data.samples(path)] == ["", "is not JSON", ""]
    path.write_bytes('{"text": "call"}\n'.encode("utf-16"))
    assert all(sample.problem.startswith("is not JSON") for sample in data.samples(path))


def test_a_byte_order_mark_belongs_to_a_file_and_not_to_a_line(tmp_path: Path) -> None:
    path, line = tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"text": "call"}\n'
    path.write_bytes(line * 2)
    assert [sample.problem[:11] for sample in data.samples(path)] == ["", "is not JSON"]


def test_nemos_offsets_and_durations_are_pieces(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    soundfile.write(tmp_path / "all.flac", noise, 16_000, subtype="PCM_24")
    soundfile.write(tmp_path / "second.flac", noise[16_000:], 16_000, subtype="PCM_24")
    rows = [
        {"audio_filepath": "all.flac", "offset": 1.0, "duration": 1.0, "text": "call"},
        {"audio_filepath": "all.flac", "offset": 1, "text": "call"},
        {"speech": {"path": "all.flac"}, "offset": 1.0, "duration": 1, "text": "call"},
        {"speech": "all.flac", "offset": 1.0, "duration": None, "text": "call"},
        {
            "audio": {"path": "all.flac", "bytes": None},
            "offset": 1.0,
            "duration": 1.0,
            "text": "call",
        },
        {
            "speech": (tmp_path / "all.flac").read_bytes(),
            "offset": 1.0,
            "duration": 1.0,
            "text": "call",
        },
    ]
    wanted = tiny.units().encode(tmp_path / "second.flac")
    for row in rows:
        taken = data.take(row, MODALITIES, tmp_path, "row")
        assert taken.row["speech"] == wanted and taken.seconds == 1.0 and taken.passed == ()
    whole = data.take({"audio_filepath": "all.flac", "duration": 2.3}, MODALITIES, tmp_path, "row")
    assert whole.row["speech"] == tiny.units().encode(tmp_path / "all.flac")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"speech": "a.wav", "duration": 3.0}, r"'duration' says 3 s, its sound has 1.00 s"),
        (
            {"audio_filepath": "a.wav", "duration": 0.4},
            r"'duration' says 0.4 s, its sound has 1.00 s",
        ),
        (
            {"audio_filepath": "a.wav", "offset": 2.0, "duration": 1.0},
            r"lasts 1.00 s; 2.0 to 3.0 s are no piece",
        ),
        (
            {"audio_filepath": "a.wav", "offset": 0.2, "duration": 3.0},
            r"lasts 1.00 s; 0.2 to 3.2 s are no piece of it",
        ),
        ({"audio_filepath": "a.wav", "offset": "0"}, r"'offset' holds '0'; give seconds"),
        ({"audio_filepath": "a.wav", "offset": float("nan")}, r"'offset' holds nan; give seconds"),
        (
            {"audio_filepath": "a.wav", "offset": 0, "duration": "1"},
            r"'duration' holds '1'; give seconds",
        ),
        (
            {"speech": {"path": "a.wav", "start": 0.1}, "offset": 0.1},
            r"has an offset, and a piece or several sounds",
        ),
        (
            {"a:speech": "a.wav", "b:speech": "a.wav", "offset": 0.1},
            r"several sounds \(a:speech, b:speech\)",
        ),
        (
            {"left": {"path": "a.wav"}, "right": {"path": "a.wav"}},
            r"has several sounds \(left, right\)",
        ),
    ],
)
def test_a_time_that_does_not_fit_the_sound_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    tiny.sound(tmp_path / "a.wav")
    with pytest.raises(ZipperError, match=f"row 1: .*{message}"):
        data.encode(row, MODALITIES, tmp_path, "row 1")


def test_sound_that_says_what_it_is_is_taken_under_any_name_where_it_is_alone(
    tmp_path: Path,
) -> None:
    held = tiny.sound(tmp_path / "a.wav", seconds=0.2).read_bytes()
    codes = tiny.units().encode(tmp_path / "a.wav")
    picture = {"bytes": b"\x89PNG\r\n", "path": "a.png"}
    for sound in (
        held,
        {"bytes": held},
        {"bytes": held, "path": None},
        {"bytes": None, "path": "a.wav"},
        {"path": "a.wav"},
    ):
        taken = data.take(
            {"text": "call", "recording": sound, "picture": picture}, MODALITIES, tmp_path, "row"
        )
        assert taken.row["speech"] == codes and taken.passed == ("field picture",)
    spoken = data.take({"speech": [3], "recording": held}, MODALITIES, tmp_path, "row")
    assert spoken.row["speech"] == [3] and spoken.passed == ("field recording",)
    assert data.take({"text": "call", "picture": picture}, MODALITIES, tmp_path, "row").passed == (
        "field picture",
    )
    assert data.encode({"speech": held}, MODALITIES, tmp_path, "row")["speech"] == codes


def test_what_is_passed_over_in_a_row_is_named(tmp_path: Path) -> None:
    tiny.sound(tmp_path / "a.wav", seconds=0.2)
    row = {
        "id": "a",
        "split": "dev",
        "voice": "low",
        "duration": 0.2,
        "text": "call",
        "speech": "a.wav",
        "snr": 3,
        "empty": None,
        "x:image": [1],
        "audio_filepath": "b.wav",
    }
    taken = data.take(row, MODALITIES, tmp_path, "row")
    assert sorted(taken.passed) == ["field audio_filepath", "field snr", "field x:image"]
    odd = data.take(
        {"text": "call", "voice": "alto", "duration": "0:02", "offset": 3},
        MODALITIES,
        tmp_path,
        "row",
    )
    assert (
        sorted(odd.passed) == ["field duration", "field offset", "field voice"] and odd.seconds == 0
    )


def test_an_empty_text_says_that_nobody_speaks(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"text": ""}, {"text": " \n"}, {"text": []})
    assert data.read(path, MODALITIES) == [{"text": []}] * 3


def test_punctuation_that_a_tokenizer_has_no_token_for_is_left_out_and_told(tmp_path: Path) -> None:
    taken = data.take({"text": "“Call Anna!” -- said Peter."}, MODALITIES, tmp_path, "row")
    assert tiny.text().decode(taken.row["text"]) == "call anna said peter"
    assert taken.passed == ("punctuation of text",)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clips").mkdir()
    tiny.sound(tmp_path / "clips" / "a.wav", seconds=0.2)
    codes = tiny.units().encode(tmp_path / "clips" / "a.wav")
    for row in (
        {"speech": "~/clips/a.wav"},
        {"speech": {"path": "~/clips/a.wav"}},
        {"audio_filepath": "~/clips/a.wav"},
    ):
        assert data.encode(row, MODALITIES, Path("elsewhere"), "row")["speech"] == codes
    path = manifest(tmp_path, {"text": "call"})
    assert data.read(Path("~", path.name), MODALITIES) == [{"text": tiny.text().encode("call")}]
    with pytest.raises(ZipperError, match=r"~nobody-here/a\.wav does not exist"):
        data.encode({"speech": "~nobody-here/a.wav"}, MODALITIES, tmp_path, "row")


def test_names_that_are_no_utf_8_survive_a_manifest(tmp_path: Path) -> None:
    rows = [{"speech": os.fsdecode(b"caf\xe9.wav")}, {"text": "übung"}]
    data.write(tmp_path / "rows.jsonl", rows)
    assert data.manifest(tmp_path / "rows.jsonl") == rows
    assert "übung".encode() in (tmp_path / "rows.jsonl").read_bytes()


def test_whatever_a_row_does_is_a_zipper_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("zipper.audio.sound.read", fail)
    with pytest.raises(
        ZipperError, match=r"row 7: it cannot be read \(RuntimeError: out of luck\)"
    ):
        data.encode({"speech": "a.wav"}, MODALITIES, tmp_path, "row 7")
