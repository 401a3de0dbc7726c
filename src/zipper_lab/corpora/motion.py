"""Motion: what a phone in a pocket and a watch on a wrist feel while people sit, stand up, walk and
turn, in windows of a few seconds, with a description of each.

The public original is sp-sw-har-dataset of GitHub GeoTecINIT, commit 1408d85 (Matey-Sanz,
Casteleyn and Granell 2023, CC BY 4.0): accelerometer and gyroscope at about 104 Hz, the activity of
each sample, and how the device lay. The descriptions are composed here of these labels. Knows no
model.
"""

import csv
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from zipper.data import manifests
from zipper.errors import ZipperError
from zipper_lab.corpora.originals import contents, original

HOME = "https://github.com/GeoTecINIT/sp-sw-har-dataset, its folder DATA"
ARCHIVES = ("*sp-sw-har*", "DATA")
CHANNELS = ("x_acc", "y_acc", "z_acc", "x_gyro", "y_gyro", "z_gyro")
UNITS = ("m/s2", "m/s2", "m/s2", "rad/s", "rad/s", "rad/s")
RATE_HZ = 50
STEP = 10  # samples of one entry of "activities": 0.2 s
LENGTH = 160  # samples of a window: 3.2 s
#: Samples from one window to the next.
HOPS = {"train": 32, "dev": 80, "test": 80, "unpaired": 16}
LEAST_S = 0.25  # an activity that is cut shorter at the edge of a window is not told
PEOPLE = {"test": 4, "dev": 2}  # the rest is trained on
DEVICES = {"sp": "phone", "sw": "watch"}
ACTIVITIES = ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
DONE = {
    "SEATED": "sits",
    "STANDING_UP": "stands up",
    "WALKING": "walks",
    "TURNING LEFT": "turns left",
    "TURNING RIGHT": "turns right",
    "TURNING": "turns",
    "SITTING_DOWN": "sits down",
}
FACING = {
    "front": "facing the front",
    "front_inv": "facing the front, upside down",
    "back": "facing the back",
    "back_inv": "facing the back, upside down",
}
TEMPLATES = {
    "phone": (
        "someone {does}. a phone in the pocket, {facing}.",
        "a phone in a pocket, {facing}: the person {does}.",
        "the phone lies in the pocket {facing}; its owner {does}.",
    ),
    "watch": (
        "someone {does}. a watch on the wrist.",
        "a watch on a wrist: the person {does}.",
        "the watch is worn on the wrist; its owner {does}.",
    ),
}
Values = Float[np.ndarray, "time channels"]


