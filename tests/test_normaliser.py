"""Normalisers: the same text, however it is typed, in any script; what differs stays different."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipper.errors import ZipperError
from zipper.normaliser import NORMALISERS, normalise, words

SAME = [
    ("Привет, мир!", "привет мир"),
    ("STRASSE", "straße"),
    ("GRÜẞE", "grüsse"),
    ("ΟΔΥΣΣΕΎΣ", "οδυσσεύς"),
    ("caf\u00e9", "cafe\u0301"),
    ("he said ‘call’", "he said call"),
    ("“he said ‘call’”", "'he said' \"call\""),
    ("don’t", "don't"),
    ("‘tis", "'tis"),
    ("rock 'n' roll", "Rock n’ Roll"),
    ("l’été", "L'ÉTÉ"),
    ("пам'ять", "памʼять"),
    ("İstanbul", "istanbul"),
    ("ŉ", "'n"),
    ("¿Qué tal?", "qué tal"),
    ("«Bonjour»", "bonjour"),
    ("می\u200cروم", "میروم"),
    ("co\u00adoperate", "cooperate"),
    ("Ｈｅｌｌｏ　４２", "hello 42"),
    ("ﬁne", "fine"),
    ("你好，世界。", "你好 世界"),
    ("ラーメンを食べる。", "ラーメン を 食べる"),
    ("ｶﾀｶﾅ", "カタカナ"),
    ("سلام!", "سلام"),
]
OTHER = [
    ("łódź", "lodz"),
    ("łódź", "odz"),
    ("ø", "o"),
    ("æ", "a"),
    ("đ", "d"),
    ("ısı", "isi"),
    ("année", "annee"),
    ("हिन्दी", "हन्दी"),
    ("שלום", "שלומ"),
    ("we're", "were"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_text_is_the_same_however_it_is_typed(one: str, other: str) -> None:
    assert normalise(one) == normalise(other) != ""


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_letters_are_another_text(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
    assert len(words(normalise(one))) == len(words(normalise(other))) == 1  # no letter cuts a word


@given(st.text())
def test_normalising_twice_is_normalising_once_and_leaves_letters_marks_digits_and_apostrophes(
    text: str,
) -> None:
    once = normalise(text)
    assert normalise(once) == once == " ".join(once.split())
    assert {unicodedata.category(c)[0] for c in once} - {"L", "M", "N"} <= {"P", "Z"}
    assert set(once) & {c for c in once if unicodedata.category(c)[0] in "PZ"} <= {"'", " "}


@given(st.text())
def test_words_are_the_text_without_its_spaces(text: str) -> None:
    once = normalise(text)
    assert "".join(words(once)) == "".join(once.split())


def test_scripts_that_write_no_spaces_are_counted_by_character() -> None:
    assert words(normalise("我用 iPhone 打电话。")) == ["我", "用", "iphone", "打", "电", "话"]
    assert words(normalise("ครับ")) == ["ค", "รั", "บ"]  # a mark belongs to its letter
    assert words(normalise("한국어 음성 인식")) == ["한국어", "음성", "인식"]  # Korean has spaces
    assert words(normalise("हिन्दी में")) == ["हिन्दी", "में"]


def test_normalisers_have_names() -> None:
    assert normalise("Café Zürich №7", "lower-ascii-words") == "cafe zurich no7"
    assert normalise("Twenty-one [noise] Mr. Bean's", "whisper-english") == "21 mister bean is"
    assert normalise("Hello [noise], WORLD!", "whisper-basic") == "hello world"
    assert normalise(" Hello,\n world ", "none") == "Hello, world"
    with pytest.raises(
        ZipperError, match=r"no normaliser 'english'. Take one of unicode-words, lower-ascii-words"
    ):
        normalise("a", "english")
    assert all(normalise("", name) == "" for name in NORMALISERS)


def test_an_apostrophe_inside_a_word_stays_behind_a_mark_too() -> None:
    assert normalise("hashką́\u2019ą́ 'tis o' dogs'") == normalise("hashką́'ą́ tis o dogs")
    assert len(words(normalise("hashką́'ą́"))) == 1
