"""The paper's experiments: what is planned, that arms are compared fairly, that nothing is run
twice or half; the tables."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.training import Stopped, TrainConfig
from zipper_lab import experiments
from zipper_lab.experiments import ARMS, BASELINES, FROZEN, TABLES, ZIP, Cell, Corpus, Job, Result

PRESETS = pytest.mark.parametrize("preset", ["quick", "cpu", "gpu"])


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A corpus of the tiny world, its towers, and a learning rate that was found."""
    torch.manual_seed(0)
    world = tiny.world(tmp_path_factory.mktemp("world"))
    data.write(
        world.folder / "test.jsonl", [row | {"template": 0} for row in tiny.pairs(5, seed=2)]
    )
    corpus = Corpus(
        modalities={name: str(world.folder / name) for name in ("text", "speech")},
        towers={
            "text-S": str(world.folder / "text" / "tower"),
            "speech": str(world.folder / "speech" / "tower"),
        },
        data=str(world.folder / "pairs.jsonl"),
        dev=str(world.folder / "dev.jsonl"),
        tests={
            "commands": str(world.folder / "test.jsonl"),
            "commands-noisy": str(world.folder / "test.jsonl"),
        },
        alone={"text": [str(world.folder / "pairs.jsonl"), str(world.folder / "dev.jsonl")]},
        sentences=str(world.folder / "pairs.jsonl"),
        judge=str(world.zip),
    )
    return {
        "corpus": dataclasses.asdict(corpus),
        "rate": {"rates": {"lr_new": 4e-3, "lr_tower": 1e-3}},
    }


def spec(
    arm: str = ZIP,
    tables: tuple[str, ...] = ("table1",),
    pairs: int = 20,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    cell = Cell("a cell", tables, arm, "S", "commands", pairs, seed, {"steps": 2} | changes)
    return {
        "cell": dataclasses.asdict(cell),
        "dev": 6,
        "test": 5,
        "batch": 4,
        "mixed_precision": "no",
    }


# --- the plan ---


@PRESETS
def test_every_table_has_cells_and_no_cell_is_planned_twice(preset: str) -> None:
    cells = experiments.plan(preset)
    assert {table for cell in cells for table in cell.tables} == {*TABLES}
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.arm for cell in cells} == {*ARMS}


@PRESETS
def test_headline_cells_stand_before_all_others(preset: str) -> None:
    spend, cells = experiments.budget(preset), experiments.plan(preset)
    first = [
        cell
        for cell in cells
        if cell.corpus == spend.corpora[0] and cell.size == "S" and "table1" in cell.tables
    ]
    assert {cell.arm for cell in first} >= {ZIP, FROZEN, *BASELINES}
    last = max(cells.index(cell) for cell in first)
    assert {table for cell in cells[: last + 1] for table in cell.tables} == {*experiments.HEADLINE}


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_headlines_have_three_seeds_and_three_hundred_sentences(preset: str) -> None:
    spend = experiments.budget(preset)
    assert spend.test >= 300
    for pairs in (spend.pairs, spend.pairs // 10):
        for arm in (ZIP, FROZEN, *BASELINES[:2]):
            seeds = {
                c.seed
                for c in experiments.plan(preset)
                if (c.arm, c.pairs, c.size, c.corpus) == (arm, pairs, "S", spend.corpora[0])
            }
            assert len(seeds) >= 3, (arm, pairs)


def test_a_quick_run_is_the_same_plan_in_small() -> None:
    for preset in ("cpu", "gpu"):
        quick = experiments.plan(preset, quick=True)
        assert {table for cell in quick for table in cell.tables} == {*TABLES}
        assert {cell.corpus for cell in quick} == {cell.corpus for cell in experiments.plan(preset)}
        assert max(cell.changes["steps"] for cell in quick) <= 60 and len(quick) <= 28
        told = [(c.arm, c.size, c.corpus, c.pairs, str(c.changes)) for c in quick]
        assert len({*told}) == len(told)  # each is a row of its own


def test_an_unknown_preset_or_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="preset 'huge'"):
        experiments.plan("huge")
    with pytest.raises(ZipperError, match="table 'table9'"):
        experiments.reproduce("quick", tmp_path, only=["table9"])


