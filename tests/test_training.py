"""Training: it learns, it harms no frozen tower, it can be killed anywhere, and every number in it
is what its name says."""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import World
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint
from zipper.saving.files import HELD
from zipper.strand import Segment, collate
from zipper.tasks import Task
from zipper.tower import Tower
from zipper.training import Stopped, TrainConfig, batches, build, loop, train
from zipper.training.batches import Drawn, Steps
from zipper.training.config import FREE
from zipper.training.loop import drawn
from zipper.training.resume import checkpoints, course_of, finished, forget, step_folder

ASR, TTS = tiny.BOTH


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without how fast it went."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in loop.CLOCK} for row in rows]


def state(output: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds: parameters and the moments of the optimizer."""
    return load_file(output / "checkpoints" / f"step-{step:07d}" / "training.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- it learns


def test_a_tower_learns_alone_and_a_zip_learns_what_no_tower_knows(
    world: World, tmp_path: Path
) -> None:
    alone = world.config(
        tmp_path / "text",
        towers={"text": tiny.shape()},
        modalities={"text": str(world.folder / "text")},
        tasks={"-> text": 1.0},
        train=(),
        steps=40,
        batch=8,
        log_every=5,
        eval_every=40,
        lr_tower=1e-2,
    )
    train(alone)
    first, *_, last = [row["loss/text"] for row in metrics(tmp_path / "text") if "loss/text" in row]
    assert last < first - 1.5
    base = tmp_path / "text" / "model" / "towers" / "text"
    before = Tower.load(base).digest()

    zipped = world.config(
        tmp_path / "zip",
        towers={"text": str(base), "speech": str(world.folder / "speech" / "tower")},
        steps=60,
        batch=8,
        log_every=5,
        eval_every=60,
        lr_new=1e-2,
        lr_tower=1e-2,
    )
    pipeline = train(zipped)
    rows = [row for row in metrics(tmp_path / "zip") if "loss/speech" in row]
    assert rows[-1]["loss/speech"] < rows[0]["loss/speech"] - 1.5
    # The text tower is frozen: only by reading the speech can the loss get below what it reaches
    # alone.
    assert rows[-1][f"dev/{ASR}"] < metrics(tmp_path / "text")[-1]["dev/-> text"] - 0.1

    towers = {
        name: tower for name, tower in pipeline.model.towers.items() if isinstance(tower, Tower)
    }
    assert towers["text"].digest() == before == Tower.load(base).digest()
    assert towers["speech"].digest() != Tower.load(world.folder / "speech" / "tower").digest()


def test_what_is_returned_and_saved_is_the_best_by_dev_loss(world: World, tmp_path: Path) -> None:
    # Far too fast: it gets worse.
    train(world.config(tmp_path, steps=8, eval_every=1, lr_new=0.3, lr_tower=0.3, warmup=4))
    losses = {
        row["step"]: (row[f"dev/{ASR}"] + row[f"dev/{TTS}"]) / 2
        for row in metrics(tmp_path)
        if f"dev/{ASR}" in row
    }
    best = min(losses, key=lambda step: losses[step])
    record = checkpoint.load(tmp_path / "model")[1]
    assert record["step"] == best < 8
    assert (record["dev"][ASR] + record["dev"][TTS]) / 2 == losses[best]
    assert record["recipe"]["steps"] == 8


def test_early_stopping_stops_and_stays_stopped(world: World, tmp_path: Path) -> None:
    config = world.config(
        tmp_path, steps=50, eval_every=2, patience=3, lr_new=0.0, lr_gate=0.0, lr_tower=0.0
    )
    train(config)
    # The best at 2, then three evaluations that are no better.
    assert metrics(tmp_path)[-1]["step"] == 8
    before = metrics(tmp_path)
    train(config, resume=True)
    assert metrics(tmp_path) == before


# --- it can be killed anywhere

RESUMED = {
    "steps": 14,
    "log_every": 3,
    "eval_every": 5,
    "save_every": 4,
    "keep": 3,
    "link": LinkConfig(head_width=16, gate_init=0.6, dropout=0.2),
    "corrupt": {"speech": 0.3},
}


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("unbroken")
    train(world.config(output, **RESUMED))
    return output


def same(a: Path, b: Path) -> bool:
    """Two runs came to the same end, by the same way."""
    models = [load_file(f / "model" / "zip.safetensors") for f in (a, b)]
    towers = [load_file(f / "model" / "towers" / "speech" / "model.safetensors") for f in (a, b)]
    return (
        equal(state(a, 14), state(b, 14))
        and equal(*models)
        and equal(*towers)
        and metrics(a) == metrics(b)
    )


class Killed(Exception):
    """Power is gone."""


def killing(*steps: int) -> Callable[[dict[str, Any]], None]:
    def report(row: dict[str, Any]) -> None:
        if row["step"] in steps:
            raise Killed

    return report


# 3: before any checkpoint; 5: after an evaluation, between two rows of losses; 12: metrics written,
# checkpoint not.
@pytest.mark.parametrize("kills", [(3,), (5,), (9, 10), (12,)])
def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(
    world: World, unbroken: Path, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    config = world.config(tmp_path, **RESUMED)
    for number, step in enumerate(kills):
        with pytest.raises(Killed):
            train(config, resume=number > 0, report=killing(step))
    train(config, resume=True)
    assert same(tmp_path, unbroken)


def test_a_run_killed_while_it_wrote_metrics_or_a_checkpoint_goes_on(
    world: World, unbroken: Path, tmp_path: Path
) -> None:
    config = world.config(tmp_path, **RESUMED)
    with pytest.raises(Killed):
        train(config, report=killing(9))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "dev/spee')
    half = tmp_path / "checkpoints" / ".step-0000012.zipper-new.abcdefgh"
    half.mkdir()
    train(config, resume=True)
    assert same(tmp_path, unbroken)
    assert not half.exists()


@pytest.mark.slow
def test_a_calibrated_run_is_killed_and_resumed_like_any_other(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = RESUMED | {"start": str(world.zip), "calibrate": 20}
    train(world.config(tmp_path / "unbroken", **changes))
    with pytest.raises(Killed):
        train(world.config(tmp_path / "killed", **changes), report=killing(6))
    # On another machine the whitening may come out otherwise (an eigenvector has two signs): the
    # one of the checkpoint counts.
    calibrate = Zipper.calibrate

    def otherwise(model: Zipper, strands: Any) -> None:
        calibrate(model, strands)
        for link in model.links.values():
            torch.nn.init.eye_(link.whiten.weight)

    monkeypatch.setattr(Zipper, "calibrate", otherwise)
    train(world.config(tmp_path / "killed", **changes), resume=True)
    assert same(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.slow
def test_a_run_on_takes_some_of_which_say_nothing_is_resumed_like_any_other(
    world: World, tmp_path: Path
) -> None:
    for name in ("pairs", "dev"):
        rows = data.manifest(world.folder / f"{name}.jsonl")
        takes = [
            row
            | {
                "heard:speech": row["speech"][n % 3 :] if n % 4 else [],
                "said:text": row["text"] if n % 4 else "",
            }
            for n, row in enumerate(rows)
        ]
        data.write(tmp_path / f"{name}.jsonl", takes)
    tasks = {"heard:speech -> said:text": 0.5, TTS: 0.5}
    changes = RESUMED | {
        "data": str(tmp_path / "pairs.jsonl"),
        "dev": str(tmp_path / "dev.jsonl"),
        "tasks": tasks,
    }
    train(world.config(tmp_path / "unbroken", **changes))
    with pytest.raises(Killed):
        train(world.config(tmp_path / "killed", **changes), report=killing(6))
    train(world.config(tmp_path / "killed", **changes), resume=True)
    assert same(tmp_path / "killed", tmp_path / "unbroken")
    with pytest.raises(
        ZipperError,
        match=r"The task wants a field 'heard', the row has \['speech', 'text', 'voice'\]",
    ):
        train(world.config(tmp_path / "clean", tasks=tasks))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("damage", "keep"), [("flip", 1), ("cut", 3), ("manifest", 3)])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    world: World, unbroken: Path, tmp_path: Path, damage: str, keep: int
) -> None:
    config = world.config(tmp_path, **(RESUMED | {"keep": keep}))
    with pytest.raises(Killed):
        train(config, report=killing(10))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000004", "step-0000008"][-keep:]
    newest = tmp_path / "checkpoints" / "step-0000008"
    if damage == "flip":
        flip(newest / "training.safetensors")
    elif damage == "cut":
        (newest / "training.safetensors").write_bytes(
            (newest / "training.safetensors").read_bytes()[:-100]
        )
    else:
        (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="not whole.*step-0000008"):
        train(config, resume=True)  # from step 4, or from the beginning
    assert same(tmp_path, unbroken)
    checkpoint.check(tmp_path / "checkpoints" / "step-0000014")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts; a process in the background of a script does not hear it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_a_signal_saves_a_checkpoint_and_ends_with_its_number(
    world: World,
    unbroken: Path,
    tmp_path: Path,
    number: signal.Signals,
    workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = world.config(tmp_path, **RESUMED, workers=workers)

    def ask(row: Mapping[str, Any], step: int) -> None:
        """All processes of the run, as a scheduler and a terminal do."""
        children = multiprocessing.active_children()
        assert len(children) == workers
        if row["step"] == step:
            for pid in (*(child.pid for child in children), os.getpid()):
                os.kill(pid or 0, number)

    before = signal.getsignal(number)
    for step in (3, 10):  # the second run of a process hears it as well
        # Nobody takes a half-trained model for a whole one.
        with pytest.raises(SystemExit) as stopped:
            train(
                config,
                resume=step > 3,
                report=functools.partial(ask, step=step),
            )
        assert isinstance(stopped.value, Stopped)
        assert stopped.value.code == 128 + number
        said = capfd.readouterr().err
        assert f"by {number.name}; go on with resume" in said
        assert ("Ctrl-C again ends at once" in said) == (number == signal.SIGINT)
        assert sorted((tmp_path / "checkpoints").iterdir())[-1].name in (
            f"step-{step:07d}",
            f"step-{step + 1:07d}",
        )
        assert signal.getsignal(number) is before
    train(config, resume=True)
    assert same(tmp_path, unbroken)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_interrupts_and_what_others_hear_stays_theirs() -> None:
    with pytest.raises(KeyboardInterrupt), loop.asked_to_stop() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    with loop.asked_to_stop() as came:
        signal.raise_signal(signal.SIGINT)
    assert came == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_sigterm_in_the_last_step_changes_nothing(world: World, tmp_path: Path) -> None:
    def report(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(world.config(tmp_path, steps=3, log_every=3), report=report).model
    assert (tmp_path / "checkpoints" / "step-0000003").exists()


def test_checkpoints_are_in_order_beyond_seven_digits(tmp_path: Path) -> None:
    for step in (9_999_998, 9_999_999, 10_000_000, 10_000_002):
        step_folder(tmp_path, step).mkdir(parents=True)
    assert checkpoints(tmp_path)[-2:] == [
        step_folder(tmp_path, 10_000_000),
        step_folder(tmp_path, 10_000_002),
    ]


def test_a_run_outside_the_main_thread_works_without_signals(world: World, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(world.config(tmp_path, steps=1),))
    thread.start()
    thread.join()
    assert [row["step"] for row in metrics(tmp_path)] == [1]


def test_a_second_start_in_the_same_folder_is_refused(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, steps=1)
    train(config)
    with pytest.raises(ZipperError, match=r"holds a run already. Pass --resume"):
        train(config)


def test_a_checkpoint_of_another_recipe_is_refused(world: World, tmp_path: Path) -> None:
    train(world.config(tmp_path, steps=1))
    wider = world.config(tmp_path, steps=1, link=LinkConfig(head_width=16, feedforward=2.0))
    with pytest.raises(
        ZipperError, match=r"step-0000001 was made by another recipe: other link .link was"
    ):
        train(wider, resume=True)


TURNED = dict(reversed(tiny.BOTH.items()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 9}, r"steps \(steps was 2, is 9\)"),
        ({"lr_tower": 0.5, "seed": 1}, r"lr_tower, seed \(lr_tower was 0.001, is 0.5\)"),
        ({"train": ("text", "speech")}, "learns, train "),  # the freeze set
        ({"rows": 40}, "data, rows "),
        ({"eval_rows": 4}, "dev, eval_rows "),
        ({"frozen_dtype": "bfloat16"}, "frozen_dtype "),
        ({"tasks": TURNED}, "tasks "),  # by whose order they are drawn
    ],
)
def test_a_run_is_not_resumed_with_another_recipe(
    world: World, one_step: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    before = metrics(tmp_path)
    with pytest.raises(
        ZipperError, match=f"was made by another recipe: other {named}.*Resume with the old recipe"
    ):
        train(world.config(tmp_path, **{"steps": 2, **changes}), resume=True)
    assert metrics(tmp_path) == before


@pytest.fixture(scope="module")
def one_step(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, killed after the first."""
    output = tmp_path_factory.mktemp("one")
    with pytest.raises(Killed):
        train(world.config(output, steps=2, save_every=1, log_every=1), report=killing(2))
    return output


def told_otherwise(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Its checkpoint as an older zipper would have written it."""
    folder = run / "checkpoints" / "step-0000001"
    said = json.loads((folder / "zipper.json").read_text())
    change(said)
    checkpoint.write_json(folder / "zipper.json", said)
    (folder / "manifest.json").unlink()
    checkpoint.seal(folder)


def test_a_checkpoint_that_does_not_say_its_recipe_is_taken_at_its_shapes(
    world: World, one_step: Path, tmp_path: Path
) -> None:
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    told_otherwise(tmp_path, lambda said: said.pop("course"))
    train(world.config(tmp_path, steps=3), resume=True)
    assert metrics(tmp_path)[-1]["step"] == 3


def test_what_an_older_recipe_did_not_know_of_was_nothing(
    world: World, one_step: Path, tmp_path: Path
) -> None:
    def older(said: dict[str, Any]) -> None:
        assert said["course"].pop("start") is None
        said["course"]["gone"] = None

    shutil.copytree(one_step, tmp_path / "a")
    shutil.copytree(one_step, tmp_path / "b")
    told_otherwise(tmp_path / "a", older)
    train(world.config(tmp_path / "a", steps=2), resume=True)
    assert metrics(tmp_path / "a")[-1]["step"] == 2
    told_otherwise(tmp_path / "b", lambda said: said["course"].pop("lr_new"))
    with pytest.raises(ZipperError, match=r"other lr_new \(lr_new was None, is"):
        train(world.config(tmp_path / "b", steps=2), resume=True)


def test_what_a_run_will_do_again_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        step_folder(tmp_path, step).mkdir(parents=True)
    for place in (tmp_path, tmp_path / "checkpoints"):
        (place / ".model.zipper-new.abcdefgh").mkdir()  # half written
    rows = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 3}\n', '{"st']
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    forget(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl"}
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert left == [step_folder(tmp_path, 1), step_folder(tmp_path, 2)]


@pytest.mark.parametrize(
    "changes",
    [{"link": LinkConfig(head_width=16, feedforward=2.0)}, {"train": ("text", "speech")}],
    ids=["of another shape", "not there"],
)
def test_parameters_that_a_checkpoint_does_not_have_like_this_are_named(
    world: World, one_step: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    told_otherwise(tmp_path, lambda said: said.pop("course"))
    with pytest.raises(ZipperError, match=r"another recipe: (links|towers)\..* differs"):
        train(world.config(tmp_path, steps=2, **changes), resume=True)


def test_a_run_is_finished_at_its_last_step_and_where_it_stopped(
    world: World, one_step: Path, tmp_path: Path
) -> None:
    config = world.config(tmp_path, steps=2)
    assert not finished(config)  # nothing is there
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    assert not finished(config)
    told_otherwise(tmp_path, lambda said: said.update(step=2))
    assert finished(config)
    told_otherwise(tmp_path, lambda said: said.update(step=1, stopped=True))
    assert finished(config)


def test_a_checkpoint_of_before_tasks_had_an_order_goes_on(
    world: World, one_step: Path, tmp_path: Path
) -> None:
    def without_order(said: dict[str, Any]) -> None:
        said["course"] |= {name: dict(said["course"][name]) for name in ("tasks", "data")}

    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    told_otherwise(tmp_path, without_order)
    with pytest.raises(ZipperError, match="another recipe: other tasks "):
        train(world.config(tmp_path, steps=2, tasks=TURNED), resume=True)
    train(world.config(tmp_path, steps=2), resume=True)
    assert metrics(tmp_path)[-1]["step"] == 2


class Broken(Steps):
    def __getitem__(self, step: int) -> Drawn:
        raise ZipperError("a row that cannot be read")


def test_an_error_in_a_worker_ends_the_workers(world: World, tmp_path: Path) -> None:
    """They hear no SIGTERM: a process that ends would wait for them for ever."""
    coming = drawn(Broken((), {}, world.config(tmp_path, workers=2), {}), 0)
    with pytest.raises(ZipperError, match="cannot be read") as kept:
        next(coming)
    left = multiprocessing.active_children()
    for child in left:  # else this process would not end either
        child.kill()
    assert not left, kept.traceback


class Counted(Steps):
    def __getitem__(self, step: int) -> Any:
        return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_go_on_when_their_run_is_asked_to_end(
    world: World, tmp_path: Path, number: signal.Signals
) -> None:
    config = world.config(tmp_path, workers=2, steps=40)
    with contextlib.closing(drawn(Counted((), {}, config, {}), 0)) as coming:
        first = [next(coming), next(coming)]  # one of each: both have begun
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, number)
        assert [*first, *coming] == [*range(40)]


def test_what_no_packed_row_has_room_for_is_said_before_the_first_step(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path / "run", pack={"speech": 6})
    with pytest.raises(
        ZipperError, match=r"pairs.jsonl, row \d+: it has \d+ tokens of 'speech'; a"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


class Still:
    """A zip of which nothing learns."""

    course: Mapping[str, Any] = {}

    def __call__(self, *given: Any) -> Zipper:
        return build(*given).requires_grad_(False)


def test_a_recipe_in_which_nothing_learns_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="Nothing learns in this recipe"):
        train(world.config(tmp_path / "run"), build=Still())
    assert not (tmp_path / "run").exists()


def test_a_task_by_which_nothing_would_learn_is_refused_where_a_run_goes_on(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path / "run", start=str(world.zip), tasks={"-> text": 1.0}, train=())
    with pytest.raises(ZipperError, match="for 'text' alone, which is frozen"):
        train(dataclasses.replace(config, every=None, corrupt={}, loss_weight={}))
    assert not (tmp_path / "run").exists()


def test_files_are_known_by_what_is_in_them_not_by_where_they_lie(
    world: World, one_step: Path, tmp_path: Path
) -> None:
    shutil.copytree(one_step, tmp_path / "run")
    shutil.copytree(world.folder, tmp_path / "moved")
    moved = World(tmp_path / "moved").config(tmp_path / "run", steps=2)
    lines = (tmp_path / "moved" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "moved" / "pairs.jsonl").write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(ZipperError, match="another recipe: other data "):
        train(moved, resume=True)
    (tmp_path / "moved" / "pairs.jsonl").write_text("".join(lines))
    train(dataclasses.replace(moved, save_every=7, recompute=True), resume=True)
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_what_a_resumed_run_may_change_leaves_its_numbers_alone(
    world: World, tmp_path: Path
) -> None:
    other = {
        "log_every": 1,
        "save_every": 2,
        "keep": 1,
        "recompute": True,
        "shard": True,
        "save_dtype": "float16",
        "accumulate": 2,
        "together": True,
        "workers": 2,
    }
    assert {*other, "output", "trackers", "compile", "attention", "freeze"} == {*FREE}
    train(world.config(tmp_path / "a", input_projection="residual"))
    train(world.config(tmp_path / "b", input_projection="residual", **other))
    a, b = state(tmp_path / "a", 6), state(tmp_path / "b", 6)
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=2e-6, rtol=1e-4, msg=name)


def test_a_run_may_go_on_from_a_saved_zip(world: World, tmp_path: Path) -> None:
    still = {"start": str(world.zip), "steps": 1, "lr_new": 0.0, "lr_gate": 0.0, "lr_tower": 0.0}
    before = Zipper.from_pretrained(world.zip)
    same_weights = train(world.config(tmp_path / "same", **still)).model.state_dict()
    assert all(torch.equal(same_weights[name], p) for name, p in before.state_dict().items())
    calibrated = train(world.config(tmp_path / "calibrated", **still, calibrate=20)).model
    assert not torch.equal(
        calibrated.state_dict()["links.0:text>speech.whiten.weight"], torch.eye(32)
    )
    strands = collate(
        [[Segment("text", [3, 4, 5]), Segment("speech", [6, 7, 8])]], before.ends()
    ).strands
    torch.testing.assert_close(
        calibrated(strands)["speech"], before(strands)["speech"], atol=1e-4, rtol=1e-4
    )

    one = {
        "towers": {"text": tiny.shape()},
        "modalities": {"text": str(world.folder / "text")},
        "tasks": {"-> text": 1.0},
        "train": (),
    }
    with pytest.raises(
        ZipperError, match=r"has the towers \['speech', 'text'\], this recipe \['text'\]"
    ):
        train(world.config(tmp_path / "one", start=str(world.zip), **one))
    tiny.units(seed=5).save(tmp_path / "speech")
    foreign = {"text": str(world.folder / "text"), "speech": str(tmp_path / "speech")}
    with pytest.raises(
        ZipperError, match=r"'speech' from .* trained with another tokenizer or codebook"
    ):
        train(world.config(tmp_path / "foreign", start=str(world.zip), modalities=foreign))
    own = {"links": [("text", 0, "speech", 1)], "junctions": [{"text": 1, "speech": 1}]}
    with pytest.raises(ZipperError, match=r"links of its own, and this recipe asks .* by links"):
        train(world.config(tmp_path / "links", start=str(world.zip), links=own["links"]))
    asked = {"junctions": own["junctions"], "shows": None}  # those that it has
    assert train(world.config(tmp_path / "asked", start=str(world.zip), steps=1, **asked)).zip


# --- its numbers are what their names say


def zip_of(world: World, config: TrainConfig) -> tuple[Zipper, list[data.Row]]:
    modalities = {"text": tiny.text(), "speech": tiny.units()}
    rows = data.read(Path(config.data), modalities)
    return build(config, modalities, rows), rows


def test_the_loss_is_the_global_mean_per_tower_whatever_the_tasks_of_a_batch(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path, batch=8, steps=1, loss_weight={"text": 0.5})
    model, rows = zip_of(world, config)
    tasks = {name: Task.parse(name) for name in config.tasks}
    (found,), counts = batches.Steps([batches.Part("", rows, 1.0)], tasks, config, model.ends())[0]
    assert len(found) == 2
    # One sample at a time: the tokens of all samples in one list per tower, then their mean.
    each: dict[str, list[Tensor]] = {"text": [], "speech": []}
    for batch in found:
        produced = "text" if (batch.weights["text"] > 0).any() else "speech"
        for n in range(len(batch.targets["text"])):
            sample = {
                name: dataclasses.replace(
                    s, **{f.name: getattr(s, f.name)[n : n + 1] for f in dataclasses.fields(s)}
                )
                for name, s in batch.strands.items()
            }
            logits, ids = model(sample)[produced][0], sample[produced].ids[0]
            for place in range(int((sample[produced].document >= 0).sum()) - 1):
                each[produced].append(F.cross_entropy(logits[place], ids[place + 1]))
    assert {name: len(tokens) for name, tokens in each.items()} == counts
    text, speech = (torch.stack(each[name]).mean() for name in ("text", "speech"))
    gradients = torch.autograd.grad(
        0.5 * text + speech, [p for p in model.parameters() if p.requires_grad]
    )

    train(config)
    (row,) = metrics(tmp_path)
    assert row["loss/text"] == pytest.approx(float(text.detach()), rel=1e-5)
    assert row["loss/speech"] == pytest.approx(float(speech.detach()), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4
    )


def test_micro_batches_are_the_batch_cut_into_pieces(world: World, tmp_path: Path) -> None:
    """The first moments after one step are a tenth of the gradient."""
    config = world.config(tmp_path / "1", batch=9, steps=1, input_projection="residual", clip=1e9)
    model, rows = zip_of(world, config)
    tasks = {name: Task.parse(name) for name in config.tasks}
    train(config)
    whole = {
        name: t
        for name, t in state(tmp_path / "1", 1).items()
        if name.startswith("optimizer/exp_avg/")
    }
    assert len(whole) > 40
    for accumulate in (2, 4, 9):
        cut = dataclasses.replace(
            config, accumulate=accumulate, output=str(tmp_path / str(accumulate))
        )
        turns, counts = batches.Steps([batches.Part("", rows, 1.0)], tasks, cut, model.ends())[0]
        assert len(turns) == accumulate
        sizes = [sum(len(next(iter(batch.targets.values()))) for batch in turn) for turn in turns]
        assert sum(sizes) == 9
        assert max(sizes) - min(sizes) <= 1
        told = {
            name: sum(float(b.weights[name].sum()) for turn in turns for b in turn)
            for name in counts
        }
        assert told == counts
        train(cut)
        assert metrics(tmp_path / str(accumulate))[0] == pytest.approx(
            metrics(tmp_path / "1")[0], rel=1e-5
        )
        found = state(tmp_path / str(accumulate), 1)
        for name, gradient in whole.items():
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * float(
                gradient.abs().max()
            ), name


def test_dev_is_read_in_pieces_as_large_as_those_that_are_learnt(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, whole = list[int](), loop.collate

    def noted(samples: Any, ends: Any, **how: Any) -> Any:
        if how:
            read.append(len(samples))
        return whole(samples, ends, **how)

    monkeypatch.setattr(loop, "collate", noted)
    for accumulate, rows in ((1, 8), (4, 2)):
        read.clear()
        output = tmp_path / str(accumulate)
        train(world.config(output, steps=1, batch=8, accumulate=accumulate))
        assert max(read) == rows
    found = [metrics(tmp_path / name)[-1] for name in ("1", "4")]
    for key in (f"dev/{ASR}", f"dev/{TTS}"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4)


def test_what_is_computed_again_in_the_backward_pass_is_the_same_to_the_last_bit(
    world: World, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[bool]()
    forward = LlamaMLP.forward

    def counted(module: LlamaMLP, x: Tensor) -> Tensor:
        calls[module.training] += 1
        return forward(module, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    train(world.config(tmp_path / "kept", **RESUMED))
    once = calls.copy()
    # With dropout and corruption.
    train(world.config(tmp_path / "again", **(RESUMED | {"recompute": True})))
    assert same(tmp_path / "kept", unbroken)
    assert same(tmp_path / "again", unbroken)
    # Only the trained tower is ever in training mode. Its blocks run twice a step, those of the
    # frozen one where they have a graph.
    assert calls[True] - once[True] == 2 * once[True]
    assert calls[False] - once[False] > once[False]


def test_frozen_weights_may_be_kept_in_half_the_bytes(
    world: World, tmp_path: Path, unbroken: Path
) -> None:
    models: list[Zipper] = []

    class Kept:
        course: Mapping[str, Any] = {}

        def __call__(self, *given: Any) -> Zipper:
            models.append(build(*given))
            return models[-1]

    config = world.config(tmp_path, **(RESUMED | {"steps": 3, "frozen_dtype": "bfloat16"}))
    pipeline = train(config, build=Kept())
    kinds = {name: (p.requires_grad, p.dtype) for name, p in models[0].named_parameters()}
    assert {kind for name, kind in kinds.items() if name.startswith("towers.text")} == {
        (False, torch.bfloat16)
    }
    assert {kind for name, kind in kinds.items() if not name.startswith("towers.text")} == {
        (True, torch.float32)
    }
    assert {t.dtype for t in state(tmp_path, 3).values()} == {torch.float32}
    loss, exact = (metrics(output)[0]["loss/text"] for output in (tmp_path, unbroken))
    assert loss == pytest.approx(exact, rel=0.01)
    assert loss != exact
    # What is saved still names the tower that was given, and loads it as it is.
    given = Tower.load(world.folder / "text" / "tower")
    assert isinstance(pipeline.model, Zipper)
    assert pipeline.model.towers["text"].digest() == given.digest()  # type: ignore[operator]


@pytest.mark.slow
def test_compiled_blocks_learn_what_the_others_do(world: World, tmp_path: Path) -> None:
    changes = {"steps": 4, "log_every": 1, "input_projection": "residual"}
    train(world.config(tmp_path / "plain", **changes))
    train(world.config(tmp_path / "compiled", **changes, compile=True, recompute=True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_the_noise_of_a_step_depends_on_seed_and_step_alone(world: World, tmp_path: Path) -> None:
    def seeds(name: str, seed: int) -> list[int]:
        found: list[int] = []
        config = world.config(tmp_path / name, steps=4, log_every=1, seed=seed)
        train(config, report=lambda row: found.append(torch.initial_seed()))
        return found

    first = seeds("a", 0)
    assert len(set(first)) == 4
    assert seeds("b", 0) == first
    assert not {*seeds("c", 1)} & {*first}


def test_the_first_step_moves_each_group_by_its_own_rate(world: World, tmp_path: Path) -> None:
    rates = {"lr_new": 3e-3, "lr_gate": 1e-2, "lr_tower": 1e-4}
    config = world.config(
        tmp_path, steps=1, warmup=1, batch=16, weight_decay=0.0, clip=1e9, **rates
    )
    before, _ = zip_of(world, config)
    after = dict(train(config).model.named_parameters())
    for name, p in before.named_parameters():
        group = (
            "lr_gate"
            if name.endswith("gate")
            else "lr_new"
            if name.startswith("links")
            else "lr_tower"
        )
        # Adam's first step is the rate itself, up or down, wherever the gradient is not tiny.
        wanted = rates[group] if p.requires_grad else 0.0
        assert float((after[name] - p).detach().abs().max()) == pytest.approx(wanted, rel=0.01), (
            name
        )


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path, input_projection="residual")
    model, _ = zip_of(world, config)
    found = [
        (p, group)
        for group in loop.optimizer_of(model, config).param_groups
        for p in group["params"]
    ]
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    train(config)
    moments = {
        name.split("/", 2)[2] for name in state(tmp_path, 6) if name.startswith("optimizer/")
    }
    assert moments == {*trained.values()}  # nothing is kept for what is frozen
    assert Counter(id(p) for p, _ in found) == Counter(id(p) for p in trained)
    for p, group in found:
        assert group["weight_decay"] == (config.weight_decay if p.ndim > 1 else 0.0), trained[p]


def test_the_rate_rises_over_warmup_then_falls_on_a_cosine(world: World, tmp_path: Path) -> None:
    train(world.config(tmp_path, steps=6, warmup=2, log_every=1, lr_tower=1e-3, lr_final=0.1))
    found = [row["lr"] / 1e-3 for row in metrics(tmp_path)]
    root = math.sqrt(0.5)
    assert found == pytest.approx(
        [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root)]
    )


def test_text_shows_its_embeddings_unless_a_recipe_says_otherwise(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path)
    assert config.shows == "kind"
    found = zip_of(world, config)[0].config
    assert found.shows == tuple(junction | {"text": 0} for junction in found.junctions)
    assert zip_of(world, dataclasses.replace(config, shows=None))[0].config.shows is None
    said = zip_of(world, dataclasses.replace(config, shows={"speech": "before"}))[0].config
    assert said.shows is not None
    assert said.shows[0]["speech"] == 0
    assert [shown["text"] for shown in said.shows] == [j["text"] for j in said.junctions]
    links = [("text", 1, "speech", 1)]
    directed = zip_of(world, dataclasses.replace(config, every=None, links=links))[0].config
    assert directed.shows == ({"text": 1},)


@pytest.mark.parametrize("chance", [1.0, 0.3])
def test_corruption_changes_what_is_read_never_what_is_to_be_said(
    world: World, tmp_path: Path, chance: float
) -> None:
    config = world.config(tmp_path, corrupt={"speech": chance})
    model, rows = zip_of(world, config)
    task = Task(given=("text", "speech"), produced=("voice~speech",))
    clean = collate([task.segments(row) for row in rows], model.ends())
    torch.manual_seed(0)
    noisy = batches.corrupted(clean, config, model)
    for name in ("text", "speech"):
        assert torch.equal(noisy.targets[name], clean.targets[name])
        assert torch.equal(noisy.weights[name], clean.weights[name])
        for field in ("position", "time", "document"):
            assert torch.equal(
                getattr(noisy.strands[name], field), getattr(clean.strands[name], field)
            )
    assert torch.equal(noisy.strands["text"].ids, clean.strands["text"].ids)
    ids, weights = clean.strands["speech"].ids, clean.weights["speech"]
    changed = noisy.strands["speech"].ids != ids
    may = (weights > 0) & (ids != tiny.units().begin)
    assert not (changed & ~may).any()
    share = float(changed.sum() / may.sum())  # a random id is the old one once in 28 times
    assert share == pytest.approx(chance * 27 / 28, abs=4 * math.sqrt(0.25 / int(may.sum())))


def test_tasks_come_by_their_shares(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, tasks={ASR: 1.0, TTS: 3.0, "-> text": 0.0}, batch=8)
    model, rows = zip_of(world, config)
    tasks = {name: Task.parse(name) for name in config.tasks}
    found = {"text": 0, "speech": 0}
    steps = batches.Steps([batches.Part("", rows, 1.0)], tasks, config, model.ends())
    steps = pickle.loads(pickle.dumps(steps))  # as a worker gets it that is not forked
    for step in range(50):
        (drawn,), _ = steps[step]
        for batch in drawn:
            assert set(batch.strands) == {"text", "speech"}  # never "-> text"
            found["text" if (batch.weights["text"] > 0).any() else "speech"] += len(
                batch.targets["text"]
            )
    assert sum(found.values()) == 400
    assert found["text"] == pytest.approx(100, abs=4 * math.sqrt(400 * 0.25 * 0.75))


def test_a_source_is_for_the_tasks_whose_fields_it_has(world: World, tmp_path: Path) -> None:
    """Text alone beside pairs, and what a model made of texts: each row is for the tasks it can be
    for, by their shares."""
    pairs = data.manifest(world.folder / "pairs.jsonl")
    parts = {
        "pairs": pairs[:40],
        "alone": [{"text": row["text"]} for row in pairs[40:60]],
        "made": [{"text": row["text"], "made:speech": row["speech"]} for row in pairs[60:]],
    }
    for name, rows in parts.items():
        data.write(tmp_path / f"{name}.jsonl", rows)
    sources = {str(tmp_path / f"{name}.jsonl"): 1.0 for name in parts}
    tasks = {ASR: 0.2, TTS: 0.2, "-> text": 0.2, "made:speech -> text": 0.4}
    with pytest.raises(ZipperError, match="'-> text' is for 'text' alone, which is frozen"):
        world.config(tmp_path / "a", data=sources, tasks=tasks)
    config = world.config(
        tmp_path / "a",
        train=("text", "speech"),
        data=sources,
        tasks=tasks,
        batch=30,
        **{key: value for key, value in RESUMED.items() if key != "link"},
    )
    with pytest.warns(UserWarning, match="dev.jsonl lacks what 'made:speech -> text' wants"):
        train(config)
    judged = {key for row in metrics(tmp_path / "a") for key in row if key.startswith("dev/")}
    assert judged == {f"dev/{name}" for name in tasks} - {"dev/made:speech -> text"}
    with pytest.raises(Killed), pytest.warns(UserWarning):
        train(dataclasses.replace(config, output=str(tmp_path / "b")), report=killing(6))
    with pytest.warns(UserWarning):
        train(dataclasses.replace(config, output=str(tmp_path / "b")), resume=True)
    assert same(tmp_path / "a", tmp_path / "b")

    modalities = {"text": tiny.text(), "speech": tiny.units()}
    read = {
        name: data.read(Path(source), modalities)
        for source, name in zip(sources, parts, strict=True)
    }
    model = build(config, modalities, [*chain(*read.values())])
    steps = batches.Steps(
        [batches.Part(name, rows, 1.0) for name, rows in read.items()],
        {name: Task.parse(name) for name in tasks},
        config,
        model.ends(),
    )
    shares: Counter[str] = Counter()
    for step in range(60):
        (drawn,), _ = steps[step]
        for batch in drawn:  # a task each: said by what has a loss, and what is read beside it
            learnt = [name for name, weight in batch.weights.items() if (weight > 0).any()]
            shares[" ".join([*batch.strands, "->", *learnt])] += len(batch.targets["text"])
    assert sum(shares.values()) == 1800
    wanted = {
        "text -> text": 600 + 600 / 3 + 600 / 3,  # all of those alone; a third of both others
        "speech text -> text": 600 / 3 + 600 * 2 / 3,  # pairs' speech, and what was made
        "text speech -> speech": 600 / 3,
    }
    assert shares.keys() == wanted.keys()
    for name, count in wanted.items():
        assert shares[name] == pytest.approx(count, abs=4 * math.sqrt(600 * 2 / 9)), name

    data.write(tmp_path / "none.jsonl", [{"speech": [5, 6]}])
    with pytest.raises(ZipperError, match=r"none.jsonl, row 1: .*wants a field 'text'"):
        train(
            dataclasses.replace(
                config,
                output=str(tmp_path / "c"),
                data=sources | {str(tmp_path / "none.jsonl"): 1.0},
            )
        )
    with pytest.raises(ZipperError, match=r"pairs.jsonl, row 1: .*wants a field 'other'"):
        train(
            dataclasses.replace(
                config, output=str(tmp_path / "d"), tasks=tasks | {"other:text -> speech": 0.1}
            )
        )


@pytest.mark.parametrize(("rows", "batch"), [(64, 4), (128, 4), (50, 4), (7, 3), (3, 5)])
def test_an_epoch_is_a_permutation_and_depends_on_seed_and_step_alone(
    rows: int, batch: int
) -> None:
    samples = [{"text": [n] * (1 + n % 5)} for n in range(rows)]
    order = [
        [
            samples.index(row)
            for row in batches.order([batches.Part("", samples, 1.0)], batch, step, seed=3)
        ]
        for step in range(5 * batches.POOL)
    ]
    assert all(len(step) == batch for step in order)
    # After each pool every row was read equally often, give or take the epoch that is under way.
    for pools in range(1, 6):
        read = Counter(n for step in order[: pools * batches.POOL] for n in step)
        often = pools * batches.POOL * batch // rows
        assert set(read.values()) <= {often, often + 1}
        assert often == 0 or len(read) == rows
    assert [
        samples.index(row)
        for row in batches.order([batches.Part("", samples, 1.0)], batch, 40, seed=3)
    ] == order[40]
    if rows == 128:  # two pools are an epoch; the next one is another permutation
        assert {n for step in order[:16] for n in step} != {
            n for step in order[32:48] for n in step
        }
    if rows > 5:
        assert [
            [
                samples.index(row)
                for row in batches.order([batches.Part("", samples, 1.0)], batch, step, seed=4)
            ]
            for step in range(5)
        ] != order[:5]
        assert order[: batches.POOL] != order[batches.POOL : 2 * batches.POOL]


def test_the_rows_of_a_batch_are_of_like_length() -> None:
    samples = [{"text": [0] * n} for n in range(64)]
    for step in range(16):
        lengths = [
            len(row["text"])
            for row in batches.order([batches.Part("", samples, 1.0)], 4, step, seed=0)
        ]
        assert max(lengths) - min(lengths) == 3  # all 64 rows are one pool, sorted and cut


@pytest.fixture
def bf16() -> Iterator[None]:
    """accelerate keeps the precision of the first run in a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_a_step_in_bfloat16_keeps_weights_in_float32(
    world: World, unbroken: Path, tmp_path: Path, bf16: None
) -> None:
    train(world.config(tmp_path, **(RESUMED | {"steps": 3, "mixed_precision": "bf16"})))
    found, exact = state(tmp_path, 3), metrics(unbroken)[0]
    assert all(
        tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in found.values()
    )
    loss = metrics(tmp_path)[0]["loss/speech"]
    assert loss == pytest.approx(exact["loss/speech"], rel=0.02)
    assert loss != exact["loss/speech"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_a_gpu_is_that_of_the_cpu_and_goes_on(
    world: World,
    tmp_path: Path,
    precision: str,
    gpu: torch.device,
    bf16: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to rounding: kernels of a GPU may add up in another order every time."""
    changes = RESUMED | {"corrupt": {}, "link": LinkConfig(head_width=16, gate_init=0.6)}
    train(world.config(tmp_path / "cpu", **changes))
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    changes |= {
        "mixed_precision": precision,
        "frozen_dtype": None if precision == "no" else "bfloat16",
    }
    assert Accelerator(mixed_precision=precision).device.type == gpu.type
    train(world.config(tmp_path / "gpu", **changes))
    with pytest.raises(Killed):
        train(world.config(tmp_path / "killed", **changes), report=killing(9))
    pipeline = train(world.config(tmp_path / "killed", **changes), resume=True)
    near = {"no": 1e-3, "bf16": 0.05}[precision]
    here, there, again = (metrics(tmp_path / name) for name in ("cpu", "gpu", "killed"))
    for cpu, one, other in zip(here, there, again, strict=True):
        losses = [key for key in cpu if key.startswith(("loss/", "dev/"))]
        assert [one[key] for key in losses] == pytest.approx([cpu[key] for key in losses], rel=near)
        assert [other[key] for key in losses] == pytest.approx(
            [one[key] for key in losses], rel=near
        )
    assert (
        pipeline.model.towers["text"].digest()
        == Tower.load(world.folder / "text" / "tower").digest()
    )  # type: ignore[operator]


def test_a_model_may_be_saved_in_half_precision(world: World, tmp_path: Path) -> None:
    pipeline = train(world.config(tmp_path, steps=1, save_dtype="float16"))
    saved = [*(tmp_path / "model").rglob("*.safetensors")]
    kinds = {path.name: {tensor.dtype for tensor in load_file(path).values()} for path in saved}
    assert kinds["zip.safetensors"] == kinds["model.safetensors"] == {torch.float16}
    assert {p.dtype for p in pipeline.model.parameters()} == {torch.float32}
    assert torch.equal(
        pipeline.model.state_dict()["links.0:text>speech.gate"],
        load_file(tmp_path / "model" / "zip.safetensors")["links.0:text>speech.gate"].float(),
    )


# --- what it leaves behind


def test_a_run_leaves_its_recipe_its_metrics_and_its_checkpoints(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path, steps=9, save_every=2, keep=2, trackers=("tensorboard",))
    reported: list[dict[str, Any]] = []
    train(config, report=reported.append)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9] == [row["step"] for row in reported]
    for row in rows:
        assert (f"dev/{ASR}" in row) == (row["step"] % 3 == 0)
        assert (
            ("loss/speech" in row)
            == ("grad_norm" in row)
            == (row["step"] % 2 == 0 or row["step"] == 9)
        )
    gates = {name for row in rows for name in row if name.startswith("gate/")}
    assert gates == {"gate/0:text>speech", "gate/0:speech>text"}
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-0000008",
        "step-0000009",
    ]
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    ]


def test_metrics_are_means_since_the_row_before(world: World, tmp_path: Path) -> None:
    train(world.config(tmp_path / "each", steps=6, log_every=1, eval_every=6))
    train(world.config(tmp_path / "three", steps=6, log_every=3, eval_every=6))
    each = [row["loss/speech"] for row in metrics(tmp_path / "each")]
    found = [row["loss/speech"] for row in metrics(tmp_path / "three")]
    assert found == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


# --- a run is held, moved and ended


def test_a_run_is_held_by_who_writes_it(world: World, tmp_path: Path) -> None:
    """A second start or resume is refused at once, and says by whom; it changes nothing of the
    run."""
    config, seen = world.config(tmp_path / "run", steps=3, log_every=1), []

    def second(row: dict[str, Any]) -> None:
        for resume in (True, False):
            with pytest.raises(
                ZipperError, match=rf"run is in use: process {os.getpid()} on .* writes it"
            ):
                train(config, resume=resume)
        seen.append(row["step"])

    train(config, report=second)
    assert seen == [1, 2, 3] == [row["step"] for row in metrics(tmp_path / "run")]
    train(config, resume=True)  # nobody holds it now
    assert not (tmp_path / "run" / HELD).exists()


def moved(world: World, place: Path) -> World:
    """The same world elsewhere, its pins with it."""
    return World(Path(shutil.copytree(world.folder, place)))


STILL: dict[str, Any] = {
    "steps": 6,
    "eval_every": 2,
    "save_every": 2,
    "log_every": 2,
    "lr_new": 0.0,
    "lr_gate": 0.0,
    "lr_tower": 0.0,
}


@pytest.mark.parametrize("how", ["all together", "the run alone", "the towers alone"])
@pytest.mark.parametrize(
    "changes", [{}, {"save_dtype": "bfloat16"}, {"frozen_dtype": "bfloat16"}], ids=str
)
def test_a_run_whose_parts_moved_goes_on_to_its_end(
    world: World, tmp_path: Path, how: str, changes: dict[str, Any]
) -> None:
    """The best model is that of the first evaluation, saved before the move: no weight changes."""
    project = moved(world, tmp_path / "project")
    with pytest.raises(Killed):
        train(project.config(project.folder / "run", **STILL, **changes), report=killing(4))
    run = project.folder / "run"
    if how == "all together":
        project = World(project.folder.rename(tmp_path / "renamed"))
        run = project.folder / "run"
    elif how == "the run alone":
        run = run.rename(tmp_path / "elsewhere")
    else:
        for name in ("text", "speech"):
            (tmp_path / "towers" / name).mkdir(parents=True)
            (project.folder / name / "tower").rename(tmp_path / "towers" / name / "tower")
        (project.folder / "text" / "tower").mkdir()  # what is not a tower any more
    config = project.config(run, **STILL, **changes)
    if how == "the towers alone":
        towers = {name: str(tmp_path / "towers" / name / "tower") for name in ("text", "speech")}
        config = dataclasses.replace(config, towers=towers)
    ended = train(config, resume=True)
    assert [row["step"] for row in metrics(run)] == [2, 4, 6]
    saved, ours = (
        Pipeline.from_pretrained(run / "model").model.state_dict(),
        ended.model.state_dict(),
    )
    assert all(torch.equal(saved[name], p) for name, p in ours.items())
    assert checkpoint.load(run / "model")[1]["step"] == 2


@pytest.mark.parametrize("harm", ["gone", "damaged", "of another tower"])
def test_what_the_end_needs_is_looked_at_before_the_first_step(
    world: World, tmp_path: Path, harm: str
) -> None:
    project = moved(world, tmp_path / "project")
    config = project.config(tmp_path / "run", **STILL)
    with pytest.raises(Killed):
        train(config, report=killing(4))
    model = tmp_path / "run" / "model"
    if harm == "gone":
        shutil.rmtree(model)
    elif harm == "damaged":
        flip(model / "zip.safetensors")
    else:
        saved = checkpoint.read_json(model / "zipper.json")
        saved["config"]["towers"]["text"]["digest"] = "0" * 64
        checkpoint.write_json(model / "zipper.json", saved)
        checkpoint.seal(model)
    steps: list[int] = []
    with pytest.warns(
        UserWarning, match="The best model so far is lost, the next evaluation counts as the best"
    ):
        train(config, resume=True, report=lambda row: steps.append(row["step"]))
    assert steps == [4, 6] and checkpoint.load(model)[1]["step"] == 4
    shutil.rmtree(model)
    with pytest.raises(ZipperError, match="The run is at its end, but its best model is lost"):
        train(config, resume=True)


@pytest.mark.parametrize("place", ["text", "a run"])
def test_a_run_that_could_not_be_saved_is_refused_before_its_first_step(
    world: World, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that says far more than its vocabulary, which no file may; a folder that is none
    of ours."""
    project = moved(world, tmp_path / "project")
    if place == "text":
        path = project.folder / "text" / "tokenizer.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"normalizer": None}) + " " * 2_000_000
        )
    else:
        (tmp_path / "run" / "model").mkdir(parents=True)
        (tmp_path / "run" / "model" / "thesis.tex").write_text("years of work")
    steps: list[int] = []
    with pytest.raises(
        ZipperError,
        match=r"tokenizer.json has more than \d+ bytes|model is of no run, and would be lost",
    ):
        train(project.config(tmp_path / "run"), report=lambda row: steps.append(row["step"]))
    assert not steps and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_ends_the_run_before_it_harms_anything(
    world: World, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config(tmp_path, steps=6, save_every=2, eval_every=2, log_every=2)
    nll, calls = Zipper.nll, []

    def broken(self: Zipper, *given: Any) -> Tensor:
        calls.append(self.training)
        return nll(self, *given) * (value if sum(calls) > 6 else 1.0)

    monkeypatch.setattr(Zipper, "nll", broken)
    with pytest.raises(
        ZipperError,
        match=r"The gradient of step [45] is not finite .*What .* holds is from before it.*start=",
    ):
        train(config)
    monkeypatch.undo()
    for path in (tmp_path / "checkpoints").glob("step-*"):
        assert all(
            tensor.isfinite().all() for tensor in load_file(path / "training.safetensors").values()
        )
    assert Pipeline.from_pretrained(tmp_path / "model").model.config.junctions


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, {"links", "towers.speech"}),
        ({"train": ("text",)}, {"links", "towers.text"}),
        ({"freeze": ("speech",)}, {"links"}),
        ({"lora": {"speech": {"r": 2}}}, {"links", "towers.speech.lora"}),
        (
            {"train": ("speech",), "lora": {"text": {"r": 2}}},
            {"links", "towers.speech", "towers.text.lora"},
        ),
    ],
    ids=["as it was", "another", "links", "adapter", "both"],
)
def test_what_learns_after_a_start(
    world: World, tmp_path: Path, changes: dict[str, Any], learns: set[str]
) -> None:
    started = Zipper.from_pretrained(world.zip).state_dict()
    common = {"start": str(world.zip), "train": (), "steps": 2, "lr_tower": 0.1, **changes}
    model = train(world.config(tmp_path / "run", **common)).model
    read = Zipper.from_pretrained(tmp_path / "run" / "model")
    changed = set[str]()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        was = started.get(name.replace(".base_layer", ""))
        if was is None or not torch.equal(tensor, was):
            part, tower, *_ = name.split(".")
            adapter = ".lora" if ".lora_" in name else ""
            changed.add(f"{part}.{tower}{adapter}" if part == "towers" else "links")
    assert changed == learns
    assert {n for n, t in read.config.towers.items() if t.train} == {
        name.split(".")[1] for name in learns if name.startswith("towers") and "lora" not in name
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("sound",)}, r"freeze names \['sound'\]"),
        ({"freeze": ("speech",), "start": None}, r"freeze names .* there is none"),
        ({"train": ("speech",), "lora": {"speech": {"r": 2}}}, "train and lora both name"),
    ],
)
def test_what_cannot_learn_after_a_start(
    world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZipperError, match=message):
        train(world.config(tmp_path / "run", **{"start": str(world.zip), "steps": 1, **changes}))


