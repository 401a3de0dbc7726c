"""The benchmark of the shipped model, and the summary of all benchmarks beside what was
recorded."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zipper.cli import main
from zipper.errors import ZipperError
from zipper.generation import Engine
from zipper.pipeline import Pipeline
from zipper_lab.bench import speech, summary
from zipper_lab.bench.speech import ARMS, Stopwatch, heard, said
from zipper_lab.corpora import commands as corpus

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
UTTERANCES = corpus.sentences("test", 2)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.mark.parametrize("streams", [1, 2])
def test_recordings_are_understood_and_their_length_is_what_time_is_compared_with(
    pipeline: Pipeline, streams: int
) -> None:
    turn = heard(pipeline, UTTERANCES, streams)
    assert turn["right"] == 1.0
    assert turn["audio_s"] == pytest.approx(
        sum(corpus.synthesize(utterance).seconds for utterance in UTTERANCES)
    )
    assert 0 < turn["sound_s"] < turn["seconds"]


def test_sentences_are_as_long_said_as_a_stream_or_side_by_side(pipeline: Pipeline) -> None:
    alone, together = said(pipeline, UTTERANCES, 1), said(pipeline, UTTERANCES, 2)
    assert alone["audio_s"] == pytest.approx(together["audio_s"])
    assert 0 < alone["sound_s"] < alone["seconds"] and together["first_s"] == 0


def test_the_first_sound_comes_after_its_units_not_after_all_of_them(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts what the engine reads: the prompt, then a unit at a time."""
    now, step = [0], Engine.step

    def counted(engine: Engine) -> bool:
        now[0] += 1
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    monkeypatch.setattr(speech.time, "perf_counter", lambda: float(now[0]))
    turn = said(pipeline, UTTERANCES, 1)
    assert speech.FIRST < turn["first_s"] <= speech.FIRST + 4
    assert turn["seconds"] == now[0] > 20 * len(UTTERANCES)


