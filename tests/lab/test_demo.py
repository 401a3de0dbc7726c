"""The evaluation behind the demo: the shipped model hears the same in speech as it comes as in
speech as it was cut."""

import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zipper.audio.disturbance import TABLE, Disturbance
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.evaluation import error_rate
from zipper.pipeline import Pipeline
from zipper_lab import demo, report
from zipper_lab.corpora import commands as corpus
from zipper_lab.recognisers import Opinion, Recogniser


@pytest.fixture(scope="module")
def shipped() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def rows(shipped: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return corpus.rows("test", 8, shipped.units, workers=1, cache=tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def said(rows: list[dict[str, Any]]) -> list[Audio]:
    return demo.recordings(rows)


HARMLESS = {
    **{
        f"{ms} ms later": Disturbance(lead_ms=ms)
        for ms in (3.0, 10.0, 17.5, 20.0, 25.0, 31.0, 40.0)
    },
    "behind silence": Disturbance(lead_ms=400.0),
    "behind a room": Disturbance(lead_ms=400.0, room_db=-60.0),
    "in a brown room": Disturbance(lead_ms=730.0, trail_ms=1_100.0, room_db=-58.0, colour=2.0),
    "with an offset": Disturbance(offset=-0.15, lead_ms=90.0),
    "quiet": Disturbance(gain_db=-30.0),
    "loud": Disturbance(gain_db=15.0, trail_ms=300.0),
    "in some noise": Disturbance(snr_db=25.0, lead_ms=120.0),
}


@pytest.mark.parametrize("name", list(HARMLESS))
def test_the_shipped_model_understands_speech_wherever_it_lies(
    shipped: Pipeline, rows: list[dict[str, Any]], said: list[Audio], name: str
) -> None:
    truth = [row["text"] for row in rows]
    clean = error_rate(truth, [shipped.transcribe(sound) for sound in said]).wer
    heard = [shipped.transcribe(HARMLESS[name].apply(sound, n)) for n, sound in enumerate(said)]
    assert clean < 0.02
    assert error_rate(truth, heard).wer <= clean + 0.05


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 48_000])
def test_the_rate_of_a_recording_does_not_matter(
    shipped: Pipeline, rows: list[dict[str, Any]], said: list[Audio], rate_hz: int
) -> None:
    heard = [shipped.transcribe(sound.resample(rate_hz)) for sound in said]
    assert error_rate([row["text"] for row in rows], heard).wer <= 0.08


def test_the_robustness_table_tries_every_disturbance_on_every_row(
    shipped: Pipeline, rows: list[dict[str, Any]]
) -> None:
    found = demo.disturbed(shipped.units, rows[:2])
    assert list(found) == list(TABLE)
    assert found["clean"] == [row["speech"] for row in rows[:2]]
    for name, codes in found.items():
        for row, sound, ids in zip(rows, demo.recordings(rows[:2]), codes, strict=False):
            assert ids == shipped.units.encode(
                TABLE[name].apply(sound, zlib.crc32(row["id"].encode()))
            )
    scores = demo.evaluate(shipped, rows[:4], ["asr"], robust=True).scores["asr"]
    assert [score.disturbed for score in scores if score.disturbed] == list(TABLE)
    rates = {
        score.disturbed: score.rate
        for score in scores
        if score.system == "model" and not score.voice
    }
    assert rates["clean"] == rates[""]
    assert all(rate.utterances == 4 for rate in rates.values())
    assert not any(
        score.disturbed for score in demo.evaluate(shipped, rows[:4], ["asr"]).scores["asr"]
    )


def test_others_judge_what_is_said_beside_pocketsphinx(
    shipped: Pipeline, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DOMAIN", 300)
    some, asked = rows[:3], []

    def listen(samples: np.ndarray) -> str:
        asked.append(samples)
        return some[0]["text"].upper() + "!"

    ears = [
        Recogniser("stranger", listen),
        Opinion("taste", lambda samples: 2.0 + float(np.abs(samples).max() < 0.9)),
    ]
    found = demo.evaluate(shipped, some, ["tts"], judges=ears)
    by = {(one.system, one.judge): one.rate for one in found.scores["tts"] if not one.voice}
    systems = ("model", "oracle", "floor")
    assert by.keys() == {*product(systems, ("pocketsphinx", "stranger"))}
    wanted = error_rate([r["text"] for r in some], [some[0]["text"]] * 3, 0, "whisper-digits")
    assert by["model", "stranger"] == by["oracle", "stranger"] == wanted
    assert by["floor", "stranger"].normaliser == "whisper-digits"
    assert len(asked) == 3 + 3 + 3 and asked[0].dtype == np.float32  # those to listen to are true
    assert [one.system for one in found.rated] == list(systems)
    assert set(found.samples[0].recorded.heard) == {"pocketsphinx", "stranger"}
    said = report.rated(found.rated)["rated"]
    assert {one["judge"] for one in said} == {"taste"} and said[2]["utterances"] == 3
    assert "taste" in report.text_table(found.scores["tts"], found.rated)


def test_what_is_learnt_is_heard_disturbed_and_said_clean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    asked, configs = [], []

    class Enough(Exception):
        pass

    def train(config: Any) -> None:
        configs.append(config)
        raise Enough

    def render(part: str, n: int, units: Any, takes: int = 0) -> list[dict[str, Any]]:
        asked.append((part, takes))
        return [{"text": "call anna", "speech": [1]}]

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo.corpus, "rows", render)
    with pytest.raises(Enough):
        demo.demo(tmp_path / "demo", pairs=1, test=1)
    assert dict(asked)["pairs"] == dict(asked)["dev"] == 1
    given = {
        side.strip() for task in configs[0].tasks for side in task.partition("->")[0].split(",")
    }
    produced = {
        side.strip() for task in configs[0].tasks for side in task.partition("->")[2].split(",")
    }
    assert "heard:speech" in given and "speech" not in given
    assert "voice~speech" in produced and not {"heard:speech"} & produced
    assert np.isclose(sum(configs[0].tasks.values()), 1)


class Reached(Exception):
    """A demo came as far as its work."""


def test_a_demo_takes_away_its_own_run_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(demo, "_shipped", reached)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    config = tmp_path / "run" / "config.json"
    for _ in range(2):  # without one, and with one of others
        with pytest.raises(ZipperError, match="run is there and is no run"):
            demo.demo(tmp_path)
        assert (tmp_path / "run" / "thesis.txt").is_file()
        config.write_text("{}")
    config.write_text('{"tasks": {}}')
    (tmp_path / "dev.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ZipperError, match=r"dev\.jsonl is of no demo"):
        demo.demo(tmp_path)
    assert (tmp_path / "run").exists()
    (tmp_path / "dev.jsonl").write_text('{"text": "ours", "template": "call"}\n')
    with pytest.raises(Reached):
        demo.demo(tmp_path)
    assert not (tmp_path / "run").exists()
