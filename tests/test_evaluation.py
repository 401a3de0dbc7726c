"""Rates against a hand-written Levenshtein, intervals and floors against counting."""

import itertools
import json
import random
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipper.errors import ZipperError
from zipper.evaluation import error_rate, floor_random, floor_template, lines

words = st.lists(st.sampled_from(["red", "green", "blue", "is"]), max_size=6).map(" ".join)


def levenshtein(wanted: str | list[str], got: str | list[str]) -> int:
    """The textbook table, without any trick."""
    table = {(i, 0): i for i in range(len(wanted) + 1)} | {(0, j): j for j in range(len(got) + 1)}
    for i, j in itertools.product(range(1, len(wanted) + 1), range(1, len(got) + 1)):
        swap = table[i - 1, j - 1] + (wanted[i - 1] != got[j - 1])
        table[i, j] = min(swap, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(wanted), len(got)]


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
    for texts in (["", "?"], ["..."]):
        with pytest.raises(ZipperError, match="None of the references has a word"):
            error_rate(texts, ["a"] * len(texts))
    with pytest.raises(
        ZipperError, match=r"'привет' has no words after normalising \(lower-ascii-words\)"
    ):
        error_rate(["привет", "call"], ["call", "call"], normaliser="lower-ascii-words")


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


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("zipper.environment.importlib.import_module", missing)
    with pytest.raises(ZipperError, match="zipper-lm\\[speech\\]"):
        error_rate(["a"], ["a"])
