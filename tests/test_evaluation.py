"""Rates against a hand-written Levenshtein, intervals and floors against counting, the language
model against a law, the judge against clean speech."""

import itertools
import json
import math
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.evaluation import (
    JUDGE_NORMALISER,
    LOUD,
    NOISE,
    Judge,
    arpa,
    by_voice,
    difference,
    error_rate,
    floor_random,
    floor_template,
    judge_audio,
    lines,
    normalise,
    pronunciations,
)
from zipper_lab.corpora import commands as corpus

words = st.lists(st.sampled_from(["red", "green", "blue", "is"]), max_size=6).map(" ".join)


def levenshtein(wanted: str | list[str], got: str | list[str]) -> int:
    """The textbook table, without any trick."""
    table = {(i, 0): i for i in range(len(wanted) + 1)} | {(0, j): j for j in range(len(got) + 1)}
    for i, j in itertools.product(range(1, len(wanted) + 1), range(1, len(got) + 1)):
        swap = table[i - 1, j - 1] + (wanted[i - 1] != got[j - 1])
        table[i, j] = min(swap, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(wanted), len(got)]


# --- normalising ---


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


# --- rates ---


@given(st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=5))
def test_edits_are_the_levenshtein_distance(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    for line, (reference, hypothesis) in zip(lines(references, hypotheses), pairs, strict=True):
        assert line.word_edits == levenshtein(reference.split(), hypothesis.split())
        assert line.character_edits == levenshtein(reference, hypothesis)
        assert (line.words, line.characters) == (len(reference.split()), len(reference))


def test_a_corpus_is_one_long_text_not_a_mean_of_sentences() -> None:
    rate = error_rate(["a b c d", "a"], ["a x c d e", ""])  # 2 edits in 4 words, 1 in 1
    assert rate.wer == 3 / 5
    assert rate.cer == (3 + 1) / (7 + 1)
    assert (rate.exact, rate.words, rate.utterances) == (0.0, 5, 2)
    assert error_rate(["A, b!"], ["a B"]).exact == 1.0


def test_raw_texts_are_kept_and_results_are_json() -> None:
    (line,) = lines(["Hello, World"], ["hello word"])
    assert (line.reference, line.hypothesis, line.word_edits) == ("Hello, World", "hello word", 1)
    rate = error_rate(["a b"], ["a c"])
    assert json.loads(json.dumps(asdict(rate))) == asdict(rate)
    assert asdict(rate)["wer"] == 0.5


def test_any_script_has_a_rate_and_the_rate_says_what_it_counts() -> None:
    russian = error_rate(["привет мир", "Ещё раз!"], ["Привет, мир", "еще раз"])
    assert (russian.wer, russian.counted, russian.normaliser) == (1 / 4, "words", "unicode-words")
    chinese = error_rate(["你好世界"], ["你 好世 街"])
    assert (chinese.wer, chinese.cer, chinese.words, chinese.counted) == (
        1 / 4,
        1 / 4,
        4,
        "characters",
    )
    mixed = error_rate(["我用 iphone"], ["我用 android"])
    assert (mixed.wer, mixed.words, mixed.counted) == (1 / 3, 3, "words and characters")
    assert error_rate(["straße"], ["strasse"]).words == 1 and error_rate(["łódź"], ["odz"]).wer == 1
    assert error_rate(["ten %"], ["Ten %"], normaliser="none").wer == 1 / 2


def test_what_is_heard_where_nobody_speaks_is_an_insertion() -> None:
    rate = error_rate(["a b", "", "..."], ["a b", "so it is", ""])
    assert (rate.wer, rate.words, rate.utterances, rate.exact) == (3 / 2, 2, 3, 2 / 3)
    assert rate.low <= rate.wer <= rate.high
    assert difference(["a b", ""], ["a b", "x"], ["a b", ""]).wer == -1 / 2
    for texts in (["", "?"], ["..."]):
        with pytest.raises(ZipperError, match="None of the references has a word"):
            error_rate(texts, ["a"] * len(texts))
    with pytest.raises(
        ZipperError, match=r"'привет' has no words after normalising \(lower-ascii-words\)"
    ):
        error_rate(["привет", "call"], ["call", "call"], normaliser="lower-ascii-words")


def test_each_voice_has_its_own_rate() -> None:
    rates = by_voice(["a b", "c d", "e f"], ["a b", "x d", "x y"], ["low", "high", "low"])
    assert {voice: (rate.wer, rate.utterances) for voice, rate in rates.items()} == {
        "low": (0.5, 2),
        "high": (0.5, 1),
    }


@pytest.mark.parametrize(
    ("references", "hypotheses", "named"),
    [([], [], "at least one"), (["a"], [], "1 references and 0"), (["?"], ["a"], "'?'")],
)
def test_what_cannot_be_compared_is_named(
    references: list[str], hypotheses: list[str], named: str
) -> None:
    with pytest.raises(ZipperError, match=named.replace("?", r"\?")):
        error_rate(references, hypotheses)


def test_the_interval_covers_the_true_rate_as_often_as_it_says() -> None:
    chance = random.Random(0)
    covered = 0
    for trial in range(60):
        said = ["a" if chance.random() > 0.3 else "x" for _ in range(200)]
        hypotheses = [" ".join(said[i : i + 4]) for i in range(0, 200, 4)]
        rate = error_rate(["a a a a"] * 50, hypotheses, seed=trial)
        assert rate.low <= rate.wer <= rate.high
        covered += rate.low <= 0.3 <= rate.high
    assert 52 <= covered <= 60


def test_the_interval_is_the_same_for_the_same_seed_and_empty_without_variation() -> None:
    texts = ["a b", "c d", "e f"], ["a b", "c x", "y z"]
    assert error_rate(*texts, seed=1) == error_rate(*texts, seed=1)
    same = error_rate(["a b", "c d"], ["a x", "c x"])
    assert same.low == same.wer == same.high == 0.5


# --- significance ---

TEN = "a a a a a a a a a a"  # one reference of ten words


def worse(*edits: int) -> list[str]:
    """Hypotheses for TEN with so many wrong words."""
    return [" ".join(["x"] * n + ["a"] * (10 - n)) for n in edits]


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (
            [1, 2, 3, 4, 5],
            [0, 0, 0, 0, 0],
            2 / 32,
        ),  # all five agree: the two extreme ones of 2 ** 5 sign patterns
        (
            [0, 2, 3, 4, 5],
            [1, 0, 0, 0, 0],
            4 / 32,
        ),  # only rank 1 disagrees: sums 0 and 1 at either end
        ([3, 3], [3, 3], 1.0),
    ],
)
def test_wilcoxon_counts_sign_patterns(first: list[int], second: list[int], p: float) -> None:
    found = difference([TEN] * len(first), worse(*first), worse(*second))
    assert found.p == pytest.approx(p)
    assert found.wer == pytest.approx((sum(second) - sum(first)) / 10 / len(first))


