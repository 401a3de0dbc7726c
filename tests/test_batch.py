"""Offline work on a manifest: what each row gets is what the pipeline gives it, whoever does it,
and however often it was stopped."""

import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import sound, units, world

from zipper import batch
from zipper.batch import Counts, run_batch
from zipper.cli import main
from zipper.data import layouts, manifests
from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.strand import Produced, Segment

LIMITS = {"text": 8, "speech": 8}
DRAWN = Sampling(0.9, seed=4)
TASK = "text -> speech"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_pretrained(world(tmp_path_factory.mktemp("world")).zip)


#: By the number of their row.
TEXTS = {0: "call anna", 1: "send two", 2: "pay peter", 4: "turn red", 6: "five lamp"}
TEXTS |= {7: "blue oven", 8: "send five", 9: "call red"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Ten rows, of which two are bad."""
    said = ["call anna", "send two", "pay peter", "turn red", "five lamp", "blue oven"]
    given: list[Any] = [{"id": f"a{n}", "text": text} for n, text in enumerate(said)]
    given[3:3] = [{"id": "none", "speech": [1, 2]}]
    lines = [json.dumps(row) for row in given]
    lines[5:5] = ["no json"]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join([*lines, json.dumps({"text": "send five"}), json.dumps({"text": "call red"})])
    )
    return path  # fmt: skip


def read(path: Path) -> dict[int, Any]:
    found = {line["row"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert len(found) == len(path.read_text().splitlines()), "a row has one line"
    return found


def test_each_row_gets_what_the_pipeline_gives_it(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    counts = run_batch(pipe, rows, "text -> text", out, 3, sampling=DRAWN, limits=LIMITS)
    assert counts == Counts(10, 8, 2, 0)
    found = read(out)
    assert set(found) == set(range(10))
    assert "no field 'text'" in found[3]["error"] and "JSON" in found[5]["error"]
    for number, text in ((0, "call anna"), (9, "call red")):
        how = Sampling(0.9, seed=4 + number)
        (alone,) = pipe.run([Segment("text", text)], ["text"], how, LIMITS)
        (made,) = found[number]["made"]
        assert (made["content"], made["ended"]) == (alone.content, alone.ended)
        assert made["score"] == pytest.approx(alone.score, rel=1e-4)
    assert found[0]["id"] == "a0" and "id" not in found[9]


def test_half_a_character_in_an_id_stops_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"id": "\\ud800", "text": "call"}\n{"id": "b", "text": ""}\n')
    assert run_batch(pipe, path, "text -> speech", out, 3, limits=LIMITS) == Counts(2, 2, 0, 0)
    found = read(out)
    assert found[0]["id"] == "\ud800"
    assert found[1]["made"][0]["content"] is None, "nobody speaks in an empty text"


def test_a_voice_stands_before_what_is_given(pipe: Pipeline, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"speech": [5, 6], "voice": "high", "text": 7}))  # text is not asked
    counts = run_batch(pipe, path, "voice~speech -> text", out, 3, limits=LIMITS)
    assert counts == Counts(1, 1, 0, 0)
    high = pipe.units.voice_id("high")
    (alone,) = pipe.run([Segment("speech", [high, 5, 6])], ["text"], limits=LIMITS)
    (plain,) = pipe.run([Segment("speech", [5, 6])], ["text"], limits=LIMITS)
    assert alone.score != plain.score
    assert read(out)[0]["made"][0]["score"] == pytest.approx(alone.score, rel=1e-4)


def test_a_run_that_was_stopped_goes_on_and_parts_make_the_whole(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    def run(out: Path, part: tuple[int, int] = (1, 1), told: Any = None) -> Counts:
        return run_batch(pipe, rows, TASK, out, 2, part, DRAWN, LIMITS, told)

    class Stopped(Exception):
        pass

    def stop(counts: Counts) -> None:
        if counts.done + counts.refused == 4:
            raise Stopped

    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    run(whole)
    with pytest.raises(Stopped):
        run(stopped, told=stop)
    with stopped.open("a") as file:
        file.write('{"row": 9, "made": [{"tow')  # killed while it wrote
    assert run(stopped).before == 4
    halves = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    counts = [run(path, (n, 2)) for n, path in enumerate(halves, 1)]
    assert sum(one.rows for one in counts) == 10

    def made(path: Path) -> dict[int, Any]:
        """Without the scores, whose last bits depend on the company, and the folder's name."""
        return {
            row: line.get("error")
            or [((path.parent / one["content"]).read_bytes(), one["ended"]) for one in line["made"]]
            for row, line in read(path).items()
        }

    assert made(stopped) == made(whole)
    assert made(halves[0]) | made(halves[1]) == made(whole)
    assert run(whole) == Counts(10, 8, 2, 10), "nothing is left to do"


def test_what_was_made_is_learnt_from(pipe: Pipeline, rows: Path, tmp_path: Path) -> None:
    """Back-translation: rows with what was made of them, as ids, in the order of the rows."""
    out = tmp_path / "there" / "out.jsonl"
    task = "text -> made:speech"
    run_batch(pipe, rows, task, out, 3, sampling=DRAWN, limits=LIMITS, ids=True)
    found = read(out)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "there", moved / "there")
    shutil.copy(rows, moved)
    for place in (out, moved / "there" / "out.jsonl"):
        passed: Counter[str] = Counter()
        learnt = list(layouts.samples(f"made:{place}", passed=passed))
        done = [row for row in sorted(found) if "made" in found[row]]
        assert [sample.row["text"] for sample in learnt] == [TEXTS[row] for row in done]
        assert [sample.row["made:speech"] for sample in learnt] == [
            found[row]["made"][0]["content"] for row in done
        ]
        assert passed["rows without an answer"] == 2
    (moved / rows.name).write_text('{"text": "turn"}\n' + rows.read_text())
    with pytest.raises(ZipperError, match="rows would get the answers of others"):
        list(layouts.samples(f"made:{moved / 'there' / 'out.jsonl'}"))
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        next(iter(other.model.links.parameters())).add_(1)
    with pytest.raises(ZipperError, match="of another zip"):
        run_batch(other, rows, task, out, 3, sampling=DRAWN, limits=LIMITS, ids=True)
    taken = manifests.encode(learnt[0].row, pipe.modalities, tmp_path, "row 0")
    assert taken["made"] == found[0]["made"][0]["content"] != []
    assert taken["text"] == pipe.modalities["text"].encode("call anna")

    voices = {*pipe.modalities["speech"].prefixes.values()}
    whole = {}
    for row in done:
        how, given = replace(DRAWN, seed=4 + row), pipe.modalities["text"].encode(TEXTS[row])
        ((whole[row],),) = pipe.generate([[Segment("text", given)]], ["speech"], how, LIMITS)
        content = whole[row].content
        behind = int(bool(content) and content[0] in voices)
        assert found[row]["made"][0]["content"] == content[behind:]
    high = pipe.units.voice_id("high")
    for content in ([high, 5, 6], [5, 6], []):  # a voice is no part of what is heard
        sample, made = manifests.Sample("", {}, tmp_path), [Produced("speech", content)]
        (told,) = batch._line(pipe, 0, sample, made, None)["made"]
        assert told["content"] == content[-2:]

    sure = tmp_path / "sure.jsonl"
    run_batch(pipe, rows, task, sure, 3, sampling=DRAWN, limits=LIMITS, ids=True, least=0.05)
    for row, line in read(sure).items():
        if "made" in found[row]:
            made = whole[row]
            mean = math.exp(made.score / (len(made.content) + made.ended))
            assert ("made" in line) == (made.ended and mean >= 0.05), (made, line)
    told = [line.get("error", "") for line in read(sure).values()]
    assert any("below 0.05" in said or "end by itself" in said for said in told)
    with pytest.raises(ZipperError, match="another least"):
        run_batch(pipe, rows, task, sure, sampling=DRAWN, limits=LIMITS, ids=True)
    with pytest.raises(ZipperError, match="least is 1"):
        run_batch(pipe, rows, task, tmp_path / "new.jsonl", least=1)


