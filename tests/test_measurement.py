"""Measurement of any task on rows of a manifest: metrics, floor, oracle, judges, the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from many import pictures
from test_modality import Levels

from zipper import Pipeline, measurement
from zipper.data.manifests import Sample
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality.image import Image
from zipper.model import Zipper
from zipper.sampling import Sampling
from zipper.strand import Segment, Target, collate
from zipper.tasks import Task
from zipper.testing import tiny_tower

WORDS = ("call", "send", "alice", "bob")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    modalities: dict[str, Any] = {"text": tiny.text(), "level": Levels()}
    towers, ends = {}, {}
    for name, each in modalities.items():
        towers[name] = tiny_tower("llama", vocabulary=each.vocabulary)
        ends[name] = each.begin, each.end
    zipped = Zipper.from_towers(towers, ends=ends, link=LinkConfig(head_width=16))
    return Pipeline(zipped, modalities)


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"id": f"n{n}", "text": f"call {WORDS[n % 4]}", "level": [n, n + 1, n + 2]}
        for n in range(count)
    ]


def manifest(folder: Path, found: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return path


def test_every_pair_is_measured_beside_floor_and_oracle(pipe: Pipeline, tmp_path: Path) -> None:
    found = measurement.measure(pipe, manifest(tmp_path, rows()))
    assert [one.task for one in found] == ["text -> level", "level -> text"]
    level, text = found
    assert {*text.metrics} == {"wer", "cer", "exact"}
    assert {*level.metrics} == {"exact"}
    for one in found:
        assert one.rows == 6
        assert one.metrics["exact"]["oracle"].value == 1
        assert one.metrics["exact"]["floor"].value == 0
        assert 0 <= one.ended <= 1
    assert text.metrics["wer"]["oracle"].value == 0 < text.metrics["wer"]["floor"].value


def test_nats_are_those_of_the_model_read_token_by_token(pipe: Pipeline) -> None:
    given = [Sample(f"row {n}", row, Path()) for n, row in enumerate(rows(3))]
    (one,) = measurement.measure(pipe, given, ["level -> text"])
    total, count = 0.0, 0
    for row in rows(3):
        text = Target("text", pipe.modalities["text"].encode(row["text"]))
        batch = collate([[Segment("level", row["level"]), text]], pipe.zip.ends())
        with torch.inference_mode():
            logits = pipe.zip(batch.strands)["text"][0].log_softmax(-1)
        wanted = [*text.content, pipe.modalities["text"].end]  # of the begin token and those behind
        total -= sum(float(logits[place, token]) for place, token in enumerate(wanted))
        count += len(wanted)
    assert one.nats == pytest.approx(total / count, rel=1e-4)


def test_nats_do_not_hang_on_what_else_a_row_holds(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a row with fields of other tasks stands in the same batch as without them."""
    monkeypatch.setattr(measurement, "BATCH", 2)
    more = [row | {"speech": [0] * (7 * n % 5)} for n, row in enumerate(rows(6))]
    found = [
        measurement._nats(pipe.zip, Task.parse("level -> text"), _encoded(pipe, some))
        for some in (rows(6), more)
    ]
    assert found[0] == found[1]


