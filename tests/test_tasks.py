"""Tasks: one line of text decides what is given, what is produced, and what counts in training."""

import pytest

from zipper.errors import ZipperError
from zipper.strand import Segment, Target
from zipper.tasks import ASR, TTS, Task, tower_of

ROW = {"speech": [50, 51], "text": [5, 6, 7], "question": [52]}


@pytest.mark.parametrize(
    ("text", "given", "produced"),
    [
        ("speech -> text", ("speech",), ("text",)),
        ("text->speech", ("text",), ("speech",)),
        ("-> text", (), ("text",)),
        (" speech ->  text ,speech ", ("speech",), ("text", "speech")),
        ("question:speech, text -> answer:speech", ("question:speech", "text"), ("answer:speech",)),
    ],
)
def test_a_task_is_read_from_its_line_and_written_back(
    text: str, given: tuple[str, ...], produced: tuple[str, ...]
) -> None:
    task = Task.parse(text)
    assert task == Task(given, produced)
    assert Task.parse(str(task)) == task


def test_the_papers_tasks() -> None:
    assert Task.parse("speech -> text") == ASR
    assert Task.parse("text -> speech") == TTS


def test_only_what_is_produced_counts_unless_asked() -> None:
    assert ASR.segments(ROW) == [
        Segment("speech", [50, 51]),
        Target("text", [5, 6, 7], 1.0),
    ]
    both = Task(("speech",), ("text",), train_given=0.25)
    assert both.segments(ROW) == [Target("speech", [50, 51], 0.25), Target("text", [5, 6, 7])]


def test_two_fields_of_one_tower_are_told_apart() -> None:
    task = Task.parse("question:speech -> text, speech")
    assert task.towers == ("speech", "text")
    assert task.outputs == ("text", "speech")
    assert task.segments(ROW) == [
        Segment("speech", [52]),
        Target("text", [5, 6, 7], 1.0),
        Target("speech", [50, 51], 1.0),
    ]
    assert task.prompt(ROW) == [Segment("speech", [52])]
    assert [tower_of(item) for item in ("question:speech", "speech")] == ["speech", "speech"]


def test_a_line_that_is_no_task_is_refused() -> None:
    with pytest.raises(ZipperError, match=r"'speech to text' is not a task\. Write it as"):
        Task.parse("speech to text")
    with pytest.raises(ZipperError, match="must produce at least one segment"):
        Task.parse("speech ->")


def test_a_row_without_the_field_is_refused() -> None:
    with pytest.raises(
        ZipperError, match=r"wants a field 'answer', the row has \['question', 'speech', 'text'\]"
    ):
        Task.parse("speech -> answer:text").segments(ROW)


def test_the_pace_of_a_lane_reaches_what_is_learnt_and_what_is_asked_for() -> None:
    task = Task.parse("question:speech -> text@2/3 + speech, text@1/4")
    assert task.outputs == ("text@2/3 + speech", "text@1/4")
    _, text, speech, late = task.segments(ROW)
    assert text == Target("text", [5, 6, 7], stride=2, delay=3)
    assert speech == Target("speech", [50, 51], beside=True)
    assert late == Target("text", [5, 6, 7], delay=4)


def test_a_given_group_that_counts_keeps_its_pace() -> None:
    task = Task(("text@2/3 + speech",), ("question:speech",), train_given=0.5)
    assert task.segments(ROW)[:2] == [
        Target("text", [5, 6, 7], 0.5, stride=2, delay=3),
        Target("speech", [50, 51], 0.5, beside=True),
    ]


def test_the_company_of_a_choice_is_all_towers_of_the_task() -> None:
    assert Task.parse("speech -> text|image").company == ("speech", "text", "image")
    assert Task.parse("speech -> text").company == ()
