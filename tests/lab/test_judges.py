"""The judge hears what was said and nothing else; its language model obeys the law of
probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest

from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.evaluation import error_rate
from zipper.normaliser import normalise
from zipper_lab.corpora import commands as corpus
from zipper_lab.judges import (
    JUDGE_NORMALISER,
    LOUD,
    NOISE,
    Judge,
    arpa,
    judge_audio,
    pronunciations,
)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  Send FORTY-two\toranges, please! ", "send forty two oranges please"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "don't"),
        ("Café Zürich №7", "cafe zurich no7"),
        ("42 km/h", "42 km h"),
        ("?!", ""),
    ],
)
def test_the_judges_normaliser_keeps_lower_case_letters_digits_and_apostrophes(
    raw: str, plain: str
) -> None:
    assert normalise(raw, JUDGE_NORMALISER) == plain


# --- the language model ---


class Arpa:
    """A reader of the format, written from its definition."""

    def __init__(self, text: str) -> None:
        sections = text.split("\n\\")
        self.sizes = [int(line.split("=")[1]) for line in sections[0].splitlines()[1:] if line]
        self.grams: dict[tuple[str, ...], tuple[float, float]] = {}
        self.counted = []
        for section in sections[1:-1]:
            rows = [line.split("\t") for line in section.splitlines()[1:] if line]
            self.counted.append(len(rows))
            for p, gram, *back_off in rows:
                self.grams[tuple(gram.split())] = (
                    float(p),
                    float(back_off[0]) if back_off else 0.0,
                )

    def p(self, history: tuple[str, ...], word: str) -> float:
        if (*history, word) in self.grams:
            return 10 ** self.grams[*history, word][0]
        return 10 ** self.grams.get(history, (0.0, 0.0))[1] * self.p(history[1:], word)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_after_every_history_the_probabilities_add_up_to_one(order: int) -> None:
    model = Arpa(arpa([u.text for u in corpus.sentences("text", 60)], order))
    assert model.sizes == model.counted
    assert len(model.sizes) == order
    vocabulary = [
        word for (word,) in (gram for gram in model.grams if len(gram) == 1) if word != "<s>"
    ]
    histories = {gram[:-1] for gram in model.grams} | {("oranges", "never")}
    for history in histories:
        assert sum(model.p(history, word) for word in vocabulary) == pytest.approx(1, abs=1e-4), (
            history
        )


def test_the_bigrams_are_those_of_witten_and_bell() -> None:
    """Two sentences, "a b" and "a c": six words with their ends, of four types."""
    model = Arpa(arpa(["A b", "a, c"]))
    unigram = {
        word: (n + 4 / 4) / (6 + 4) for word, n in {"a": 2, "b": 1, "c": 1, "</s>": 2}.items()
    }
    for word, p in unigram.items():
        assert model.p((), word) == pytest.approx(p, rel=1e-4)
    assert model.p(("<s>",), "a") == pytest.approx((2 + 1 * unigram["a"]) / 3, rel=1e-4)
    assert model.p(("a",), "b") == pytest.approx((1 + 2 * unigram["b"]) / 4, rel=1e-4)
    assert model.p(("a",), "</s>") == pytest.approx(2 / 4 * unigram["</s>"], rel=1e-4)
    with pytest.raises(ZipperError, match="No words in 1 sentences"):
        arpa(["..."])


# --- the judge ---


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_sentences([u.text for u in corpus.sentences("text", 2000)])


@pytest.fixture(scope="module")
def said() -> list[tuple[str, Audio]]:
    return [(u.text, corpus.synthesize(u)) for u in corpus.sentences("dev", 10)]


def test_the_judge_hears_clean_speech_of_its_domain(
    judge: Judge, said: list[tuple[str, Audio]]
) -> None:
    texts, audios = map(list, zip(*said, strict=True))
    heard = judge_audio(judge, audios)  # more than a chunk: in two processes
    assert error_rate(texts, heard).wer < 0.1
    assert judge_audio(judge, audios[:2], workers=1) == heard[:2]


@pytest.mark.parametrize(
    "text", ["train nine leaves boston at two fifty three", "leaves call paris oranges"]
)
def test_the_language_model_does_not_repair_what_was_said(judge: Judge, text: str) -> None:
    """A word that fits as well, or none that fits: what is heard is what was said."""
    assert judge.transcribe(corpus.synthesize(corpus.Utterance("", text, 0, "low"))) == text


def test_the_same_sound_is_heard_alike_whatever_came_before(
    judge: Judge, said: list[tuple[str, Audio]]
) -> None:
    """Bad sound comes between: noise, hardly any sound, none."""
    bad = [
        Audio(np.random.default_rng(0).standard_normal(8000).astype(np.float32), 16_000),
        Audio(np.full(20, 0.5, np.float32), 16_000),
        Audio(np.zeros(0, np.float32), 16_000),
    ]
    first = judge.transcribe(said[0][1])
    assert [judge.transcribe(audio) for audio in bad][1:] == ["", ""]
    judge.transcribe(said[1][1])
    assert judge.transcribe(said[0][1]) == first


def test_loudness_and_rate_do_not_matter(judge: Judge, said: list[tuple[str, Audio]]) -> None:
    text, audio = said[0]
    assert judge.transcribe(audio) == text
    assert judge.transcribe(replace(audio, samples=audio.samples / 50)) == text
    assert judge.transcribe(audio.resample(16_000)) == text


def test_a_word_that_the_judge_cannot_say_is_named() -> None:
    with pytest.raises(ZipperError, match="no pronunciation of blorft, qwyx"):
        Judge.from_sentences(["send the qwyx to blorft"])
    assert [line.split()[0] for line in pronunciations({"and", "a"}).splitlines()] == [
        "a",
        "a(2)",
        "and",
        "and(2)",
    ]


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("zipper.environment.importlib.import_module", missing)
    with pytest.raises(ZipperError, match="zipper-lm\\[speech\\]"):
        Judge.from_sentences(["send oranges"])


def test_noise_lies_as_far_under_the_speech_as_the_documentation_says() -> None:
    assert 20 * math.log10(LOUD / NOISE) == pytest.approx(41, abs=0.5)


def test_the_judge_can_be_imported_from_where_it_was() -> None:
    from zipper import evaluation

    assert evaluation.Judge is Judge and evaluation.arpa is arpa
    with pytest.raises(AttributeError, match="no attribute 'by_voice'"):
        _ = evaluation.by_voice