def _encoded(pipe: Pipeline, some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    text = pipe.modalities["text"]
    return [row | {"text": text.encode(row["text"])} for row in some]


def test_a_judge_is_asked_of_every_system_with_the_rows(pipe: Pipeline) -> None:
    asked = []

    def judge(wanted: Sequence[Any], made: Sequence[Any], raw: Sequence[Any]) -> measurement.Scores:
        asked.append((list(made), [row["id"] for row in raw]))
        return {
            "same first": [(float(a[:1] == b[:1]), 1.0) for a, b in zip(wanted, made, strict=True)]
        }

    given = [Sample(f"row {n}", row, Path()) for n, row in enumerate(rows())]
    found = measurement.measure(pipe, given, ["text -> level"], judges={"level": {"eye": judge}})
    assert len(asked) == 3
    assert asked[1] == ([row["level"] for row in rows()], [f"n{n}" for n in range(6)])
    assert found[0].metrics["eye: same first"]["oracle"].value == 1


def test_a_number_that_no_answer_has_is_none_and_not_zero(pipe: Pipeline, tmp_path: Path) -> None:
    def judge(wanted: Sequence[Any], made: Sequence[Any], raw: Sequence[Any]) -> measurement.Scores:
        true = list(made) == list(wanted)
        return {"near": [(1.0, float(true))] * len(made), "never": [(0.0, 0.0)] * len(made)}

    found = measurement.measure(
        pipe, manifest(tmp_path, rows()), ["text -> level"], judges={"level": {"eye": judge}}
    )
    assert found[0].metrics["eye: near"].keys() == {"oracle"}
    assert "eye: never" not in found[0].metrics
    (line,) = [line for line in measurement.text(found).splitlines() if "near" in line]
    assert line.split()[2:] == "none has one 1 (1 to 1) none has one".split()
    measurement.write(tmp_path / "page.html", found, "levels")
    assert "none has one" in (tmp_path / "page.html").read_text()


def test_a_judge_is_found_by_its_name(pipe: Pipeline) -> None:
    rows_told = [{"text": "call anna now"}, {"text": "call"}]
    said = measurement.judge("words")(["", ""], ["call anna", "send"], rows_told)
    assert said["words"] == [(pytest.approx(0.8), 1.0), (0.0, 1.0)]


def test_the_number_is_a_ratio_of_sums_inside_of_its_interval() -> None:
    number = measurement._number([(1.0, 10.0), (3.0, 2.0), (0.0, 8.0)], seed=0)
    assert number.value == pytest.approx(4 / 20)
    assert 0 <= number.low <= number.value <= number.high <= 1.5


class Eye:
    """Takes a level for low or high."""

    def __call__(
        self, wanted: Sequence[Any], made: Sequence[Any], raw: Sequence[Any]
    ) -> measurement.Scores:
        return {"half": [(float(one == other), 1.0) for one, other in self.labels(made, raw)]}

    def labels(self, made: Sequence[Any], rows: Sequence[Any]) -> list[tuple[str, str]]:
        named = [(row["level"][0], sum(one[:1])) for row, one in zip(rows, made, strict=True)]
        return [tuple("high" if n > 5 else "low" for n in pair) for pair in named]


def test_what_was_taken_for_what_is_a_table_where_there_are_few_answers(
    pipe: Pipeline, tmp_path: Path
) -> None:
    found = measurement.measure(
        pipe, manifest(tmp_path, rows(12)), judges={"level": {"eye": Eye()}}
    )
    level, text = found
    assert {right: sum(taken.values()) for right, taken in level.tables["eye"].items()} == {
        "high": 6,
        "low": 6,
    }
    right = [f"call {word}" for word in sorted(WORDS)]
    assert sorted(text.tables["answers"]) == right
    taken = {name for row in text.tables["answers"].values() for name in row}
    assert taken <= {*right, measurement.ANOTHER}
    assert all(sum(row.values()) == 3 for row in text.tables["answers"].values())
    few = measurement.measure(pipe, manifest(tmp_path, rows(7)), ["level -> text"])
    assert few[0].tables == {} and "tables" not in few[0].to_json()
    measurement.write(tmp_path / "page.html", found, "tables")
    page = (tmp_path / "page.html").read_text()
    assert "eye: what was right (rows)" in page and '<td class="right">' in page


def test_the_page_loads_nothing_and_shows_the_rows(pipe: Pipeline, tmp_path: Path) -> None:
    found = measurement.measure(pipe, manifest(tmp_path, rows()), [Task(("text",), ("level",))])
    measurement.write(tmp_path / "page.html", found, "levels & words")
    page = (tmp_path / "page.html").read_text()
    assert "levels &amp; words" in page
    assert "n5" in page and "call bob" in page
    assert "http" not in page.replace("http-equiv", "")
    assert json.loads(json.dumps(found[0].to_json()))["metrics"]["exact"]["floor"]["value"] == 0


def test_rows_that_cannot_be_measured_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="1 rows were given; a floor wants two"):
        measurement.measure(pipe, manifest(tmp_path, rows(1)))
    with pytest.raises(ZipperError, match=r"no two of the fields \['level', 'text'\] in common"):
        measurement.measure(pipe, manifest(tmp_path, [{"text": "call"}, {"level": [1]}]))
    with pytest.raises(ZipperError, match="wants a field 'sound'"):
        measurement.measure(pipe, manifest(tmp_path, rows()), ["sound:level -> text"])
    with pytest.raises(ZipperError, match=r"There is no judge 'ear'; there are \["):
        measurement.judge("ear")


