"""Several processes: however a model is spread over them, it learns what it learns in one, and goes
on where one stopped.

Processes of a group are started together and do several runs one after the other: importing torch
is what takes the time.
"""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import World
from torch import Tensor

from zipper.saving import checkpoint
from zipper.saving.files import held
from zipper.tower import Tower
from zipper.training import CLOCK, Stopped, train

ASR, TTS = tiny.BOTH
HERE = Path(__file__).parent

SCRIPT = """
import hashlib, json, os, signal, sys
from pathlib import Path
import tiny, torch
from accelerate.state import AcceleratorState
from zipper.link import LinkConfig
from zipper.training import Stopped, train

for run in json.loads(sys.argv[2]):
    AcceleratorState._reset_state(True)  # a group of processes lasts as long as a run
    os.environ["MASTER_PORT"] = str(run["port"])
    link = {"link": LinkConfig(**run["changes"].pop("link"))} if "link" in run["changes"] else {}
    def report(row):
        if row["step"] == run["stop"]:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(tiny.World(Path(sys.argv[1])).config(Path(run["output"]), **run["changes"], **link), run["resume"], report)
        assert not run["stop"]
    except Stopped:
        assert run["stop"]
    noise = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    Path(run["output"], f"noise-{os.environ['RANK']}").write_text(noise)
"""


