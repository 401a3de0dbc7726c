"""BabyAI: a mission in words, the room as an agent sees it from where it stands, and the actions
that fulfil the mission.

The levels are those of PyPI minigrid (3.2.0, Apache-2.0; Chevalier-Boisvert et al. 2019), solved by
the bot that comes with it. `babyai_demos.jsonl.gz` holds such episodes: level, seed, mission,
actions, the grid and the pose at the start. `solve` makes more. Knows no model.
"""

import contextlib
import gzip
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper_lab.corpora.originals import original, part

HOME = "zipper_lab.corpora.babyai.record, which lets the bot of PyPI minigrid 3.2.0 solve seeds"
FILE = "babyai_demos.jsonl.gz"
LEVELS = {
    "BabyAI-GoToLocal-v0": 0.4,
    "BabyAI-PickupLoc-v0": 0.3,
    "BabyAI-PutNextLocal-v0": 0.3,
}
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
THINGS = {4: "door", 5: "key", 6: "ball", 7: "box"}
WALL = 2
#: Steps of an agent that looks to the right, down, left, up; its right hand is one further.
LOOKS = ((1, 0), (0, 1), (-1, 0), (0, -1))
#: Of all missions: those that only the test has. Of the starts of the others: what is held back.
UNSEEN = {"test": 0.05}
SHARES = {"test": 0.1, "dev": 0.05}
FRESH = 7_000_000  # the first seed of episodes that are solved here: recorded ones begin at 0


def write(data: Path, folder: Path, seed: int = 0, more: int = 0) -> None:
    """Manifests of episodes: train.jsonl, dev.jsonl, test.jsonl, unpaired.jsonl and texts.jsonl.

    Rows hold "text" (the mission), "seen:actions" (the room, see `seen`), "actions" (see ACTIONS;
    both are words with spaces between them), and for judges "env", "seed" and "unseen", whether
    train.jsonl lacks the mission. A start, which is a grid and a pose, is in one part only.
    unpaired.jsonl: the episodes of train.jsonl and `more` that the bot of minigrid solves now,
    without missions; texts.jsonl: missions that train.jsonl may have. data: the folder that holds
    FILE. Raises ZipperError if it is missing.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    recorded = [*_recorded(original(data, (FILE,), HOME))]
    owners = [_owner(episode, seed) for episode in recorded]
    every = [*zip(recorded, owners, strict=True)]
    # A start with two missions, of which one is held back.
    held = {owner: {_start(e) for e, other in every if other == owner} for owner in rows}
    taken = {"train": held["test"] | held["dev"], "dev": held["test"], "test": set[str]()}
    for episode, owner in every:
        if _start(episode) not in taken[owner]:
            rows[owner].append(_row(episode))
    known = {row["text"] for row in rows["train"]}
    alone = [{"id": row["id"], **_shown(row)} for row in rows["train"]]
    said = {row["text"] for row in rows["train"]}
    for level, share in LEVELS.items():
        for episode in solve(level, range(FRESH, FRESH + round(more * share))):
            row = _row(episode)
            if _owner(episode, seed) == "train" and _start(episode) not in taken["train"]:
                alone.append({"id": row["id"], **_shown(row)})
                said.add(row["text"])
    for owner, some in rows.items():
        told = [row | {"unseen": row["text"] not in known} for row in some]
        manifests.write(folder / f"{owner}.jsonl", told)
    manifests.write(folder / "unpaired.jsonl", alone)
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in sorted(said)])


def seen(grid: Sequence[int], pose: Sequence[int], width: int) -> str:
    """The room from where the agent stands, in words: "wall a3 l2 grey-key a2r1 red-ball b0l3".

    First the steps to the wall ahead and to the one on the left, then every thing, the nearest
    first: its colour and name, and the steps ahead (a) or behind (b), to the right (r) or left (l).
    grid: kind and colour of each cell, row by row. pose: column, row, direction (0 is right, 1
    down).
    """
    column, row, look = pose
    (forth_x, forth_y), (side_x, side_y) = LOOKS[look], LOOKS[(look + 1) % 4]
    found: list[tuple[int, str]] = []
    for place in range(len(grid) // 2):
        kind, colour = grid[2 * place], grid[2 * place + 1]
        if kind in THINGS:
            x, y = place % width - column, place // width - row
            ahead, right = x * forth_x + y * forth_y, x * side_x + y * side_y
            name = f"{COLOURS[colour]}-{THINGS[kind]}"
            found.append((abs(ahead) + abs(right), f"{name} {_steps(ahead)}{_side(right)}"))

    def free(step_x: int, step_y: int) -> int:
        steps, x, y = 0, column, row
        while grid[2 * (width * (y + step_y) + x + step_x)] != WALL:
            x, y, steps = x + step_x, y + step_y, steps + 1
        return steps

    walls = f"wall {_steps(free(forth_x, forth_y))} {_side(-free(-side_x, -side_y))}"
    return " ".join([walls, *(told for _, told in sorted(found))])


def vocabulary() -> list[str]:
    """Every word that `seen` may write in a room of 6 by 6 cells, and every action."""
    steps = [_steps(n) for n in range(-5, 6)]
    sides = [_side(n) for n in range(-5, 6)]
    things = [f"{colour}-{thing}" for colour, thing in product(COLOURS, THINGS.values())]
    walls = ["wall", *(_steps(n) for n in range(6)), *(_side(-n) for n in range(6))]
    places = [ahead + right for ahead, right in product(steps, sides)]
    return [*dict.fromkeys([*ACTIONS, *things, *walls, *places])]


def number(action: str) -> int:
    """What the simulator calls an action; -1 for a word that is none."""
    return ACTIONS.index(action) if action in ACTIONS else -1


def solve(level: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Episodes that the bot of minigrid solves, in the form of FILE; 6 ms each.

    Those that it does not solve are left out. Raises MissingExtra where minigrid is not installed.
    """
    if not seeds:
        return
    bots = extra("minigrid.utils.baby_ai_bot")
    world = simulator(level)
    for seed in seeds:
        with quiet():
            told, _ = world.reset(seed=seed)
            bot, taken, reward = bots.BabyAIBot(world), list[int](), 0.0
            cells = world.grid.encode()[:, :, :2].transpose(1, 0, 2).reshape(-1).tolist()
            pose = [*map(int, world.agent_pos), int(world.agent_dir)]
            for _ in range(world.max_steps):
                taken.append(int(bot.replan(taken[-1] if taken else None)))
                _, reward, over, late, _ = world.step(taken[-1])
                if over or late:
                    break
        if reward > 0:
            yield {
                "env": level,
                "seed": seed,
                "mission": told["mission"],
                "actions": taken,
                "grid0": cells,
                "pose0": pose,
                "size": [world.width, world.height],
            }


