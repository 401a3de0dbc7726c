"""Normalisers: what counts as the same text when texts are compared, each under a name that stands
beside the result.

Rates under different normalisers do not compare. Nothing here knows a language; what a script is,
`unicodedata` says.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from zipper.errors import ZipperError

NORMALISER = "unicode-words"  # the default

# The same sign, as keyboards and typesetters write it: a quotation mark on either side of a word,
# an apostrophe inside of one.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u201b\u00b4`\u2032", "'"))
# Names in Unicode of the letters of scripts that write no spaces between words.
_SPACELESS = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
)


def normalise(text: str, normaliser: str = NORMALISER) -> str:
    """A text as it is compared. Raises ZipperError for a normaliser that is none of
    `NORMALISERS`."""
    if normaliser not in NORMALISERS:
        raise ZipperError(
            f"There is no normaliser {normaliser!r}. Take one of {', '.join(NORMALISERS)}."
        )
    return NORMALISERS[normaliser](text)


def words(normalised: str) -> list[str]:
    """What a rate counts: words, and single characters in scripts that write no spaces (Chinese,
    Japanese, Thai, ...)."""
    found: list[str] = []
    for word in normalised.split():
        joins = False  # whether the next character belongs to the word before it
        for character in word:
            if joins and (
                _is_mark(character) or not (spaceless(character) or spaceless(found[-1][0]))
            ):
                found[-1] += character
            else:
                found.append(character)
            joins = True
    return found


@cache
def spaceless(character: str) -> bool:
    """Whether it belongs to a script that writes no spaces between words."""
    return unicodedata.name(character, "").startswith(_SPACELESS)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _unicode_words(text: str) -> str:
    """Letters, marks and digits of any script, without case (ß as ss) and in one form, and
    apostrophes inside words; all else is a space. Accents stay: they tell words apart in most
    languages. No spaces beside the letters of scripts that write none.
    """
    # Caseless by compatibility, as Unicode defines it (section 3.13, D146).
    plain = unicodedata.normalize("NFD", text.translate(_APOSTROPHES)).casefold()
    plain = unicodedata.normalize("NFKD", plain).translate(_APOSTROPHES).casefold()
    plain = unicodedata.normalize("NFKD", plain).replace("i\u0307", "i")  # of the Turkish capital
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else _gap(c) for c in plain)
    kept = f" {unicodedata.normalize('NFC', kept)} "
    kept = "".join(
        " " if c == "'" and not {before, behind}.isdisjoint(" '") else c
        for before, c, behind in zip(kept, kept[1:], kept[2:], strict=False)
    )
    joined = ""
    for word in words(kept):
        joined += word if not joined or spaceless(joined[-1]) or spaceless(word[0]) else f" {word}"
    return joined


def _gap(character: str) -> str:
    """What stands for a character that is left out: nothing for one that nobody sees (joiners, soft
    hyphens)."""
    return "" if unicodedata.category(character) == "Cf" else " "


def _ascii_words(text: str) -> str:
    """Lower-case words of a-z, 0-9 and apostrophes, one space apart; accents fall off their
    letters, all else becomes a space."""
    plain = unicodedata.normalize(
        "NFKD", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    ).lower()
    letters = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z0-9']", " ", letters).split())


def _whisper_basic(text: str) -> str:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return str(BasicTextNormalizer()(text)).strip()


def _whisper_english(text: str) -> str:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return str(EnglishTextNormalizer({})(text)).strip()


def _whisper_digits(text: str) -> str:
    """As whisper-english has it, every digit a word by itself: "seven thirty" is there "730" and
    "7:30" is "7 30", which are the same number said."""
    return " ".join(re.sub(r"([0-9])", r" \1 ", _whisper_english(text)).split())


#: By name. The two of Whisper (arXiv:2212.04356, without its list of British spellings) are there
#: to compare with its numbers: the basic one takes the vowel signs of Indic scripts out. The one of
#: digits is for recognisers that write numbers as they like.
NORMALISERS: dict[str, Callable[[str], str]] = {
    "unicode-words": _unicode_words,
    "lower-ascii-words": _ascii_words,
    "whisper-basic": _whisper_basic,
    "whisper-english": _whisper_english,
    "whisper-digits": _whisper_digits,
    "none": lambda text: " ".join(text.split()),
}
