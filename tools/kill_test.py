"""Kills training again and again, starts it again, and sees whether it lost anything: `python
tools/kill_test.py --kills 100`.

Half of the SIGKILLs fall inside saves (the folder that is being written is there, before and
after), the rest anywhere. After each one every checkpoint that can be seen must be whole, none
older than before may be the newest, and the next start must go on from it; a run that came to its
end must hold, byte for byte, what an undisturbed one holds. Then the next run begins.

So that a start does not cost the import of torch, a process that has imported it, and has computed
nothing, forks the training processes; each of them builds everything anew from the disk, and it is
they who are killed. With --ranks 2 each start forks two, with the variables that torchrun gives to
its workers (gloo). One of them or both are killed, and the rest then, as torchrun does.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
import torch

from zipper.errors import ZipperError
from zipper.saving import checkpoint
from zipper.training import CLOCK, train

STEPS, EVERY = 40, 2
SLOWEST_S = 300.0  # for one start; longer is a hang


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for every kill, a summary and the result as JSON; returns 1 if anything was
    lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many, at least (default 100)")
    parser.add_argument(
        "--ranks", type=int, default=1, choices=[1, 2], help="processes of a run (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file as well")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="zipper-kill-") as folder:
        found = KillTest(Path(folder), given.kills, given.ranks, given.seed).run()
    lost = found["failures"]
    print(
        f"{found['kills']} kills (seed {given.seed}, {given.ranks} rank{'s' * (given.ranks > 1)}), "
        f"{found['inside']} inside saves; {found['resumed']} of {found['starts']} starts did a "
        f"step, the one after the newest checkpoint; {found['runs']} runs ended, {found['same']} "
        f"like the undisturbed one; {len(lost)} failures; {found['seconds']:.0f} s"
    )
    print(json.dumps(found))
    if given.output:
        checkpoint.write_json(given.output, found)
    return int(bool(lost))


class KillTest:
    """One series of kills. folder: an empty one. Half of the kills are to fall inside saves."""

    def __init__(self, folder: Path, kills: int, ranks: int, seed: int) -> None:
        self.folder, self.kills, self.ranks, self.seed = folder, kills, ranks, seed
        self.world = tiny.World(folder / "world")
        self.chance = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.where: Counter[str] = Counter()
        self.failures: list[str] = []
        self.save_s, self.start_s, self.step_s = 0.05, 1.0, 0.05  # measured on the undisturbed run
        self.last = ""  # where the last kill fell

    def run(self) -> dict[str, Any]:
        """The result, ready for JSON."""
        began = time.monotonic()
        if os.waitpid(_fork(lambda: _make_world(self.world.folder)), 0)[1]:
            raise RuntimeError("the small world could not be made")
        truth = self.undisturbed()
        while not self.enough():
            name = f"run-{self.count['runs']}"
            self.killed_until_it_ends(self.folder / name)
            self.count["runs"] += 1
            if (found := _digest(self.folder / name)) == truth:
                self.count["same"] += 1
            else:
                differs = [part for part in truth if found.get(part) != truth[part]]
                self.failures.append(
                    f"{name} ended with other {', '.join(differs)} than the undisturbed run"
                )
        counts = {
            name: self.count[name]
            for name in ("kills", "inside", "starts", "resumed", "runs", "same")
        }
        return {
            **counts,
            "where": dict(sorted(self.where.items())),
            "failures": self.failures,
            "ranks": self.ranks,
            "seed": self.seed,
            "steps": STEPS,
            "save_every": EVERY,
            "seconds": round(time.monotonic() - began, 1),
            "torch": torch.__version__,
        }

    def enough(self) -> bool:
        """Whether there were kills enough, inside saves and elsewhere."""
        return self.count["kills"] >= self.kills and 2 * self.count["inside"] >= self.kills

    def undisturbed(self) -> dict[str, str]:
        """A run that nobody kills: what it comes to, and how long a start, a step and a save
        take."""
        output, began = self.folder / "undisturbed", time.monotonic()
        start = Start(self, output)
        seen: list[float] = []
        first = None
        while start.alive():
            now = time.monotonic()
            if first is None and start.first_step() is not None:
                first = now
            if start.saving():
                seen.append(now)
            time.sleep(0.001)
        if (codes := start.wait()) != [0] * self.ranks or first is None:
            raise RuntimeError(f"the undisturbed run failed: {codes}")
        self.start_s, self.step_s = first - began, (time.monotonic() - first) / STEPS
        self.save_s = max(0.005, len(seen) * 0.0015 / (STEPS / EVERY))
        return _digest(output)

    def killed_until_it_ends(self, output: Path) -> None:
        """One run, from its beginning to its end."""
        newest = 0
        while True:
            start = Start(self, output)
            self.count["starts"] += 1
            inside = (
                2 * self.count["inside"] < self.kills
                and 2 * self.count["inside"] <= self.count["kills"]
            )
            killed = not self.enough() and self.kill(start, inside)
            ended = start.wait()
            if (first := start.first_step()) is not None:
                self.count["resumed"] += first == newest + 1
                if first != newest + 1:
                    self.failures.append(
                        f"{output.name}: the newest checkpoint was {newest}, the next start went "
                        f"on with step {first}"
                    )
            if not killed:
                if ended != [0] * self.ranks:
                    self.failures.append(
                        f"{output.name}: a start that nobody killed ended with {ended}"
                    )
                    if len(self.failures) > 5:
                        raise RuntimeError("; ".join(self.failures))
                    continue
                return
            found = self.look(output, newest)
            print(
                f"kill {self.count['kills']}: {self.last}; newest checkpoint {newest} -> {found}",
                flush=True,
            )
            newest = found

    def kill(self, start: "Start", inside: bool) -> bool:
        """SIGKILL at a random moment; False if the run had ended before."""
        if inside:
            for _ in range(self.chance.randint(1, 4)):  # which save
                while start.saving() and start.alive():
                    time.sleep(0.001)
                while not start.saving() and start.alive():
                    time.sleep(0.001)
            time.sleep(self.chance.uniform(0, self.save_s))
        else:
            until = time.monotonic() + self.chance.uniform(0, self.start_s + 8 * self.step_s)
            while time.monotonic() < until and start.alive():
                time.sleep(0.001)
        if not start.alive():
            return False
        start.kill(self.chance)
        self.count["kills"] += 1
        left = start.saving()
        self.last = "outside of saves"
        if left:
            self.count["inside"] += 1
            self.last = _stage(left[0])
        elif start.first_step() is None:
            self.last = "before the first step"
        self.where[self.last] += 1
        return True

    def look(self, output: Path, before: int) -> int:
        """What the killed run left: every checkpoint that can be seen is whole, and so is the
        model; the newest step."""
        seen = sorted((output / "checkpoints").glob("step-*"))
        for path in [*seen, *output.glob("model")]:
            try:
                checkpoint.check(path)
            except ZipperError as error:
                self.failures.append(f"{output.name}, killed {self.last}: {error}")
        newest = int(seen[-1].name.removeprefix("step-")) if seen else 0
        if newest < before:
            self.failures.append(
                f"{output.name}, killed {self.last}: the newest checkpoint was {before}, now it "
                f"is {newest}"
            )
        return newest


class Start:
    """One start of a run: its processes, and what they say."""

    def __init__(self, test: KillTest, output: Path) -> None:
        self.said = test.folder / f"said-{time.monotonic_ns()}"
        self.output, self.before = output, _beside(output)
        port = _free_port() if test.ranks > 1 else 0
        self.processes = [
            _fork(lambda rank=rank: _train(test.world, output, self.said, rank, test.ranks, port))
            for rank in range(test.ranks)
        ]
        self.ended: dict[int, int] = {}

    def alive(self) -> bool:
        """Whether all its processes are."""
        for process in self.processes:
            if process not in self.ended:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.ended[process] = os.waitstatus_to_exitcode(status)
        return not self.ended

    def kill(self, chance: random.Random) -> None:
        """One process or all; then, like torchrun, those that are left."""
        some = self.processes if chance.random() < 0.5 else [chance.choice(self.processes)]
        for process in some:
            os.kill(process, signal.SIGKILL)
        if len(some) < len(self.processes):
            time.sleep(chance.uniform(0, 0.2))  # what the other does meanwhile may be a save
            for process in self.processes:
                if process not in some:
                    os.kill(process, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int]:
        """Their exit codes, once all have ended; what hangs is killed."""
        until = time.monotonic() + SLOWEST_S
        while len(self.ended) < len(self.processes):
            self.alive()
            late = time.monotonic() > until or any(self.ended.values())
            for process in self.processes if late else ():
                if process not in self.ended:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.001)
        return self.codes()

    def codes(self) -> list[int]:
        """Exit codes, by rank."""
        return [self.ended[process] for process in self.processes]

    def saving(self) -> list[Path]:
        """The folders that are being written or taken away now, of checkpoints and of the model."""
        return sorted(_beside(self.output) - self.before)

    def first_step(self) -> int | None:
        """The first step that it did, if it has done one."""
        text = self.said.read_text() if self.said.exists() else ""
        return int(text) if text.endswith("\n") else None


def _train(world: tiny.World, output: Path, said: Path, rank: int, ranks: int, port: int) -> None:
    """What a training process does."""
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    first = True

    def report(row: dict[str, Any]) -> None:
        nonlocal first
        if first:
            first = False
            said.write_text(f"{row['step']}\n")

    train(
        world.config(output, steps=STEPS, save_every=EVERY, log_every=1, eval_every=5),
        resume=True,
        report=report,
    )


def _make_world(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    tiny.world(folder)


def _fork(work: Callable[[], None]) -> int:
    """A process that does the work and nothing else; its exit code says whether it could."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        work()
        code = 0
    finally:
        os._exit(code)


def _beside(output: Path) -> set[Path]:
    return {
        path for place in (output, output / "checkpoints") for path in place.glob(".*.zipper-*")
    }


def _stage(left: Path) -> str:
    """How far the save was, by what it left."""
    name = "a checkpoint" if left.name.startswith(".step") else "the model"
    if ".zipper-gone." in left.name:
        return "while an old checkpoint was taken away"
    if (left.parent / left.name[1:].partition(".zipper-")[0]).exists() and not (
        left / checkpoint.MANIFEST
    ).exists():
        return f"in a save of {name} over an older one"
    return f"in a save of {name}, manifest {'written' if (left / checkpoint.MANIFEST).exists() else 'not yet there'}"


def _digest(output: Path) -> dict[str, str]:
    """What a run came to, by hash: its last checkpoint, its best model, its metrics without how
    fast it went."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    found = {"metrics": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    last = output / "checkpoints" / f"step-{STEPS:07d}"
    for path in [
        *sorted(last.glob("*.safetensors")),
        *sorted((output / "model").rglob("*.safetensors")),
    ]:
        found[str(path.relative_to(output))] = checkpoint.sha256(path)
    left = [str(path.relative_to(output)) for path in output.rglob(".*")]
    return found | {"leftovers": " ".join(left)}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