def test_the_stopwatch_stands_still_between_items(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(speech.time, "perf_counter", lambda: now[0])

    def items() -> Iterator[int]:
        for item in range(3):
            now[0] += 0.01
            yield item

    watch = Stopwatch(items())
    for _ in watch:
        now[0] += 5.0
    assert watch.seconds == pytest.approx(0.03)


def test_what_is_recorded_is_cut_from_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads(summary.RECORDED.read_text())
    files = sorted([*RESULTS.glob("*_30m_fp32_2cpu_*.json"), *RESULTS.glob("speech_*.json")])
    assert len(files) == len(recorded) == 3
    monkeypatch.setattr("sys.argv", ["summary", *map(str, files)])
    summary.main()
    assert json.loads(capsys.readouterr().out) == recorded, "make record"


def test_rates_stand_beside_the_recorded_ones() -> None:
    def found(rate: float) -> dict[str, object]:
        return {
            "hardware": "a box",
            "month": "2026-11",
            "rates": {"zip": {"rate": rate, "unit": "tokens/s"}},
            "ratios": {"a / b": 1.5},
        }

    empty = {"hardware": "", "month": "", "rates": {}, "ratios": {}}
    here = {
        "hardware": "mine",
        "month": "2027-01",
        "size": "30m",
        "rounds": 3,
        "decode": found(30.0),
        "train": empty,
        "speech": empty,
    }
    shown = summary.markdown(here, {"decode, 30m": found(40.0)})
    assert (
        "| decode: zip, tokens/s | 30.00 | 40.00 | 0.75 |" in shown
        and "| decode: ratio a / b | 1.50 | 1.50 | 1.00 |" in shown
    )
    assert "decode on a box, 2026-11" in shown
    assert "| decode: zip, tokens/s | 30.00 | - | - |" in summary.markdown(
        here, {}
    ) and "Nothing was recorded" in summary.markdown(here, {})


#: What a row of the README's table of speed is about, and what was recorded of it: file, arm, arm
#: below it.
SAID = {
    "both towers frozen": [("train_30m_fp32", "frozen", "trained")],
    "frozen zip / vocabulary-expanded": [("train_30m_fp32", "frozen", "expanded")],
    "packed / padded": [("train_30m_packing_fp32", "packed", "padded")],
    "zip / stock": [("decode_30m_fp32", "zip", "stock"), ("decode_30m_bf16", "zip", "stock")],
    "int8": [("decode_30m_fp32", "int8", "stock")],
    "static cache": [("decode_30m_fp32", "zip", "static")],
    "own bare tower": [("decode_30m_fp32", "zip", "bare"), ("decode_30m_bf16", "zip", "bare")],
    "decoder with the units in its vocabulary": [
        ("decode_30m_fp32", "zip", "expanded"),
        ("decode_30m_bf16", "zip", "expanded"),
    ],
    "eight streams": [("decode_30m_fp32", "streams", "zip"), ("decode_30m_bf16", "streams", "zip")],
}


def test_speed_in_the_readme_is_what_was_recorded() -> None:
    readme = (
        (RESULTS.parents[1] / "README.md")
        .read_text(encoding="utf-8")
        .partition("### Speed")[2]
        .partition("\n## ")[0]
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in readme.splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) == len(SAID)
    for (what, ratios, _), (begins, recorded) in zip(rows, SAID.items(), strict=True):
        assert begins in what
        medians = []
        for name, above, below in recorded:
            found = json.loads((RESULTS / f"{name}_2cpu_202611.json").read_text(encoding="utf-8"))[
                "ratios"
            ]
            medians += [
                row["median"] for row in found if (row["above"], row["below"]) == (above, below)
            ]
        assert ratios == ", ".join(
            f"{median:.2f}" if median < 3 else f"{median:.1f}" for median in medians
        ), what
    arms = json.loads((RESULTS / "speech_2cpu_202611.json").read_text(encoding="utf-8"))["arms"]
    said = [f"{arms[arm]['real_time']:.3f} s" for arm in ("asr", "tts", "tts, 8 streams")]
    names = [
        f"decode_{size}_{kind}_2cpu_202611.json"
        for size in ("30m", "120m")
        for kind in ("fp32", "bf16")
    ]
    zips = [
        json.loads((RESULTS / name).read_text(encoding="utf-8"))["arms"]["zip"] for name in names
    ]
    rates = sorted(arm["bytes_per_s"] / arm["read_bytes_per_s"] for arm in zips)
    said += [f"at {rates[0]:.2f} to {rates[-1]:.2f} of the rate at which a sum reads memory"]
    assert not [one for one in said if one not in readme]


def test_a_rate_is_sound_a_second_of_work() -> None:
    arms = {
        arm: {"real_time": 0.25, "sound_s": 1.0, "audio_s": 4.0, "first_s": 0.1, "seconds": 1.0}
        for arm in ARMS
    }
    found = {
        "hardware": "a",
        "month": "b",
        "versions": {},
        "settings": {},
        "rounds": 1,
        "arms": arms,
    }
    assert summary.digest(found)["rates"]["asr"] == {"rate": 4.0, "unit": "s of sound/s"}
    assert "| 0.250 | 0.250 | 100 |" in speech.markdown(found)


@pytest.mark.slow
def test_the_summary_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary.bench, "__defaults__", ("tiny", 1, ""))
    assert main(["bench", "-o", str(tmp_path / "all")]) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    rates = [
        arm["rate"]
        for kind in ("decode", "train", "speech")
        for arm in found[kind]["rates"].values()
    ]
    assert len(rates) == 5 + 3 + 4 and np.all(np.array(rates) > 0)
    assert (
        main(
            [
                "bench",
                "speech",
                "--rounds",
                "1",
                "--utterances",
                "1",
                "--model",
                str(tmp_path / "none"),
            ]
        )
        == 2
    )


def test_an_arm_that_ends_early_is_an_error() -> None:
    with pytest.raises(ZipperError, match="ended with code"):
        speech.bench(1, 0, model="/nowhere", utterances=1)