def test_a_start_whose_base_moved_finds_it_by_the_recipe(world: World, tmp_path: Path) -> None:
    project = moved(world, tmp_path / "project")
    # Pinned here, not to the world it is a copy of.
    Pipeline.from_pretrained(project.zip).save_pretrained(project.zip)
    (project.folder / "text").rename(tmp_path / "text")
    shutil.move(project.zip, tmp_path / "deep" / "er" / "zip")
    config = project.config(tmp_path / "run", steps=1, start=str(tmp_path / "deep" / "er" / "zip"))
    there = dataclasses.replace(
        config,
        towers={**config.towers, "text": str(tmp_path / "text" / "tower")},
        modalities={**config.modalities, "text": str(tmp_path / "text")},
    )
    model = train(there).zip
    assert Path(model.config.towers["text"].source) == tmp_path / "text" / "tower"


# --- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "needs at least one task"),
        ({"tasks": {ASR: -1.0}}, "needs at least one task"),
        ({"tasks": {ASR: 0.0}}, "needs at least one task"),
        ({"tasks": {"speech text": 1.0}}, "'speech text' is not a task. Write it as"),
        (
            {"tasks": {"speech -> image": 1.0}},
            "names the tower 'image'; this recipe has .'speech', 'text'..",
        ),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"batch": -3}, "batch is -3"),
        ({"rows": 0}, "rows is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        (
            {"frozen_dtype": "float16"},
            r"frozen_dtype is 'float16'; it must be one of .None, 'bfloat16'",
        ),
        ({"save_every": 0}, "save_every is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"mixed_precision": "fp7"}, r"mixed_precision is 'fp7'; it must be one of .'no', 'bf16'"),
        ({"save_dtype": "half"}, "save_dtype is 'half'"),
        (
            {"modalities": {"text": "x"}},
            "The towers are .'speech', 'text'., the modalities .'text'.. Give one for each",
        ),
        ({"train": ("video",)}, "train names .'video'"),
        ({"corrupt": {"video": 0.1}}, "corrupt names .'video'"),
        ({"loss_weight": {"video": 1.0}}, "loss_weight names .'video'"),
        (
            {"towers": {"text": {"model_type": "llama"}, "speech": "x"}},
            "'text' is a fresh one that would never learn",
        ),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_when_it_is_made(
    world: World, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZipperError, match=message):
        world.config(Path("nowhere"), **changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "call anna"},
            r"rows.jsonl, row 3: The task wants a field 'speech', the row has \['text'\]",
        ),
        (
            {"text": "call anna", "speech": [1] * 200},
            "rows.jsonl, row 3: 'speech' would read 202 tokens",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(
    world: World, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    data.write(tmp_path / "rows.jsonl", [*tiny.pairs(2), row])
    for place in ("data", "dev"):
        with pytest.raises(ZipperError, match=message):
            train(world.config(tmp_path / "run", **{place: str(tmp_path / "rows.jsonl")}))
    assert not (tmp_path / "run").exists()


def test_a_row_has_the_number_it_has_in_its_source(world: World, tmp_path: Path) -> None:
    short, bad = {"text": "call", "speech": [1]}, {"text": "call anna", "speech": [1] * 200}
    data.write(tmp_path / "rows.jsonl", [short, *tiny.pairs(2), bad])
    config = world.config(tmp_path / "run", data=str(tmp_path / "rows.jsonl"), least_ids=4)
    with pytest.raises(ZipperError, match=r"rows.jsonl, row 4: 'speech' would read 202 tokens"):
        train(config)
    with pytest.raises(ZipperError, match="has 999 ids at least; they have 3 to 206"):
        train(dataclasses.replace(config, least_ids=999))


def test_a_source_of_which_nothing_is_drawn_is_refused(world: World, tmp_path: Path) -> None:
    data.write(tmp_path / "texts.jsonl", [{"text": "call anna"}])
    sources = {str(world.folder / "pairs.jsonl"): 1.0, str(tmp_path / "texts.jsonl"): 1.0}
    config = world.config(tmp_path / "run", data=sources, tasks=tiny.BOTH | {"-> text": 0.0})
    with pytest.raises(ZipperError, match=r"texts.jsonl, row 1: .*wants a field 'speech'"):
        train(config)


def test_more_micro_batches_than_samples_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        ZipperError,
        match="batch is 4; 1 processes need at least one sample each, in each of 5 micro-batches",
    ):
        train(world.config(tmp_path / "run", batch=4, accumulate=5))


def test_a_tower_of_another_codebook_or_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    tiny.units(seed=5).save(tmp_path / "speech")  # as many codes, other sounds
    config = world.config(
        tmp_path / "run",
        towers={
            "text": str(world.folder / "text" / "tower"),
            "speech": str(world.zip / "towers" / "speech"),
        },
    )
    other = dataclasses.replace(
        config, modalities={**config.modalities, "speech": str(tmp_path / "speech")}
    )
    with pytest.raises(
        ZipperError,
        match=r"'speech' from .* another tokenizer or codebook than the one given. Give "
        r".*zip/modalities",
    ):
        train(other)
    tiny.text(merges=40).save(tmp_path / "text")
    more = dataclasses.replace(
        config, modalities={**config.modalities, "text": str(tmp_path / "text")}
    )
    with pytest.raises(ZipperError, match=r"'text' knows 42 ids, its modality in .* makes 70"):
        train(more)


def test_the_weights_of_sources_decide_a_run(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    model, rows = zip_of(world, config)

    def course(*weights: float) -> dict[str, Any]:
        parts = [batches.Part(str(n), rows[n : n + 9], w) for n, w in enumerate(weights)]
        return course_of(config, model, {}, parts, rows[:4])

    assert course(1.0, 2.0) == course(1.0, 2.0) != course(2.0, 1.0)


def test_the_tokenizer_decides_a_run(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    model, rows = zip_of(world, config)
    parts = [batches.Part("", rows, 1.0)]
    texts = tiny.text(), tiny.text(11)
    one, other = (course_of(config, model, {"text": text}, parts, rows) for text in texts)
    assert one != other


def test_where_it_started_decides_a_run_by_what_lies_there(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    model, rows = zip_of(world, config)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / checkpoint.MANIFEST).write_text("{}")
    shutil.copytree(tmp_path / "one", tmp_path / "other")

    def course(name: str) -> dict[str, Any]:
        started = dataclasses.replace(config, start=str(tmp_path / name))
        return course_of(started, model, {}, [], rows)

    assert course("one") == course("other")
    (tmp_path / "other" / checkpoint.MANIFEST).write_text("{ }")
    assert course("one") != course("other")


def test_the_names_of_fields_and_the_ends_of_rows_decide_a_run(
    world: World, tmp_path: Path
) -> None:
    config = world.config(tmp_path)
    model, _ = zip_of(world, config)

    def dev(*rows: data.Row) -> Any:
        return course_of(config, model, {}, [], rows)["dev"]

    both = {"speech": [2], "text": [1]}
    assert dev(both) == dev(dict(reversed(both.items())))
    assert dev(both) != dev({"speech": [2]}, {"text": [1]})
    assert dev({"text": [1]}) != dev({"speech": [1]})


def test_rows_of_just_the_least_and_just_the_most_ids_are_kept() -> None:
    whole = batches.Part("", [{"text": [0] * n} for n in range(1, 7)], 1.0)
    for least, most, wanted in ((2, 4, [2, 3, 4]), (4, None, [4, 5, 6]), (0, 1, [1])):
        part = whole.within(least, most)
        assert part.lengths.tolist() == wanted
        assert [whole.lengths[n] for n in part.numbers or ()] == wanted


def test_a_run_writes_over_no_model_and_nothing_of_others(tmp_path: Path) -> None:
    config = tiny.world(tmp_path / "world").config(tmp_path / "run", steps=1)
    train(config)
    model = tmp_path / "run" / "model"
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ZipperError, match="is a saved model; a run wants a folder of its own"):
        train(dataclasses.replace(config, output=str(model)))
    assert sorted(path.name for path in model.iterdir()) == before
    tower = tmp_path / "world" / "text" / "tower"
    for resume in (True, False):
        with pytest.raises(ZipperError, match=r"holds a config\.json of no run"):
            train(dataclasses.replace(config, output=str(tower)), resume=resume)
    for name in ("metrics.jsonl", "model/thesis.txt"):
        mine = tmp_path / name.partition(".")[0].replace("/", " ") / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        output = mine.parents[name.count("/")]
        with pytest.raises(ZipperError, match="is of no run, and would be lost"):
            train(dataclasses.replace(config, output=str(output)))
        assert mine.read_text() == "mine" and not (output / "config.json").exists()


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(tmp_path: Path) -> None:
    config = tiny.world(tmp_path / "world").config(tmp_path / "run", steps=3, eval_every=3)

    def kill(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, log_every=1), report=kill)
    with pytest.warns(UserWarning, match="has no checkpoint yet: the run begins anew"):
        train(config, resume=True)
