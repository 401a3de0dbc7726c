"""The prose corpus: real sentences whose parts share nothing, said and drowned in noise the same
way every time."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zipper.data import manifests as data
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality import speech
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper.modality.text import Text
from zipper_lab.corpora import prose

UNITS = SpeechUnits(
    np.random.default_rng(0).normal(-13, 3, (16, 160)).astype(np.float32),
    UnitsConfig(voices=prose.VOICES),
)
SAID = ("speech", "pairs", "dev", "test")
LINES = {part: prose.lines(part) for part in prose.PARTS}


def distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Words put in, left out or changed (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        row, before = [i], row
        for j, other in enumerate(second, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
    return row[-1]


def test_there_are_as_many_sentences_as_the_experiments_need() -> None:
    assert {part: len(found) for part, found in LINES.items()} == {
        "text": 29_430,
        "speech": 8_904,
        "pairs": 7_844,
        "dev": 872,
        "test": 1_650,
    }
    assert (
        len({word for found in LINES.values() for _, text in found for word in text.split()})
        > 10_000
    )


def test_sentences_are_four_to_twenty_plain_words() -> None:
    for _, text in (line for found in LINES.values() for line in found):
        assert re.fullmatch("[a-z]+('[a-z]+)*( [a-z]+('[a-z]+)*){3,19}", text)


def test_a_chapter_belongs_to_one_part() -> None:
    chapters = {part: {chapter for chapter, _ in found} for part, found in LINES.items()}
    assert len(set.union(*chapters.values())) == sum(map(len, chapters.values())) == 269
    assert {chapter.split()[0] for chapter in chapters["test"]} <= {
        chapter.split()[0] for chapter in chapters["text"]
    }


def test_no_sentence_stands_twice_and_none_of_the_test_with_one_word_changed() -> None:
    texts = [text for found in LINES.values() for _, text in found]
    assert len(set(texts)) == len(texts)
    # two sentences at most one word apart share their first two words or their last two
    ends: dict[tuple[str, ...], list[list[str]]] = {}
    for part in prose.PARTS:
        for _, text in LINES[part]:
            split = text.split()
            if part != "test":
                for end in {("first", *split[:2]), ("last", *split[-2:])}:
                    ends.setdefault(end, []).append(split)
    for _, text in LINES["test"][::4]:
        split = text.split()
        for other in ends.get(("first", *split[:2]), []) + ends.get(("last", *split[-2:]), []):
            assert abs(len(other) - len(split)) > 1 or distance(split, other) > 1, (text, other)


def test_every_word_that_is_said_stands_three_times_in_the_unpaired_text_and_can_be_pronounced() -> (
    None
):
    counts = Counter(word for _, text in LINES["text"] for word in text.split())
    dictionary = Path(extra("pocketsphinx").get_model_path("en-us/cmudict-en-us.dict")).read_text()
    pronounced = {re.sub(r"\(\d+\)$", "", line.split()[0]) for line in dictionary.splitlines()}
    assert set(prose.words()) == {word for word in pronounced if counts[word] >= 3}
    assert {word for part in SAID for _, text in LINES[part] for word in text.split()} <= set(
        prose.words()
    )
    domain = prose.domain()
    assert set(domain) < {text for _, text in LINES["text"]}
    assert {word for text in domain for word in text.split()} <= set(prose.words())


def test_utterances_come_in_an_order_that_the_seed_decides_and_a_longer_list_begins_with_a_shorter_one() -> (
    None
):
    all_of_them = prose.sentences("pairs")
    assert sorted((u.chapter, u.text) for u in all_of_them) == sorted(LINES["pairs"])
    assert prose.sentences("pairs", 30) == all_of_them[:30]
    assert [u.text for u in prose.sentences("pairs", 30, seed=1)] != [
        u.text for u in all_of_them[:30]
    ]
    assert [u.voice for u in all_of_them[:12]] == list(prose.VOICES) * 2


def test_behind_the_last_sentence_each_is_said_again_in_every_other_voice() -> None:
    again = prose.sentences("dev", 872 * 6)
    assert len({u.id for u in again}) == len({(u.text, u.voice) for u in again}) == 872 * 6
    assert [u.text for u in again[872:1744]] == [u.text for u in again[:872]]
    with pytest.raises(
        ZipperError,
        match="5233 utterances of the part 'dev' were wanted; it has 872 sentences in 6 voices",
    ):
        prose.sentences("dev", 872 * 6 + 1)
    with pytest.raises(ZipperError, match="no part 'train' in the prose corpus"):
        prose.sentences("train", 1)


def test_noise_is_decided_by_the_utterance_alone() -> None:
    noisy = prose.sentences("test", 300, voices=prose.OTHER_VOICES, noisy=True)
    assert [replace(u, noise="", snr_db=0) for u in noisy] == prose.sentences(
        "test", 300, voices=prose.OTHER_VOICES
    )
    assert prose.sentences("test", 100, voices=prose.OTHER_VOICES, noisy=True) == noisy[:100]
    assert {(u.noise, u.snr_db) for u in noisy} == {
        (noise, snr) for noise in ("white", "babble") for snr in (5, 10, 15)
    }
    assert not set(prose.VOICES) & set(prose.OTHER_VOICES)


@pytest.mark.parametrize("voice", prose.VOICES + prose.OTHER_VOICES)
def test_every_voice_says_the_same_bits_whatever_was_said_before(voice: str) -> None:
    first, second, third = (replace(u, voice=voice) for u in prose.sentences("dev", 3))
    alone = prose.synthesize(first)
    prose.synthesize(replace(second, noise="babble", snr_db=5))
    prose.synthesize(third)
    np.testing.assert_array_equal(prose.synthesize(first).samples, alone.samples)
    assert 0.1 < alone.seconds / len(first.text.split()) < 0.6
    assert not np.array_equal(prose.synthesize(second).samples[:9000], alone.samples[:9000])


def test_voices_differ_and_a_malformed_one_is_refused() -> None:
    utterance = prose.sentences("dev", 1)[0]
    said = {voice: prose.synthesize(replace(utterance, voice=voice)) for voice in prose.VOICES}
    assert len({sound.samples.tobytes() for sound in said.values()}) == len(prose.VOICES)
    assert said["klatt5-20-200"].seconds < said["klatt3-35-170"].seconds
    with pytest.raises(
        ZipperError,
        match=r"no voice 'klatt3' in the prose corpus. Write variant-pitch-words_a_minute",
    ):
        prose.synthesize(replace(utterance, voice="klatt3"))
    with pytest.raises(ZipperError, match=r"no voice en-us\+nobody"):
        prose.synthesize(replace(utterance, voice="nobody-50-175"))


@pytest.mark.parametrize("noise", prose.NOISES)
@pytest.mark.parametrize("snr_db", [0, 10])
def test_noise_is_as_loud_as_it_says(noise: str, snr_db: int) -> None:
    utterance = prose.sentences("test", 1)[0]
    clean = prose.synthesize(utterance)
    mixed = prose.synthesize(replace(utterance, noise=noise, snr_db=snr_db))
    assert len(mixed.samples) == len(clean.samples)
    assert np.abs(mixed.samples).max() <= 1
    # what is left of the mixture beside the clean sound, whose share least squares finds
    share = float(mixed.samples @ clean.samples / (clean.samples @ clean.samples))
    left = mixed.samples - share * clean.samples
    measured = 10 * np.log10(np.square(share * clean.samples).mean() / np.square(left).mean())
    assert measured == pytest.approx(snr_db, abs=0.5)


def test_rows_are_the_same_for_any_number_of_them_and_any_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "BLOCK", 4)
    six = prose.rows("test", 6, UNITS, noisy=True, workers=2, cache=tmp_path / "two")
    three = prose.rows("test", 3, UNITS, noisy=True, workers=1, cache=tmp_path / "one")
    assert six[:3] == three
    for row, utterance in zip(six, prose.sentences("test", 6, noisy=True), strict=True):
        assert row == {
            "id": utterance.id,
            "text": utterance.text,
            "chapter": utterance.chapter,
            "voice": utterance.voice,
            "noise": utterance.noise,
            "snr_db": utterance.snr_db,
            "speech": UNITS.encode(prose.synthesize(utterance)),
        }


def test_what_was_rendered_is_kept_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "BLOCK", 4)
    said = []

    def listen(utterance: prose.Utterance) -> object:
        said.append(utterance.id)
        if len(said) == 7:
            raise KeyboardInterrupt
        return synthesize(utterance)

    synthesize = prose.synthesize
    monkeypatch.setattr(prose, "synthesize", listen)
    with pytest.raises(KeyboardInterrupt):
        prose.rows("dev", 12, UNITS, workers=1, cache=tmp_path)
    found = prose.rows("dev", 12, UNITS, workers=1, cache=tmp_path)
    assert len(said) == 7 + 8, "the first block was kept, the second and third were said"
    assert [row["id"] for row in found] == [f"dev-0-{i:06d}" for i in range(12)]
    assert prose.rows("dev", 9, UNITS, workers=1, cache=tmp_path) == found[:9]
    assert len(said) == 15
    files = {*tmp_path.iterdir()}
    prose.rows(
        "dev", 1, SpeechUnits(UNITS.codebook + 1, UNITS.config), workers=1, cache=tmp_path
    )  # other units,
    prose.rows("dev", 1, UNITS, seed=1, workers=1, cache=tmp_path)  # another seed,
    # Other voices.
    prose.rows("dev", 1, UNITS, voices=prose.OTHER_VOICES, workers=1, cache=tmp_path)
    prose.rows("dev", 1, UNITS, noisy=True, workers=1, cache=tmp_path)  # and noise are other files
    assert len({*tmp_path.iterdir()} - files) == 4


def test_prepare_writes_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "BLOCK", 3)
    monkeypatch.setattr(speech, "BATCH", 64)  # quick, not good
    few = {
        "pairs": 3,
        "text": 200,
        "speech": 3,
        "dev": 2,
        "test": 3,
        "codes": 8,
        "merges": 30,
        "fitted": 6,
        "adapted": 4,
        "workers": 1,
    }
    made = tmp_path / "data"
    prose.prepare(made, **few, cache=tmp_path / "cache")
    rows = {name: data.manifest(made / f"{name}.jsonl") for name in prose.MANIFESTS}
    assert {name: len(found) for name, found in rows.items()} == {
        "text": 200,
        "speech": 3,
        "pairs": 3,
        "dev": 2,
        "test_clean": 3,
        "test_noisy": 3,
    }
    assert set(rows["text"][0]) == {"id", "text"}
    assert set(rows["speech"][0]) == {"id", "speech", "voice"}
    assert {"text", "speech", "voice"} < set(rows["pairs"][0])
    assert [row["text"] for row in rows["test_clean"]] == [
        row["text"] for row in rows["test_noisy"]
    ]
    assert {row["voice"] for row in rows["test_noisy"]} == set(prose.OTHER_VOICES)
    assert {row["noise"] for row in rows["test_clean"]} == {""}
    units, text = SpeechUnits.load(made / "speech"), Text.load(made / "text")
    assert units.voices == prose.VOICES
    assert (made / "judge" / "means").is_file()
    encoded = data.read(made / "pairs.jsonl", {"text": text, "speech": units})
    assert text.decode(encoded[0]["text"]) == rows["pairs"][0]["text"]
    assert encoded[0]["voice"] == [units.voice_id(rows["pairs"][0]["voice"])]

    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    prose.prepare(made, **few, cache=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    (made / "test_noisy.jsonl").unlink()  # as if it had been killed
    prose.prepare(made, **few, cache=tmp_path / "cache")
    assert data.manifest(made / "test_noisy.jsonl") == rows["test_noisy"]
    with pytest.raises(ZipperError, match=r"was made with .* Choose another folder"):
        prose.prepare(made, **{**few, "pairs": 4}, cache=tmp_path / "cache")
    assert json.loads((made / "prose.json").read_text())["pairs"] == 3
