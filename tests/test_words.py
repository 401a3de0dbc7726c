"""Words, their confidence and their times, against cases that can be counted on fingers."""

import itertools
import math

import pytest
import torch
from laws import LLAMAS, zipped
from tiny import text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zipper.errors import ZipperError
from zipper.fast import engine as Engine
from zipper.generation import Request, Written
from zipper.modality.text import Text
from zipper.strand import Segment
from zipper.words import Word, align, places, spans, words


def test_a_word_is_as_sure_as_its_tokens_together() -> None:
    ids = text().encode("send two lamps")
    pieces = [text().decode([i]) for i in ids]
    assert len(ids) > 3, pieces
    logprobs = [-0.1 * (n + 1) for n in range(len(ids))]
    found = words(text(), Written("text", ids, 0, [*logprobs, -9.0], "end"))
    assert [word.text for word in found] == ["send", "two", "lamps"]
    assert math.prod(word.confidence for word in found) == pytest.approx(math.exp(sum(logprobs)))
    # A space is its word's.
    first = next(n for n in range(1, len(ids)) if text().decode(ids[: n + 1]).startswith("send "))
    assert found[0].confidence == pytest.approx(math.exp(sum(logprobs[:first])))


def test_space_at_the_end_is_no_word() -> None:
    ids = text().encode("send two ")
    assert text().decode(ids).endswith(" ")
    found = words(text(), Written("text", ids, 0, [-0.1] * len(ids), "end"))
    assert [word.text for word in found] == ["send", "two"]


def test_what_was_forced_is_sure_and_times_are_those_of_the_tokens() -> None:
    ids = text().encode("pay anna")
    split = next(n for n in range(1, len(ids)) if text().decode(ids[: n + 1]).startswith("pay "))
    times = [(2 * n, 2 * n + 2) for n in range(len(ids))]
    found = words(text(), Written("text", ids, split, [-0.5] * (len(ids) - split), "limit"), times)
    assert found[0] == Word("pay", 1.0, 0, 2 * split)
    assert found[1] == Word("anna", math.exp(-0.5 * (len(ids) - split)), 2 * split, 2 * len(ids))


def test_a_path_follows_what_is_looked_at_and_never_goes_back() -> None:
    looks = torch.full((3, 8), 0.01)
    for target, (start, stop) in enumerate([(0, 2), (2, 7), (7, 8)]):
        looks[target, start:stop] = 0.5
    looks[:, 4] = 0.9  # all look at it: it says nothing
    assert align(looks) == [(0, 2), (2, 7), (7, 8)]
    backwards = align(looks.flip(0))
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(backwards))


def test_who_looks_nowhere_is_where_its_letters_are() -> None:
    ids = text().encode("send two")
    found = places(text(), ids)
    assert found == sorted(found) and 0 < found[0] < 0.5 < found[-1] < 1
    looks = torch.full((4, 40), 0.01)
    looks[0, 1], looks[1, 11], looks[2, 39] = 0.5, 0.5, 0.02  # the third looks nowhere
    looks[3, 35] = 0.5
    alone, helped = align(looks), align(looks, [0.1, 0.3, 0.6, 0.9])
    assert alone[2][0] > 28 and 12 <= helped[2][0] < helped[3][0] <= 35


def test_more_words_than_sound_still_have_times() -> None:
    assert align(torch.eye(5)[:, :2]) == align(torch.eye(5)[:, :2]) and all(
        b > a for a, b in align(torch.eye(5)[:, :2])
    )
    assert align(torch.ones(1, 4)) == [(0, 4)]


def test_a_zip_that_looks_at_one_source_after_another_has_their_times() -> None:
    model = zipped(LLAMAS)
    given = Segment("speech", [3, 4, 5, 6, 7, 8])
    (answer,) = Engine(model).run([Request([given], [Segment("text", [5, 6])], limits={"text": 5})])
    found = spans(model, given, answer.segments()[0])
    assert len(found) == len(answer.written[0].ids)
    assert found[0][0] == 0 and found[-1][1] == 6 and all(0 <= a < b <= 6 for a, b in found)


def test_no_times_without_a_link_or_without_sound() -> None:
    model = zipped(LLAMAS)
    with pytest.raises(ZipperError, match="is empty"):
        spans(model, Segment("speech", []), Segment("text", [3]))
    with pytest.raises(ZipperError, match="No link leads"):
        spans(model, Segment("text", [3]), Segment("text", [3]))


def test_a_character_of_several_tokens_is_whole() -> None:
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    models_ids = {letter: n for n, letter in enumerate(sorted(letters))} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=models_ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_of = Text(tokenizer.to_str(), "<s>", "</s>")
    ids = bytes_of.encode("où est né")
    assert len(ids) == 11
    found = words(bytes_of, Written("text", ids, 0, [-0.1] * (len(ids) + 1), "end"))
    assert [word.text for word in found] == ["où", "est", "né"]
    assert [word.confidence for word in found] == [
        pytest.approx(math.exp(-0.1 * n)) for n in (3, 4, 4)
    ]


def test_a_source_that_is_looked_at_little_says_as_much_as_another() -> None:
    looks = torch.tensor([[0.02, 0.1, 0.02, 0.02], [0.01, 0.9, 0.01, 0.01]])
    assert align(looks)[0] == (0, 4)  # three of four sources are rather the first one's


def test_an_id_is_read_from_where_the_token_before_it_looked() -> None:
    model, given = zipped(LLAMAS), Segment("speech", [3, 4, 5, 6, 7, 8])
    found = [spans(model, given, Segment("text", [5, 6, last])) for last in range(2, 19)]
    assert all(one == found[0] for one in found)  # where the last id itself looks says nothing
