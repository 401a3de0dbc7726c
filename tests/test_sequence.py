"""Collation against tables written by hand: what each tower reads, what it must predict, and what
counts."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from zipper.errors import ZipperError
from zipper.strand import Batch, Ends, Segment, Strand, Target, collate, decisions, read_ids

ENDS = {"text": Ends(0, 1), "speech": Ends(90, 91)}
ASR = [Segment("speech", [50, 51]), Target("text", [5, 6, 7], 1.0)]
TTS = [Segment("text", [5]), Target("speech", [50, 51], 0.5)]
THREE = [
    Target("speech", [52], 1.0),
    Segment("text", []),
    Target("speech", [53, 54], 2.0),
]
ALONE = [Target("text", [8, 9], 1.0)]


def table(batch: Batch, tower: str) -> dict[str, list[list[float]]]:
    strand = batch.strands[tower]
    fields = (
        strand.ids,
        strand.position,
        strand.time,
        strand.document,
        batch.targets[tower],
        batch.weights[tower],
    )
    return {
        name: field.tolist()
        for name, field in zip(
            "ids position time document targets weights".split(), fields, strict=True
        )
    }


def test_recognition_is_speech_that_is_given_then_text_that_counts() -> None:
    batch = collate([ASR], ENDS)
    assert list(batch.strands) == ["speech", "text"]
    assert table(batch, "speech") == {
        "ids": [[90, 50, 51, 91]],
        "position": [[0, 1, 2, 3]],
        "time": [[0, 1, 2, 3]],
        "document": [[0, 0, 0, 0]],
        "targets": [[50, 51, 91, 0]],
        "weights": [[0, 0, 0, 0]],
    }
    assert table(batch, "text") == {
        "ids": [[0, 5, 6, 7, 1]],
        "position": [[0, 1, 2, 3, 4]],
        "time": [[4, 5, 6, 7, 8]],
        "document": [[0, 0, 0, 0, 0]],
        "targets": [[5, 6, 7, 1, 0]],
        "weights": [[1, 1, 1, 1, 0]],
    }


def test_positions_go_on_over_the_segments_of_a_tower_and_times_over_all() -> None:
    batch = collate([THREE], ENDS)
    assert table(batch, "speech") == {
        "ids": [[90, 52, 91, 90, 53, 54, 91]],
        "position": [[0, 1, 2, 3, 4, 5, 6]],
        "time": [[0, 1, 2, 5, 6, 7, 8]],
        "document": [[0] * 7],
        "targets": [[52, 91, 0, 53, 54, 91, 0]],
        "weights": [[1, 1, 0, 2, 2, 2, 0]],
    }
    assert table(batch, "text") == {
        "ids": [[0, 1]],
        "position": [[0, 1]],
        "time": [[3, 4]],
        "document": [[0, 0]],
        "targets": [[1, 0]],
        "weights": [[0, 0]],
    }


def test_ragged_rows_are_padded_right_for_training() -> None:
    batch = collate([TTS, ALONE], ENDS)
    assert table(batch, "text") == {
        "ids": [[0, 5, 1, 0], [0, 8, 9, 1]],
        "position": [[0, 1, 2, 0], [0, 1, 2, 3]],
        "time": [[0, 1, 2, 0], [0, 1, 2, 3]],
        "document": [[0, 0, 0, -1], [0, 0, 0, 0]],
        "targets": [[5, 1, 0, 0], [8, 9, 1, 0]],
        "weights": [[0, 0, 0, 0], [1, 1, 1, 0]],
    }
    assert table(batch, "speech") == {
        "ids": [[90, 50, 51, 91], [0, 0, 0, 0]],
        "position": [[0, 1, 2, 3], [0, 0, 0, 0]],
        "time": [[3, 4, 5, 6], [0, 0, 0, 0]],
        "document": [[0, 0, 0, 0], [-1, -1, -1, -1]],
        "targets": [[50, 51, 91, 0], [0, 0, 0, 0]],
        "weights": [[0.5, 0.5, 0.5, 0], [0, 0, 0, 0]],
    }


def test_ragged_rows_are_padded_left_for_generation() -> None:
    batch = collate([TTS, ALONE], ENDS, left=True)
    assert table(batch, "text") == {
        "ids": [[0, 0, 5, 1], [0, 8, 9, 1]],
        "position": [[0, 0, 1, 2], [0, 1, 2, 3]],
        "time": [[0, 0, 1, 2], [0, 1, 2, 3]],
        "document": [[-1, 0, 0, 0], [0, 0, 0, 0]],
        "targets": [[0, 5, 1, 0], [8, 9, 1, 0]],
        "weights": [[0, 0, 0, 0], [1, 1, 1, 0]],
    }


def test_packed_documents_stand_side_by_side_and_each_counts_from_0() -> None:
    batch = collate([TTS, ASR, ALONE], ENDS, packed=[[0, 2], [1]])
    assert table(batch, "text") == {
        "ids": [[0, 5, 1, 0, 8, 9, 1], [0, 5, 6, 7, 1, 0, 0]],
        "position": [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]],
        "time": [[0, 1, 2, 0, 1, 2, 3], [4, 5, 6, 7, 8, 0, 0]],
        "document": [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, -1, -1]],
        "targets": [[5, 1, 0, 8, 9, 1, 0], [5, 6, 7, 1, 0, 0, 0]],
        "weights": [[0, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]],
    }
    assert batch.strands["speech"].document.tolist() == [[0] * 4, [0] * 4]


def test_types_are_those_of_indices_and_of_a_loss() -> None:
    batch = collate([ASR], ENDS)
    strand = batch.strands["text"]
    for indices in (
        strand.ids,
        strand.position,
        strand.time,
        strand.document,
        batch.targets["text"],
    ):
        assert indices.dtype == torch.long
    assert batch.weights["text"].dtype == torch.float32
    assert batch.to("cpu").strands["text"].ids.tolist() == strand.ids.tolist()


def test_a_tower_without_begin_and_end_is_refused() -> None:
    with pytest.raises(
        ZipperError, match=r"names the tower 'image'; this model has \['speech', 'text'\]"
    ):
        collate([[Segment("image", [1])]], ENDS)


# --- what a content is


@pytest.mark.parametrize(
    "content",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        deque([5, 6]),
        np.array([5, 6], np.uint8),
        np.array([5, 6]),
        torch.tensor([5, 6]),
        [np.int64(5), torch.tensor(6)],
    ],
    ids=lambda content: type(content).__name__,
)
def test_ids_may_come_in_anything_that_is_a_row_of_whole_numbers(content: Any) -> None:
    found = read_ids(content, "text", Ends(0, 1), 10)
    assert found == [5, 6] and {*map(type, found)} == {int}
    assert (
        read_ids(content[:0] if not isinstance(content, deque) else [], "text", Ends(0, 1), 10)
        == []
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [0, 5, 1],
            "'text' holds the id 0, with which its segments begin.*Give the ids between them",
        ),
        ([5, 1], "'text' holds the id 1, with which its segments end"),
        ([5, 0, 6], "the id 0, with which its segments begin"),
        (np.array([5, 1, 6]), "the id 1, with which its segments end"),
        (torch.tensor([1]), "the id 1, with which its segments end"),
        ([5, 10], "holds the id 10; its ids go from 0 to 9"),
        ([-1], "holds the id -1; its ids go from 0 to 9"),
        ([5.0, 6.0], "holds float64 of shape .2,.; one row of whole numbers was wanted"),
        (torch.tensor([5.5]), "holds float32"),
        ([True, False], "holds bool"),
        ([2**70], "holds object"),
        ([[5, 6]], r"of shape \(1, 2\)"),
        ([[5], [5, 6]], "holds no list of ids"),
        (np.array(5), r"of shape \(\)"),
        ("call", "holds a str; a list of ids was wanted"),
        ({5, 6}, "holds a set"),
        (iter([5]), "holds a list_iterator"),
        (5, "holds a int"),
        (None, "holds a NoneType"),
    ],
)
def test_what_is_no_content_is_refused_in_a_sentence(content: Any, message: str) -> None:
    with pytest.raises(ZipperError, match=message):
        read_ids(content, "text", Ends(0, 1), 10)


def test_one_token_may_begin_and_end_segments_and_is_refused_inside_all_the_same() -> None:
    with pytest.raises(ZipperError, match="the id 7, with which its segments begin"):
        read_ids([3, 7], "text", Ends(7, 7), 10)


def test_a_strand_alone_counts_every_document_from_0_and_padding_not_at_all() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6]])
    strand = Strand.alone(ids, torch.tensor([[-1, 0, 0, 1, 1, -1, -1]]))
    assert strand.position.tolist() == strand.time.tolist() == [[0, 0, 1, 0, 1, 0, 0]]
    whole = Strand.alone(ids)
    assert whole.time.tolist() == [[*range(7)]] and not whole.document.any()


def test_a_choice_is_learnt_behind_the_segment_before_it_and_there_is_one() -> None:
    given, chosen = Segment("text", [5]), Target("speech", [50], chosen=True)
    assert decisions([given, Target("speech", [50])]) == {}
    assert decisions([given, given, chosen]) == {1: "speech", 2: ""}
    assert decisions([given, chosen, chosen]) == {0: "speech", 1: "speech", 2: ""}
    with pytest.raises(ZipperError, match=r"A choice has nothing before it\. Give a segment first"):
        decisions([chosen, given])


def test_a_batch_that_is_moved_keeps_its_choices_and_its_company() -> None:
    sample = [Segment("text", [5]), Target("speech", [50], chosen=True)]
    batch = collate([sample], ENDS, company=("text", "speech"))
    moved = batch.to("cpu")
    assert moved.company == batch.company == ("text", "speech")
    assert {name: came.tolist() for name, came in moved.choices.items()} == {
        "text": [[-1, -1, 0]],  # speech comes, of speech, text and the end
        "speech": [[-1, -1, 2]],
    }
    assert table(moved, "speech") == table(batch, "speech")