def test_what_is_wanted_is_the_piece_that_a_row_names(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny.world(tmp_path / "world").zip)
    tiny.sound(tmp_path / "long.wav", seconds=3)
    row = {"audio_filepath": "long.wav", "offset": 1.0, "duration": 0.5, "text": "call"}
    asked: list[tuple[list[Any], list[Any]]] = []

    def judge(wanted: Sequence[Any], made: Sequence[Any], _: Sequence[Any]) -> measurement.Scores:
        asked.append(([one.seconds for one in wanted], [one.seconds for one in made]))
        return {"alike": [(0.0, 1.0)] * len(wanted)}

    given = [Sample(f"row {n}", row, tmp_path) for n in range(2)]
    measurement.measure(pipe, given, ["text -> speech"], judges={"speech": {"ear": judge}})
    with pytest.raises(ZipperError, match="judges names the tower 'sound'"):
        measurement.measure(pipe, given, ["text -> speech"], judges={"sound": {"ear": judge}})
    assert all(wanted == [0.5, 0.5] for wanted, _ in asked)
    assert asked[1][1] == pytest.approx([0.5, 0.5], abs=0.1)  # the oracle: what the units say


def test_a_resample_in_which_nothing_was_wanted_says_no_more_than_its_errors() -> None:
    rates = [(1.0, 0.0), (0.0, 3.0)]  # a word too much in silence; three words right
    number = measurement._number(rates, 0)
    assert number.value == pytest.approx(1 / 3) and number.high <= 2


def test_row_n_draws_from_the_seed_and_n(pipe: Pipeline) -> None:
    task, alike = Task.parse("text -> level"), _encoded(pipe, rows(1)) * 4
    drawn = measurement._answers(pipe, task, alike, Sampling(2.0, seed=3))
    for n, (made,) in enumerate(drawn):
        (alone,) = pipe.generate([task.prompt(alike[n])], ["level"], Sampling(2.0, seed=3 + n))
        assert made.content == alone[0].content
    assert len({tuple(made.content) for (made,) in drawn}) > 1


def test_a_voice_that_is_wanted_is_asked_for(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny.world(tmp_path / "world").zip)
    high, task = pipe.units.voice_id("high"), Task.parse("text -> voice~speech")
    row = {"text": pipe.modalities["text"].encode("call"), "voice": [high], "speech": [5, 6]}
    ((made,),) = measurement._answers(pipe, task, [row], Sampling())
    assert made.content[:1] == [high]


def test_nats_are_of_one_segment_of_several(pipe: Pipeline) -> None:
    some = _encoded(pipe, rows(3))
    (alone,) = measurement._nats(pipe.zip, Task.parse("level -> text"), some)
    first, _ = measurement._nats(pipe.zip, Task.parse("level -> text, level"), some)
    assert first == pytest.approx(alone, rel=1e-4)


def test_no_row_is_its_own_floor_though_all_are_told_alike() -> None:
    drawn = pictures(5)
    kind = Image.fitted(drawn, codes=12, patch=4, size=(16, 16), channels=1)
    for seed in range(10):
        others = measurement._others(kind, drawn, seed)
        assert all(other is not one for one, other in zip(drawn, others, strict=True))


def test_only_the_first_rows_are_measured_where_a_limit_says_so(
    pipe: Pipeline, tmp_path: Path
) -> None:
    path = manifest(tmp_path, rows(6))
    assert [one.rows for one in measurement.measure(pipe, path, limit=4)] == [4, 4]