# --- jobs ---


@PRESETS
def test_what_a_job_needs_stands_before_it(preset: str) -> None:
    queue = experiments.jobs(experiments.plan(preset), experiments.budget(preset))
    keys = [job.key for job in queue]
    assert len({*keys}) == len(keys)
    for place, job in enumerate(queue):
        assert all(keys.index(need.key) < place for need in job.needs), job.name


def test_every_arm_searches_its_rate_with_the_same_budget() -> None:
    spend = experiments.budget("cpu")
    searches = [
        job.spec for job in experiments.jobs(experiments.cells(spend), spend) if job.kind == "rate"
    ]
    assert {s["cell"]["arm"] for s in searches} == {*ARMS}
    assert len(searches) == len({*ARMS})
    assert (
        len(
            {
                (len(s["tried"]), s["cell"]["changes"]["steps"], s["dev"], s["batch"])
                for s in searches
            }
        )
        == 1
    )


def test_a_jobs_file_is_another_when_anything_that_decides_it_is_another(tmp_path: Path) -> None:
    corpus = Job("corpus", "c", {"pairs": 1})
    cell = Job("cell", "x/y", {"steps": 1}, (corpus,))
    others = [
        Job("cell", "x/y", {"steps": 2}, (corpus,)),
        Job("cell", "x/z", {"steps": 1}, (corpus,)),
        Job("cell", "x/y", {"steps": 1}, (Job("corpus", "c", {"pairs": 2}),)),
    ]
    assert cell.path(tmp_path) == Job(
        "cell", "x/y", {"steps": 1}, (Job("corpus", "c", {"pairs": 1}),)
    ).path(tmp_path)
    assert len({job.path(tmp_path) for job in (cell, *others)}) == 4
    assert cell.path(tmp_path).parent == tmp_path / "cells" and cell.path(tmp_path).name.startswith(
        "x_y-"
    )


# --- running ---


def worker(program: str) -> experiments.Start:
    """Starts a process that runs a program with `told` and `spec` in sight, instead of a
    training."""
    before = "import json, sys, pathlib; told = json.load(open(sys.argv[1])); spec = told['spec']\n"
    before += "def write(): p = pathlib.Path(told['result']); p.parent.mkdir(exist_ok=True); p.write_text('{}')\n"

    def start(told: Path, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", before + program, str(told)], stdout=file, stderr=file
            )

    return start


def queue() -> list[Job]:
    corpus = Job("corpus", "c", {"corpus": "commands", "pairs": 1, "unpaired": 0})
    cells = [Job("cell", f"cell {n}", spec() | {"number": n}, (corpus,)) for n in range(3)]
    return [corpus, *cells, Job("cell", "late", spec(), (cells[1],))]


def test_a_job_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    seen: list[str] = []
    assert (
        experiments.execute(
            queue(), tmp_path, 2, lambda job: seen.append(job.name), worker("write()")
        )
        == {}
    )
    assert (
        sorted(seen) == sorted(job.name for job in queue())
        and seen[0] == "c"
        and seen[-1] == "late"
    )
    assert (
        experiments.execute(
            queue(), tmp_path, 2, lambda job: seen.append("again"), worker("write()")
        )
        == {}
    )
    assert "again" not in seen


def test_a_job_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    program = "sys.exit('no such luck') if spec.get('number') == 1 else write()"
    failed = experiments.execute(
        queue(), tmp_path, 2, lambda job: seen.append(job.name), worker(program)
    )
    assert failed == {"cell 1": "no such luck", "late": "cell cell 1 has no result"}
    assert {*seen} == {"c", "cell 0", "cell 2"}
    said = capsys.readouterr()
    assert "FAILED cell cell 1: no such luck" in said.err and "minutes left" in said.out