def run(
    output: Path, changes: dict[str, Any], stop: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """A run for `together`. stop: after the report of this step one of the processes gets
    SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {
            "output": str(output),
            "changes": changes,
            "stop": stop,
            "resume": resume,
            "port": free.getsockname()[1],
        }


def environment(processes: int = 1, rank: int = 0, port: int = 0) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_PORT": str(port),
    }
    place |= {
        "PYTHONHASHSEED": str(1 + rank)
    }  # by 1 and 2 a set of "text" and "speech" has another order: none may matter
    return {
        **os.environ,
        **place,
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": path,
        "ACCELERATE_USE_CPU": "true",
    }


def together(
    processes: int, world: World, runs: Sequence[dict[str, Any]], timeout_s: float = 1500
) -> None:
    """Runs, one after the other, each by so many processes at once."""
    command = [sys.executable, "-c", SCRIPT, str(world.folder), json.dumps(runs)]
    group = [
        subprocess.Popen(
            command, env=environment(processes, rank), stderr=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=timeout_s)[1] for process in group]
        assert [process.returncode for process in group] == [0] * processes, "\n".join(
            text[-3000:] for text in said
        )
    finally:
        for process in group:
            process.kill()


def metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without how fast it went."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in row.items()
            if not key.startswith("branch/") and key not in CLOCK
        }
        for row in rows
    ]


def state(output: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds: parameters and the moments of the optimizer."""
    folder = output / "checkpoints" / f"step-{step:07d}"
    checkpoint.check(folder)
    return load_file(folder / "training.safetensors")


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal up to the order of sums: 5e-6, after steps of up to 3e-3 each."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, atol=5e-6, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


# Two tasks, four pieces of a batch of five: most pieces lack a task, and every third batch does.
COURSE: dict[str, Any] = {
    "steps": 6,
    "batch": 5,
    "tasks": {ASR: 0.8, TTS: 0.2},
    "log_every": 1,
    "eval_every": 3,
    "save_every": 2,
    "keep": 9,
    "input_projection": "residual",
}
SPREAD: dict[str, dict[str, Any]] = {
    "copies": {},
    "pieces": {"shard": True, "recompute": True, "accumulate": 2},
}


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `one` by one process, the others by two; `moves` began in one process and
    was stopped in two."""
    folder = tmp_path_factory.mktemp("runs")

    def killed(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    train(world.config(folder / "one", **COURSE))
    with pytest.raises(KeyboardInterrupt):
        train(world.config(folder / "moves", **COURSE), report=killed)
    two = [run(folder / name, COURSE | changes) for name, changes in SPREAD.items()]
    together(2, world, [*two, run(folder / "moves", COURSE | {"shard": True}, stop=3, resume=True)])
    return folder


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_learn_what_one_learns(world: World, runs: Path, name: str) -> None:
    """As copies (DDP) and as pieces (FSDP2, frozen parameters too), with batches that lack a
    modality somewhere or everywhere."""
    one = metrics(runs / "one")
    assert {key for row in one for key in row if key.startswith("loss/")} == {
        "loss/text",
        "loss/speech",
    }
    assert any("loss/speech" not in row for row in one)  # a batch without that task
    for found, wanted in zip(metrics(runs / name), one, strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    for step in (2, 4, 6):
        assert_close(state(runs / name, step), state(runs / "one", step))


@pytest.mark.parametrize("name", SPREAD)
def test_what_two_processes_return_is_whole(world: World, runs: Path, name: str) -> None:
    last = state(runs / name, 6)
    # The best is the last: it holds the weights of the checkpoint.
    assert checkpoint.load(runs / name / "model")[1]["step"] == 6
    tower = Tower.load(runs / name / "model" / "towers" / "speech")
    held = {f"towers.speech.{key}": p for key, p in tower.named_parameters()} | load_file(
        runs / name / "model" / "zip.safetensors"
    )
    wanted = {key for key in last if not key.startswith("optimizer/")}
    assert held.keys() == wanted
    assert all(torch.equal(held[key], last[key]) for key in wanted)


def test_a_run_goes_from_one_process_to_two_and_back(world: World, runs: Path) -> None:
    moves = runs / "moves"
    assert [path.name for path in sorted((moves / "checkpoints").iterdir())] == [
        "step-0000002",
        "step-0000004",
    ]
    assert (moves / "noise-1").exists()  # both ended as Stopped
    train(world.config(moves, **COURSE), resume=True)
    assert_close(state(moves, 6), state(runs / "one", 6))
    for found, wanted in zip(metrics(moves), metrics(runs / "one"), strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)


# --- slow


def digest(output: Path, step: int, ranks: int) -> str:
    """Of everything that a run is: parameters, moments, losses and rates of every step, where it
    stands, the noise of each rank."""
    folder = output / "checkpoints" / f"step-{step:07d}"
    content = hashlib.sha256(
        (folder / "training.safetensors").read_bytes() + (folder / "zipper.json").read_bytes()
    )
    content.update(json.dumps(metrics(output)).encode())
    for rank in range(ranks):
        content.update((output / f"noise-{rank}").read_bytes())
    return content.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_random_runs_stopped_anywhere_and_resumed_are_those_that_were_not(
    world: World, tmp_path: Path, ranks: int
) -> None:
    """By hash. Seed, step of the stop, micro-batches and epoch are drawn; noise is on; of two
    processes some share pieces."""
    chance = random.Random(ranks)
    runs, steps = [], []
    for number in range(10):
        steps.append(chance.randrange(6, 12))
        changes = {
            "steps": steps[-1],
            "seed": chance.randrange(1000),
            "accumulate": chance.randrange(1, 4),
            "shard": chance.random() < 0.5,
            "batch": 7,
            "rows": 23,  # an epoch is three steps and two rows
            "log_every": 1,
            "eval_every": 4,
            "save_every": 3,
            "corrupt": {"speech": 0.3},
            "link": {"head_width": 16, "gate_init": 0.6, "dropout": 0.2},
        }
        whole, cut = tmp_path / f"{number}-whole", tmp_path / f"{number}-cut"
        stop = chance.randrange(1, steps[-1] - 1)
        runs += [run(whole, changes), run(cut, changes, stop=stop), run(cut, changes, resume=True)]
    together(ranks, world, runs)
    found = [
        [digest(tmp_path / f"{n}-{kind}", steps[n], ranks) for kind in ("whole", "cut")]
        for n in range(10)
    ]
    assert [whole == cut for whole, cut in found] == [True] * 10
    assert len({whole for whole, _ in found}) == 10


RECIPE = """
import tiny
from pathlib import Path
def config():
    return tiny.World(Path({world!r})).config(Path("run"), steps={steps}, save_every=1, log_every=1, eval_every={steps})
"""

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zipper"],
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "-m",
        "zipper",
    ],
}


@pytest.mark.slow
def test_a_run_that_is_held_is_refused_in_every_process(world: World, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(world.folder),
        json.dumps([run(tmp_path / "run", {"steps": 1})]),
    ]
    with held(tmp_path / "run"):
        group = [
            subprocess.Popen(command, env=environment(2, rank), stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        said = [process.communicate(timeout=300)[1] for process in group]
    for process, text in zip(group, said, strict=True):
        assert process.returncode and f"run is in use: process {os.getpid()} on" in text, text[
            -3000:
        ]
    together(2, world, [run(tmp_path / "run", {"steps": 1})])  # nobody holds it now


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_the_command(world: World, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE.format(world=str(world.folder), steps=4))
    rest = {
        key: value
        for key, value in environment().items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    launch = [sys.executable, "-m", *LAUNCHERS[launcher], "train", "recipe.py"]
    subprocess.run(launch, check=True, env=rest, cwd=tmp_path, timeout=1500)
    train(world.config(tmp_path / "one", steps=4, save_every=1, log_every=1, eval_every=4))
    assert_close(state(tmp_path / "run", 4), state(tmp_path / "one", 4))


@pytest.mark.slow
def test_a_command_stopped_by_sigterm_says_so(world: World, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE.format(world=str(world.folder), steps=3000))
    command = [sys.executable, "-m", "zipper", "train", "recipe.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        process.stderr.read(1)  # the progress bar moves
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=1500)[1]
    assert process.returncode == 128 + signal.SIGTERM == Stopped().code
    assert "by SIGTERM; go on with resume" in said