def simulator(level: str) -> Any:
    """The world of a level, without the wrappers that would print or count."""
    extra("minigrid")
    with quiet():
        return extra("gymnasium").make(level).unwrapped


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """minigrid prints every world that it draws and throws away."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def record(path: Path, episodes: int = 5000) -> None:
    """Write FILE anew: so many seeds from 0 on, in the shares of LEVELS."""
    solved = (solve(level, range(round(episodes * share))) for level, share in LEVELS.items())
    told = map(json.dumps, chain.from_iterable(solved))
    path.write_bytes(gzip.compress("\n".join(told).encode()))


def _recorded(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise ZipperError(f"{path} is damaged ({error}). Make it anew: {HOME}.") from error


def _row(episode: Mapping[str, Any]) -> dict[str, Any]:
    level = re.sub(r"BabyAI-|-v0", "", episode["env"])
    return {
        "id": f"{level}-{episode['seed']}",
        "text": episode["mission"],
        "seen:actions": seen(episode["grid0"], episode["pose0"], episode["size"][0]),
        "actions": " ".join(ACTIONS[action] for action in episode["actions"]),
        "env": episode["env"],
        "seed": episode["seed"],
    }


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("seen:actions", "actions")}


def _owner(episode: Mapping[str, Any], seed: int) -> str:
    """By mission, then by start."""
    held = part(f"{seed} {episode['mission']}", UNSEEN)
    return part(f"{seed} {_start(episode)}", SHARES) if held == "train" else held


def _start(episode: Mapping[str, Any]) -> str:
    return f"{episode['grid0']} {episode['pose0']}"


def _steps(ahead: int) -> str:
    return f"a{ahead}" if ahead >= 0 else f"b{-ahead}"


def _side(right: int) -> str:
    return f"r{right}" if right >= 0 else f"l{-right}"
