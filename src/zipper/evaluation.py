"""Evaluation: how far texts lie from their references, and from where a system gets that does not
listen.

Rates, intervals and floors are functions of texts alone: whether a model, a judge or an oracle
wrote them is the caller's business. It knows no model, no sound and no corpus.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.normaliser import NORMALISER, spaceless, words
from zipper.normaliser import normalise as normalise
from zipper.statistics import bootstrap, share

__getattr__ = names_of(__name__, ("zipper_lab.judges", "zipper.statistics"))

# --- rates ---


@dataclass(frozen=True)
class ErrorRate:
    """Errors over a corpus, as fractions: total edits by total reference words (`wer`) or
    characters (`cer`).

    low, high: 95 % interval of `wer`, by bootstrap over utterances; without any error it is 0 to 0,
    which says nothing about how rare errors are. exact: share of utterances without a word error.
    normaliser: the one of both texts. counted: what `wer` calls a word: in scripts that write no
    spaces (Chinese, Japanese, Thai) a character, so that it is a character error rate there.
    """

    wer: float
    low: float
    high: float
    cer: float
    exact: float
    words: int
    utterances: int
    normaliser: str = NORMALISER
    counted: str = "words"


@dataclass(frozen=True)
class Line:
    """One utterance: both raw texts, and the edits between them once normalised."""

    reference: str
    hypothesis: str
    word_edits: int
    words: int
    character_edits: int
    characters: int


def lines(
    references: Sequence[str], hypotheses: Sequence[str], normaliser: str = NORMALISER
) -> list[Line]:
    """The least edits (substitutions, deletions, insertions) from each reference to its hypothesis.

    A reference without a letter or digit says that nobody speaks: every word heard there is an
    insertion. Raises ZipperError if there is nothing to compare, the numbers differ, no reference
    has a word, or the normaliser takes all of one away.
    """
    jiwer = extra("jiwer")
    if not references or len(references) != len(hypotheses):
        raise ZipperError(
            f"{len(references)} references and {len(hypotheses)} hypotheses were given. Give as "
            "many of each, and at least one."
        )
    found = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted, got = normalise(reference, normaliser), normalise(hypothesis, normaliser)
        if not wanted and any(map(str.isalnum, reference)):
            raise ZipperError(
                f"The reference {reference!r} has no words after normalising ({normaliser}). Take "
                "another normaliser."
            )
        count = len(words(wanted))
        by_words = jiwer.process_words(*(" ".join(words(text)) for text in (wanted, got)))
        edits, swaps = _edits(by_words), _edits(jiwer.process_characters(wanted, got))
        found.append(Line(reference, hypothesis, edits, count, swaps, len(wanted)))

    if not any(line.words for line in found):
        raise ZipperError(
            f"None of the references has a word, e.g. {references[0]!r}. Give at least one that "
            "has."
        )
    return found


def _edits(compared: Any) -> int:
    return int(compared.substitutions + compared.deletions + compared.insertions)


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    seed: int = 0,
    normaliser: str = NORMALISER,
) -> ErrorRate:
    """Word and character error rate of a corpus; `asdict` of it is ready for JSON. Errors: those of
    `lines`."""
    compared = lines(references, hypotheses, normaliser)
    edits = np.array([line.word_edits for line in compared])
    words = np.array([line.words for line in compared])
    low, high = bootstrap(share, edits, words, seed=seed)

    return ErrorRate(
        wer=float(share(edits, words)),
        low=low,
        high=high,
        cer=sum(line.character_edits for line in compared)
        / sum(line.characters for line in compared),
        exact=float((edits == 0).mean()),
        words=int(words.sum()),
        utterances=len(compared),
        normaliser=normaliser,
        counted=_counted(references, normaliser),
    )


def _counted(references: Sequence[str], normaliser: str) -> str:
    """What the words of these texts are."""
    said = chain.from_iterable(words(normalise(text, normaliser)) for text in references)
    single = {spaceless(word[0]) for word in said}
    if single == {True}:
        return "characters"
    return "words and characters" if True in single else "words"


# --- floors: what a system gets that does not listen ---


def floor_random(references: Sequence[str], seed: int = 0) -> list[str]:
    """For each sentence another one, drawn from all. Raises ZipperError if all are the same."""
    chance = random.Random(seed)
    return [_another(text, references, chance) for text in references]


def floor_template(references: Sequence[str], templates: Sequence[int], seed: int = 0) -> list[str]:
    """For each sentence another one of its template: the best that knowing the kind of sentence
    alone can do.

    A sentence that is the only one of its template gets one drawn from all. Raises ZipperError if
    all sentences are the same.
    """
    chance = random.Random(seed)
    siblings = defaultdict(list)
    for text, template in zip(references, templates, strict=True):
        siblings[template].append(text)
    return [
        _another(
            text, siblings[template] if len(set(siblings[template])) > 1 else references, chance
        )
        for text, template in zip(references, templates, strict=True)
    ]


def _another(text: str, candidates: Sequence[str], chance: random.Random) -> str:
    others = [other for other in candidates if other != text]
    if not others:
        raise ZipperError(
            f"A floor needs two different sentences, but there is only {text!r}. Evaluate on more "
            "utterances."
        )
    return chance.choice(others)