def test_the_paired_bootstrap_draws_both_systems_together() -> None:
    """Three utterances have 27 equally likely resamples: count them."""
    first, second = [4, 0, 9], [1, 1, 7]
    deltas = sorted(
        sum(second[i] - first[i] for i in drawn) / 30
        for drawn in itertools.product(range(3), repeat=3)
    )
    found = difference([TEN] * 3, worse(*first), worse(*second))
    assert found.low == pytest.approx(deltas[0])  # 1 / 27 of the resamples, more than 2.5 %
    assert found.high == pytest.approx(deltas[-1])
    steady = difference([TEN] * 4, worse(1, 5, 9, 3), worse(0, 4, 8, 2))  # always one word better
    assert steady.low == pytest.approx(-0.1) == steady.high


# --- floors ---


def test_the_floor_of_two_sentences_is_the_other_one() -> None:
    assert floor_random(["a b", "c d"]) == ["c d", "a b"]
    references = ["go to rome", "go to oslo", "call anna now", "call peter now"]
    floor = floor_template(references, [0, 0, 1, 1])
    assert floor == ["go to oslo", "go to rome", "call peter now", "call anna now"]
    assert error_rate(references, floor).wer == 4 / 12


def test_a_floor_never_repeats_the_sentence_and_depends_on_the_seed_alone() -> None:
    texts = [f"sentence {n % 9}" for n in range(30)]
    assert floor_random(texts, seed=3) == floor_random(texts, seed=3) != floor_random(texts, seed=4)
    assert all(text != other for text, other in zip(texts, floor_random(texts), strict=True))
    assert floor_template(["a", "b", "c"], [0, 0, 1])[2] in "ab"  # nobody else has its template
    with pytest.raises(ZipperError, match="only 'a'"):
        floor_random(["a", "a"])
    with pytest.raises(ZipperError, match="only 'a'"):
        floor_template(["a"], [0])


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
    for attempt in (
        lambda: error_rate(["a"], ["a"]),
        lambda: Judge.from_sentences(["send oranges"]),
        lambda: difference(["a"], ["a"], ["b"]),
    ):
        with pytest.raises(ZipperError, match="zipper-lm\\[speech\\]"):
            attempt()


def test_noise_lies_as_far_under_the_speech_as_the_documentation_says() -> None:
    assert 20 * math.log10(LOUD / NOISE) == pytest.approx(41, abs=0.5)
