"""The built-in corpus: parts never share a sentence, and an utterance is the same bits wherever it
is said."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zipper.audio import disturbance
from zipper.audio.sound import Mel
from zipper.errors import ZipperError
from zipper.modality import speech
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper_lab.corpora import commands as corpus

UNITS = SpeechUnits(
    np.random.default_rng(0).normal(-13, 3, (16, 160)).astype(np.float32),
    UnitsConfig(voices=corpus.VOICES),
)


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (42, "forty two"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety nine"),
        (1000, "one thousand"),
        (2007, "two thousand and seven"),
        (3120, "three thousand one hundred and twenty"),
        (5878, "five thousand eight hundred and seventy eight"),
    ],
)
def test_numbers_are_written_as_they_are_said(n: int, words: str) -> None:
    assert corpus.number(n) == words


def test_every_number_has_words_of_its_own() -> None:
    assert len({corpus.number(n) for n in range(10_000)}) == 10_000


def template_of(text: str) -> list[int]:
    """The templates that a sentence fits, each slot standing for any words."""
    patterns = [re.sub(r"\{where\}", "( in the [a-z]+)?", t) for t in corpus.TEMPLATES]
    return [
        i for i, p in enumerate(patterns) if re.fullmatch(re.sub(r"\{\w+\}", "[a-z ]+", p), text)
    ]


def test_sentences_are_plain_words_of_their_template() -> None:
    for utterance in corpus.sentences("pairs", 500):
        assert re.fullmatch("[a-z]+( [a-z]+)*", utterance.text)
        assert utterance.template in template_of(utterance.text)
    assert template_of("send forty two oranges to vienna") == [0]
    assert template_of("set an alarm for seven fifty six on friday") == [1]


def test_the_sentence_of_the_documentation_is_one_of_the_grammar() -> None:
    count, item, city = (corpus.number(42), "oranges", "vienna")
    assert item in corpus.ITEMS
    assert city in corpus.CITIES
    assert (
        corpus.TEMPLATES[0].format(thousands=count, item=item, city=city)
        == "send forty two oranges to vienna"
    )


def test_parts_share_no_sentence_whatever_the_seed() -> None:
    texts = {
        part: {u.text for seed in (0, 1) for u in corpus.sentences(part, 300, seed)}
        for part in corpus.PARTS
    }
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    assert sum(corpus.PARTS.values()) == 100


def test_a_part_never_repeats_itself_and_a_longer_list_begins_with_a_shorter_one() -> None:
    long = corpus.sentences("speech", 5000)
    assert len({u.text for u in long}) == len({u.id for u in long}) == 5000
    assert corpus.sentences("speech", 300) == long[:300]
    assert corpus.sentences("speech", 300, seed=1) != long[:300]
    with pytest.raises(ZipperError, match="no part 'train'"):
        corpus.sentences("train", 1)


def test_voices_take_turns_and_templates_are_equally_frequent() -> None:
    part = corpus.sentences("text", 6000)
    assert [u.voice for u in part[:4]] == list(corpus.VOICES) * 2
    counts = Counter(u.template for u in part)
    assert set(counts) == set(range(len(corpus.TEMPLATES)))
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_an_utterance_is_the_same_bits_whatever_was_said_before() -> None:
    first, *others = corpus.sentences("dev", 6)
    alone = corpus.synthesize(first)
    for other in others:
        corpus.synthesize(other)
    again = corpus.synthesize(first)
    np.testing.assert_array_equal(alone.samples, again.samples)
    assert alone.rate_hz == again.rate_hz == 22_050
    assert not np.array_equal(corpus.synthesize(others[0]).samples[:9000], alone.samples[:9000])


def pitch_hertz(samples: np.ndarray, rate_hz: int) -> float:
    """By the first peak of the autocorrelation of the whole utterance."""
    spectrum = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
    lag = np.arange(rate_hz // 350, rate_hz // 60)
    return rate_hz / float(lag[np.fft.irfft(spectrum)[lag].argmax()])


def test_speech_fills_its_sound_and_the_high_voice_is_higher() -> None:
    utterance = corpus.sentences("dev", 1)[0]
    pitch = {}
    for voice in corpus.VOICES:
        sound = corpus.synthesize(replace(utterance, voice=voice))
        pitch[voice] = pitch_hertz(sound.samples, sound.rate_hz)
        assert 0.2 < sound.seconds / len(utterance.text.split()) < 0.5
        assert 0.05 < np.abs(sound.samples).max() <= 1
        assert sound.trim().seconds == pytest.approx(sound.seconds, abs=0.02)
    assert pitch["high"] > 1.2 * pitch["low"]
    with pytest.raises(
        ZipperError, match=r"no voice 'tenor' in the built-in corpus. Take one of low, high"
    ):
        corpus.synthesize(replace(utterance, voice="tenor"))


def test_rows_are_the_same_for_any_number_of_them_and_any_worker(tmp_path: Path) -> None:
    six = corpus.rows("dev", 6, UNITS, workers=2, cache=tmp_path / "two")
    four = corpus.rows("dev", 4, UNITS, workers=1, cache=tmp_path / "one")
    assert six[:4] == four
    for row, utterance in zip(six, corpus.sentences("dev", 6), strict=True):
        assert row == {
            "id": utterance.id,
            "text": utterance.text,
            "speech": UNITS.encode(corpus.synthesize(utterance)),
            "voice": utterance.voice,
            "template": utterance.template,
        }


def test_what_was_rendered_is_kept_cut_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def listen(utterance: corpus.Utterance) -> object:
        said.append(utterance.id)
        return synthesize(utterance)

    synthesize = corpus.synthesize
    monkeypatch.setattr(corpus, "synthesize", listen)
    four = corpus.rows("dev", 4, UNITS, workers=1, cache=tmp_path)
    assert corpus.rows("dev", 4, UNITS, workers=1, cache=tmp_path) == four
    assert corpus.rows("dev", 2, UNITS, workers=1, cache=tmp_path) == four[:2]
    assert len(said) == 4
    assert corpus.rows("dev", 5, UNITS, workers=1, cache=tmp_path)[:4] == four
    assert len(said) == 5
    other = SpeechUnits(UNITS.codebook + 1, UNITS.config)
    corpus.rows("dev", 2, other, workers=1, cache=tmp_path)  # other units are another file
    corpus.rows("dev", 2, UNITS, seed=1, workers=1, cache=tmp_path)  # and so is another seed
    assert len(said) == 9
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl"] * 4


def test_takes_lie_beside_clean_speech_and_say_whether_anything_is_said(tmp_path: Path) -> None:
    clean = corpus.rows("dev", 3, UNITS, workers=1, cache=tmp_path)
    rows = corpus.rows("dev", 3, UNITS, workers=1, cache=tmp_path, takes=20)
    assert rows == corpus.rows("dev", 3, UNITS, workers=1, cache=tmp_path / "again", takes=20)
    assert rows[:20] == corpus.rows("dev", 1, UNITS, workers=1, cache=tmp_path, takes=20)
    assert [row["id"] for row in rows] == [row["id"] for row in clean for _ in range(20)]
    for number, row in enumerate(rows):
        heard, said = row.pop("heard:speech"), row.pop("said:text")
        assert row == clean[number // 20]
        sound, anything = disturbance.take(
            corpus.synthesize(corpus.sentences("dev", 3)[number // 20]),
            f"{row['id']} {number % 20}",
        )
        assert heard == UNITS.encode(sound)
        assert said == (row["text"] if anything else "")
    assert sum(row != clean[number // 20] for number, row in enumerate(rows)) == 0


def test_units_are_fitted_on_both_voices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "BATCH", 64)  # quick, not good
    units = corpus.fit_units(n=6, codes=8)
    assert units.voices == corpus.VOICES == ("low", "high")
    assert units.config.mel == Mel()
    assert "6 utterances" in units.config.fitted_on