def test_cells_go_on_where_only_the_bounds_of_their_corpus_failed(tmp_path: Path) -> None:
    corpus, *cells = queue()
    bounds = Job("reference", corpus.name, {"number": 1}, (corpus,))
    program = "sys.exit('no such luck') if told['kind'] == 'reference' else write()"
    seen: list[str] = []
    failed = experiments.execute(
        [corpus, bounds, *cells], tmp_path, 1, lambda job: seen.append(job.name), worker(program)
    )
    assert failed == {"c": "no such luck"}
    assert {*seen} == {job.name for job in queue()}


def test_a_run_that_is_stopped_stops_its_workers(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(told: Path, log: Path) -> subprocess.Popen[bytes]:
        if started:
            raise KeyboardInterrupt
        started.append(worker("import time; time.sleep(600)")(told, log))
        return started[0]

    with pytest.raises(KeyboardInterrupt):
        experiments.execute(
            [Job("corpus", n, {"pairs": 1, "unpaired": 0}) for n in "ab"],
            tmp_path,
            2,
            lambda job: None,
            start,
        )
    assert started[0].poll() == -signal.SIGKILL


# --- a cell ---


def config(
    needs: dict[str, Any], *arguments: Any, rates: dict[str, float] | None = None, **changes: Any
) -> TrainConfig:
    return experiments.configure(spec(*arguments, **changes), needs, Path("nowhere"), rates or {})


def test_arms_of_a_table_differ_in_nothing_but_themselves(needs: dict[str, Any]) -> None:
    trained, frozen = config(needs, ZIP), config(needs, FROZEN)
    assert (trained.train, frozen.train) == (("speech",), ())
    assert dataclasses.replace(trained, train=()) == frozen
    same = (
        "steps",
        "rows",
        "data",
        "dev",
        "batch",
        "tasks",
        "seed",
        "eval_every",
        "patience",
        "corrupt",
        "warmup",
        "towers",
    )
    for arm in ARMS:
        other = config(needs, arm)
        assert {name: getattr(other, name) for name in same} == {
            name: getattr(trained, name) for name in same
        }, arm


def test_fewer_pairs_are_the_first_of_more(needs: dict[str, Any]) -> None:
    few, many = config(needs, pairs=8), config(needs, pairs=24)
    assert (few.rows, many.rows) == (8, 24) and dataclasses.replace(few, rows=24) == many


def test_rates_that_were_found_are_used_and_a_change_has_the_last_word(
    needs: dict[str, Any],
) -> None:
    base, other = (
        config(needs),
        config(
            needs, rates={"lr_new": 7e-3, "lr_tower": 2e-5}, patience=7, link={"gate_init": 0.0}
        ),
    )
    assert (other.lr_new, other.lr_tower, other.lr_gate) == (7e-3, 2e-5, base.lr_gate)
    assert other.patience == 7 and other.link == dataclasses.replace(base.link, gate_init=0.0)


def test_the_matched_baseline_has_as_many_parameters_as_the_zip(
    needs: dict[str, Any], tmp_path: Path
) -> None:
    sizes = []
    for arm in (ZIP, "baseline, matched", "baseline"):
        found = experiments.run_cell(spec(arm), needs, tmp_path / arm)
        sizes.append(found["parameters"]["total"])
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and sizes[2] < sizes[0]


def test_a_cell_is_trained_and_evaluated(needs: dict[str, Any], tmp_path: Path) -> None:
    found = Result.from_dict(
        experiments.run_cell(spec(tables=("figure3", "towers")), needs, tmp_path / "run")
    )
    assert json.loads(json.dumps(dataclasses.asdict(found)))["cell"]["arm"] == ZIP
    texts = [row["text"] for row in tiny.pairs(5, seed=2)]
    assert [(s.task, s.test, s.judge) for s in found.scores] == [
        ("asr", "commands", "exact comparison"),
        ("tts", "commands", "own recogniser"),
        ("asr", "commands-noisy", "exact comparison"),
    ]
    for score in found.scores:
        assert score.words == [len(text.split()) for text in texts] and score.characters == [
            len(text) for text in texts
        ]
        assert len(score.edits) == 5 and 0 <= score.unended <= 1
    assert found.steps == 2 and found.best_step in (1, 2) and {*found.dev} == {*experiments.TASKS}
    assert found.rates == needs["rate"]["rates"]
    assert found.parameters["new"] < found.parameters["trained"] < found.parameters["total"]
    text, speech = found.perplexity["text"], found.perplexity["speech"]
    assert text["identical"] == 1 and text["before"] == text["after"] != text["zip"]
    assert speech["identical"] == 0 and speech["before"] != speech["after"]
    assert (
        found.continuations["before"] == found.continuations["after"]
        and len(found.continuations["before"]) == 3
    )


def test_a_training_that_was_told_to_stop_gives_no_result(
    needs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiments.train

    def told_to_stop(config: TrainConfig, **others: Any) -> Any:
        return whole(config, report=lambda row: signal.raise_signal(signal.SIGTERM), **others)

    monkeypatch.setattr(experiments, "train", told_to_stop)
    with pytest.raises(Stopped):
        experiments.run_cell(spec(steps=6, eval_every=1), needs, tmp_path / "run")
    monkeypatch.setattr(experiments, "train", whole)
    assert experiments.run_cell(spec(steps=6, eval_every=1), needs, tmp_path / "run")["steps"] == 6


@pytest.mark.slow
def test_the_search_takes_the_rate_with_the_least_dev_loss(
    needs: dict[str, Any], tmp_path: Path
) -> None:
    tried = [
        {"lr_new": 0.0, "lr_tower": 0.0},
        {"lr_new": 2e-3, "lr_tower": 5e-4},
        {"lr_new": 1.0, "lr_tower": 0.5},
    ]
    found = experiments.search_rates(spec(steps=3) | {"tried": tried, "near": 0.0}, needs, tmp_path)
    assert len(found["dev"]) == 3 and min(found["dev"]) == found["dev"][1]
    assert found["rates"] == tried[1]
    assert (
        experiments.search_rates(spec(steps=3) | {"tried": tried, "near": 9.0}, needs, tmp_path)[
            "rates"
        ]
        == tried[0]
    )


def test_oracle_and_floor_stand_beside_every_test_set(
    needs: dict[str, Any], tmp_path: Path
) -> None:
    found = {
        arm: Result.from_dict(r) for arm, r in experiments.references({}, needs, tmp_path).items()
    }
    assert {arm: r.cell.arm for arm, r in found.items()} == {"oracle": "oracle", "floor": "floor"}
    assert {(s.task, s.test) for s in found["floor"].scores} == {
        ("asr", "commands"),
        ("tts", "commands"),
        ("asr", "commands-noisy"),
    }
    assert {s.judge for s in found["oracle"].scores} == {"own recogniser", "pocketsphinx"}
    assert all(sum(s.edits) > 0 for s in found["floor"].scores)


def test_a_worker_writes_what_it_found(needs: dict[str, Any], tmp_path: Path) -> None:
    given = {"kind": "corpus", "name": "c", "core_s": 1.0, "found": needs["corpus"]}
    (tmp_path / "corpus.json").write_text(json.dumps(given))
    alone = {
        "tower": "text-S",
        "shape": tiny.shape(),
        "steps": 2,
        "batch": 4,
        "mixed_precision": "no",
    }
    told = {
        "kind": "tower",
        "name": "t",
        "spec": alone,
        "folder": str(tmp_path / "run"),
        "result": str(tmp_path / "towers" / "t.json"),
    }
    (tmp_path / "told.json").write_text(
        json.dumps(told | {"needs": [str(tmp_path / "corpus.json")]})
    )
    experiments.work(str(tmp_path / "told.json"))
    written = json.loads((tmp_path / "towers" / "t.json").read_text())
    assert written["kind"] == "tower" and written["core_s"] > 0
    assert (Path(written["found"]["text-S"]) / "config.json").is_file()