def test_a_field_that_was_made_takes_no_other_ones_place(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(pipe, rows, "text -> text", out, limits=LIMITS)
    with pytest.raises(ZipperError, match=r"has a field 'text'(?s:.*)Name it in the task"):
        list(layouts.samples(f"made:{out}"))
    run_batch(pipe, rows, "text -> made:text", tmp_path / "two.jsonl", limits=LIMITS)
    made = [sample.row["made:text"] for sample in layouts.samples(f"made:{tmp_path}/two.jsonl")]
    assert len(made) == 8 and all(isinstance(text, str) for text in made)
    run_batch(pipe, rows, "text -> made:speech", tmp_path / "three.jsonl", limits=LIMITS)
    for sample in layouts.samples(f"made:{tmp_path}/three.jsonl"):
        if sample.row["made:speech"] is not None:  # a sound that is a file is found from anywhere
            assert Path(sample.row["made:speech"]).is_absolute()
            assert pipe.modalities["speech"].read(sample.row["made:speech"], Path("/")).seconds
    with (tmp_path / "two.jsonl").open("a") as file:
        file.write('{"row": 3')
    with pytest.raises(ZipperError, match=r"line 11 is none of `zipper run-batch`"):
        list(layouts.samples(f"made:{tmp_path}/two.jsonl"))


def test_an_output_of_something_else_is_not_gone_on_with(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(pipe, rows, "text -> text", out, limits=LIMITS)
    with pytest.raises(ZipperError, match="another task"):
        run_batch(pipe, rows, TASK, out, limits=LIMITS)
    with pytest.raises(ZipperError, match="another sampling"):
        run_batch(pipe, rows, "text -> text", out, sampling=DRAWN, limits=LIMITS)
    rows.write_text(rows.read_text() + "\n{}")
    with pytest.raises(ZipperError, match="another manifest"):
        run_batch(pipe, rows, "text -> text", out, limits=LIMITS)
    for task, wrong in (("text -> smell", "smell"), ("text", "is not a task")):
        with pytest.raises(ZipperError, match=wrong):
            run_batch(pipe, rows, task, tmp_path / "new.jsonl")
    with pytest.raises(ZipperError, match="Part 3 of 2"):
        run_batch(pipe, rows, TASK, tmp_path / "new.jsonl", part=(3, 2))
    with pytest.raises(ZipperError, match="cannot be read"):
        run_batch(pipe, tmp_path / "none.jsonl", TASK, tmp_path / "new.jsonl")
    (tmp_path / "strange.jsonl").write_text("hello\n")
    with pytest.raises(ZipperError, match="no run wrote"):
        batch._there(tmp_path / "strange.jsonl")


def test_where_it_cannot_write_it_says_so_and_what_is_safe(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZipperError, match=r"out.jsonl could not be written: File exists"):
        run_batch(pipe, rows, TASK, tmp_path / "file" / "out.jsonl")
    out = tmp_path / "out.jsonl"

    def lose(_: Counts) -> None:
        out.unlink()
        out.mkdir()

    with pytest.raises(ZipperError, match=r"written: Is a directory.* Rows that are in it stay"):
        run_batch(pipe, rows, TASK, out, limits=LIMITS, told=lose)


def test_the_command_reads_files_beside_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = world(tmp_path / "world")
    sound(tmp_path / "a.wav")
    (tmp_path / "rows.jsonl").write_text('{"speech": "a.wav"}\n{"speech": "gone.wav"}\n')
    out = tmp_path / "out.jsonl"
    words = ["--task", "speech -> text", "-o", str(out), "--model", str(made.zip)]
    assert main(["run-batch", str(tmp_path / "rows.jsonl"), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 2, "done": 1, "refused": 1, "before": 0}
    assert "gone.wav" in read(out)[1]["error"]
    assert main(["run-batch", str(tmp_path / "rows.jsonl"), *words, "--part", "9"]) == 2


def test_a_list_that_is_no_ids_is_an_error_of_its_row(pipe: Pipeline, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    ids = pipe.modalities["text"].encode("call anna")
    given = [{"text": ["call", "anna"]}, {"text": ids}, {"text": "call anna"}]
    rows.write_text("\n".join(map(json.dumps, given)))
    assert run_batch(pipe, rows, TASK, out, limits=LIMITS) == Counts(3, 2, 1, 0)
    found = read(out)
    assert "error" in found[0] and len(found[1]["made"]) == len(found[2]["made"]) == 1


def test_a_choice_is_the_pipeline_s(tmp_path: Path) -> None:
    made = Pipeline.from_pretrained(world(tmp_path / "world").zip)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"text": "call anna"}))
    with pytest.raises(ZipperError, match="'motion'"):
        run_batch(made, rows, "text -> text|motion", out)
    made.zip.choose(["speech", "text"])
    assert run_batch(made, rows, "text -> text|speech", out, limits=LIMITS).done == 1
    alone = made.run([Segment("text", "call anna")], ["text|speech"], limits=LIMITS)
    assert [one["tower"] for one in read(out)[0]["made"]] == [one.tower for one in alone]


def test_a_text_that_is_called_as_a_file_is_a_text(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(pipe, rows, "text -> made:text", out, limits=LIMITS)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    right = [line for line in lines if "made" in line]
    for line, said in zip(right, ["seven", "x " * 200], strict=False):
        line["made"][0]["content"] = said
    out.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "seven").touch()
    found = [sample.row["made:text"] for sample in layouts.samples(f"made:{out}")]
    assert found[:2] == ["seven", "x " * 200]
    layouts.about(out).write_text("{}")
    with pytest.raises(ZipperError, match="does not say of which manifest and task"):
        list(layouts.samples(f"made:{out}"))


def test_a_part_is_every_so_many_rows_from_its_number_on(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    for number, wanted in ((1, {0, 3, 6, 9}), (2, {1, 4, 7}), (3, {2, 5, 8})):
        out = tmp_path / f"{number}.jsonl"
        run_batch(pipe, rows, "text -> text", out, part=(number, 3), limits=LIMITS)
        assert {*read(out)} == wanted


def test_an_output_of_another_part_limit_codebook_or_tower_is_not_gone_on_with(
    pipe: Pipeline, rows: Path, tmp_path: Path
) -> None:
    out, task = tmp_path / "out.jsonl", "text -> text"
    run_batch(pipe, rows, task, out, part=(1, 2), limits=LIMITS)
    with pytest.raises(ZipperError, match="another part"):
        run_batch(pipe, rows, task, out, part=(2, 2), limits=LIMITS)
    with pytest.raises(ZipperError, match="another limits"):
        run_batch(pipe, rows, task, out, part=(1, 2), limits=LIMITS | {"text": 7})
    coded, other = Pipeline(pipe.zip, {**pipe.modalities}), copy.deepcopy(pipe)
    coded.modalities["speech"] = units(seed=1)
    with pytest.raises(ZipperError, match="another modalities"):
        run_batch(coded, rows, task, out, part=(1, 2), limits=LIMITS)
    text = replace(other.zip.config.towers["text"], digest="0" * 64)
    other.zip.config = replace(other.zip.config, towers=other.zip.config.towers | {"text": text})
    with pytest.raises(ZipperError, match="another model"):
        run_batch(other, rows, task, out, part=(1, 2), limits=LIMITS)


def test_two_runs_do_not_write_one_output(pipe: Pipeline, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.jsonl"

    def meanwhile(counts: Counts) -> None:
        with pytest.raises(ZipperError, match="is in use: another process writes it"):
            run_batch(pipe, rows, "text -> text", out, limits=LIMITS)

    run_batch(pipe, rows, "text -> text", out, limits=LIMITS, told=meanwhile)
    assert len(read(out)) == 10 and not [*out.parent.glob(".*.held")]
