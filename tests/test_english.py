"""The corpus of open English: its texts, splits and numbers; its voice is not installed here."""

import sys
from pathlib import Path

import pytest

from zipper.errors import MissingExtra, ZipperError
from zipper_lab.corpora import english

GLOSSES = """00001 03 n 01 entity 0 000 | that which is; "we saw the whole thing"; "it's over there now"
00002 03 v 01 go 0 000 | change location or move; "He went to the 3rd house"; "they left early today"
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "data.noun").write_text(GLOSSES)
    return tmp_path


def test_examples_and_definitions_are_plain_words(wordnet: Path) -> None:
    wanted = ["we saw the whole thing", "it's over there now", "they left early today"]
    assert english.examples(wordnet) == wanted  # what holds digits is left out
    assert english.definitions(wordnet) == ["that which is", "change location or move"]


def test_a_folder_without_wordnet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="no files of WordNet"):
        english.examples(tmp_path)


def test_no_sentence_is_in_two_parts_and_all_are_drawn_again(wordnet: Path) -> None:
    found = {part: english.sentences(part, wordnet) for part in english.PARTS}
    texts = {part: {each.text for each in made} for part, made in found.items()}
    assert not texts["train"] & (texts["dev"] | texts["test"]) and not texts["dev"] & texts["test"]
    assert found["dev"] == english.sentences("dev", wordnet)
    assert {each.source for each in found["train"]} == {"novels", "wordnet", "numbers"}
    assert all(each.pace == 1 for each in found["test"])  # judged as the voice speaks
    with pytest.raises(ZipperError, match="no part 'all'"):
        english.sentences("all", wordnet)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (205, "two hundred and five"),
        (1000, "one thousand"),
        (961_699, "nine hundred and sixty one thousand six hundred and ninety nine"),
    ],
)
def test_numbers_in_words(number: int, said: str) -> None:
    assert english.in_words(number) == said


def test_a_missing_voice_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hibari", None)
    english._voice.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install hibari-tts==0\.2\.1"):
        english.synthesize("good morning to you")