@dataclass(frozen=True)
class Execution:
    """One file of the original, RATE_HZ samples a second.

    name: "s01_03_sp". labels: the activity of each sample, turns with their side. facing: of the
    phone.
    """

    name: str
    person: str
    device: str
    facing: str
    values: Values
    labels: list[str]


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests of windows of 3.2 s: train.jsonl, dev.jsonl, test.jsonl by person, unpaired.jsonl
    and texts.jsonl.

    Rows hold "text", "motion" ({"values": samples by channels, "rate_hz", "channels", "units"}),
    and for judges "activities" (one label in 0.2 s) and "device". unpaired.jsonl: windows of the
    people that are trained on, twice as dense, without description; texts.jsonl: descriptions
    of the same people's windows in every template. Raises ZipperError if the original is missing.
    """
    executions = [*_read(original(data, ARCHIVES, HOME))]
    people = sorted({execution.person for execution in executions})
    random.Random(f"motion {seed}").shuffle(people)
    held, owner = iter(people), dict[str, str]()
    for part, count in PEOPLE.items():
        owner |= {person: part for person, _ in zip(held, range(count), strict=False)}
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": [], "unpaired": []}
    said: set[str] = set()
    for execution in executions:
        part = owner.get(execution.person, "train")
        for row in _windows(execution, HOPS[part]):
            chosen = random.Random(f"{seed} {row['id']}").choice(TEMPLATES[execution.device])
            told = describe(execution, row["activities"], chosen)
            rows[part].append({"id": row["id"], "text": told} | row)
            if part == "train":
                said |= {
                    describe(execution, row["activities"], template)
                    for template in TEMPLATES[execution.device]
                }
        if part == "train":
            alone = _windows(execution, HOPS["unpaired"])
            rows["unpaired"] += [{"id": row["id"], "motion": row["motion"]} for row in alone]
    for part, some in rows.items():
        manifests.write(folder / f"{part}.jsonl", some)
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in sorted(said)])


def describe(execution: Execution, activities: Sequence[str], template: str) -> str:
    """What is done in a window, in words. activities: one label in 0.2 s."""
    runs = [(label, len([*same])) for label, same in groupby(activities)]
    told = [label for label, steps in runs if steps * STEP / RATE_HZ >= LEAST_S] or [runs[0][0]]
    done = [DONE[label] for label, _ in groupby(told)]
    does = done[0] if len(done) == 1 else f"{', '.join(done[:-1])} and {done[-1]}"
    return template.format(does=does, facing=FACING.get(execution.facing, execution.facing))


def heard(text: str) -> list[str]:
    """The activities that a description names, in their order: what `describe` was given."""
    places = {name: label for label, name in DONE.items()}
    found: list[tuple[int, str]] = []
    for name in sorted(places, key=len, reverse=True):
        start = text.find(name)
        while start >= 0:
            found.append((start, places[name]))
            text = text[:start] + "#" * len(name) + text[start + len(name) :]
            start = text.find(name)
    return [label for _, label in sorted(found)]


def _read(place: Path) -> Iterator[Execution]:
    files = {PurePosixPath(name).name: content for name, content in contents(place, ".csv")}
    if "executions_info.csv" not in files:
        raise ZipperError(
            f"{place} holds no executions_info.csv, which says how the devices lay. Take all of "
            f"{HOME}."
        )
    info = {row["execution_id"]: row for row in _table(files["executions_info.csv"])}
    for name in sorted(files):
        stem = name.removesuffix(".csv")
        person, _, rest = stem.partition("_")
        number, _, kind = rest.partition("_")
        if kind in DEVICES and f"{person}_{number}" in info:
            yield _execution(stem, person, DEVICES[kind], files[name], info[f"{person}_{number}"])


def _table(content: bytes) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(content.decode("utf-8-sig")))]


def _execution(
    name: str, person: str, device: str, content: bytes, info: Mapping[str, str]
) -> Execution:
    """At RATE_HZ: means of what lies around each point, because a faster shake would be read as a
    slower one."""
    table = _table(content)
    missing = {*CHANNELS, "timestamp", "label"} - {*(table[0] if table else ())}
    if missing:
        raise ZipperError(
            f"{name}.csv has no column {', '.join(sorted(missing))}. Take it from {HOME} again."
        )
    values = np.array([[float(row[channel]) for channel in CHANNELS] for row in table])
    # Time stamps come in bursts: the samples are evenly spaced between the first and the last.
    seconds = (float(table[-1]["timestamp"]) - float(table[0]["timestamp"])) / 1000
    times = np.linspace(0, seconds, len(table))
    edges = np.arange(int(seconds * RATE_HZ) + 1) / RATE_HZ
    area = np.concatenate([np.zeros((1, len(CHANNELS))), np.cumsum(values[:-1], 0)]) * times[1]
    sums = np.stack([np.interp(edges, times, column) for column in area.T], axis=1)
    slow = np.diff(sums, axis=0) * RATE_HZ
    nearest = np.searchsorted(times, (edges[:-1] + edges[1:]) / 2).clip(max=len(table) - 1)
    labels = _sided([row["label"] for row in table], info)
    return Execution(
        name, person, device, info["orientation"], slow, [labels[place] for place in nearest]
    )


def _sided(labels: Sequence[str], info: Mapping[str, str]) -> list[str]:
    """The labels, turns with their side: the first one's, then the second one's."""
    sides = {"l": "LEFT", "r": "RIGHT"}
    turns = iter([sides.get(info[f"{which}_turn"], "") for which in ("first", "second")])
    found: list[str] = []
    for label, same in groupby(labels):
        told = f"{label} {next(turns, '')}".strip() if label == "TURNING" else label
        found += [told] * len([*same])
    return found


def _windows(execution: Execution, hop: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(execution.values) - LENGTH + 1, hop):
        window = slice(start, start + LENGTH)
        yield {
            "id": f"{execution.name}-{start:05d}",
            "motion": {
                "values": execution.values[window].round(3).tolist(),
                "rate_hz": RATE_HZ,
                "channels": list(CHANNELS),
                "units": list(UNITS),
            },
            "activities": execution.labels[window][STEP // 2 :: STEP],
            "device": execution.device,
            "person": execution.person,
        }
