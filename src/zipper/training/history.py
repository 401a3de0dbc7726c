"""History: what a run has left in its folder so far, as text and as one HTML page that opens
offline.

It reads config.json and metrics.jsonl, of a run that goes on as of one that ended, and loads no
model. Rows of older runs lack some keys; what is not there is not shown.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipper import pages
from zipper.errors import ZipperError
from zipper.saving import checkpoint

PAGE = pages.HERE / "run.html"
METRICS = "metrics.jsonl"
Lines = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class History:
    """One run. recipe: its TrainConfig as plain data. rows: of metrics, in the order of steps."""

    folder: Path
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "History":
        """What lies in the folder of a run. Raises ZipperError where there is no row yet."""
        metrics, config = folder / METRICS, folder / "config.json"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append(row | {"step": int(row["step"])})
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):  # the last one may just be being written
                    raise ZipperError(
                        f"{metrics}, line {number} is no row of metrics: {line!r:.80}."
                    ) from error
        if not rows:
            raise ZipperError(
                f"{folder} holds no metrics yet. Give the folder of a run (TrainConfig.output) "
                "that has taken steps."
            )
        return cls(folder, checkpoint.read_json(config) if config.is_file() else {}, rows)

    def lines(self, prefix: str) -> Lines:
        """Steps and values of every key that begins with `prefix`, without it."""
        return series(self.rows, prefix)

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of every such key."""
        return {name: values[-1] for name, (_, values) in self.lines(prefix).items()}

    def summary(self) -> dict[str, Any]:
        """Plain data: step, steps, best (step and dev losses), loss, dev, gates, branches, resumed
        (steps that a process began at, but 0), seconds (of all processes, as far as rows say),
        tokens_per_s and matmul_share (medians); None = not recorded.
        """
        evaluated: dict[int, dict[str, float]] = {}
        for row in self.rows:
            if dev := {key[4:]: row[key] for key in row if key.startswith("dev/")}:
                evaluated[row["step"]] = dev
        means = {step: statistics.fmean(dev.values()) for step, dev in evaluated.items()}
        means = {step: mean for step, mean in means.items() if math.isfinite(mean)}
        best = None
        if means:
            step = min(means, key=lambda step: means[step])
            best = {"step": step, "mean": means[step], "dev": evaluated[step]}

        # Of each process its last row.
        timed = (row for row in self.rows if "seconds" in row)
        spent = {row.get("started", 0): row["seconds"] for row in timed}
        return {
            "folder": str(self.folder),
            "step": self.rows[-1]["step"],
            "steps": self.recipe.get("steps"),
            "best": best,
            "loss": self.last("loss/"),
            "dev": self.last("dev/"),
            "gates": self.last("gate/"),
            "branches": self.last("branch/"),
            "resumed": sorted(step for step in spent if step),
            "seconds": sum(spent.values()) if spent else None,
            "tokens_per_s": self._median("tokens_per_s"),
            "matmul_share": self._median("matmul_share"),
        }

    def panels(self) -> dict[str, Lines]:
        """What there is to draw: title -> lines."""
        norms = self.lines("grad_norm") | self.lines("grad/")
        found = {
            "training loss, nats per token": self.lines("loss/"),
            "dev loss, nats per token": self.lines("dev/"),
            "learning rate of the first group": self.lines("lr"),
            "gradient norm": {name or "all": line for name, line in norms.items()},
        }
        found |= directions(self.rows, "gate/", "gate |tanh|")
        found |= directions(self.rows, "branch/", "share of the stream that links add")
        found["tokens per second"] = self.lines("tokens_per_s")
        found["share of the machine's matmul rate"] = self.lines("matmul_share")
        return {title: lines for title, lines in found.items() if lines}

    def _median(self, key: str) -> float | None:
        found = [row[key] for row in self.rows if key in row]
        return statistics.median(found) if found else None


def series(rows: Sequence[Mapping[str, Any]], prefix: str) -> Lines:
    """Steps and values of every key that begins with `prefix`, without it; rows that lack a key are
    skipped for that key."""
    found: Lines = {}
    for row in rows:
        for key in filter(lambda key: key.startswith(prefix), row):
            steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
            steps.append(row["step"])
            values.append(float(row[key]))
    return found


def directions(rows: Sequence[Mapping[str, Any]], prefix: str, title: str) -> dict[str, Lines]:
    """The `series` of links ("0:text>speech"): a panel a direction, a line a junction."""
    found: dict[str, Lines] = {}
    for link, line in series(rows, prefix).items():
        junction, _, direction = link.partition(":")
        source, _, target = direction.partition(">")
        panel = found.setdefault(f"{title}, {target} reads {source}", {})
        panel[f"junction {junction}"] = line
    return found


def text(found: Mapping[str, Any]) -> str:
    """`History.summary` for a terminal."""
    of = f" of {found['steps']:,}" if found["steps"] else ""
    lines = [f"{found['folder']}: step {found['step']:,}{of}"]
    if best := found["best"]:
        each = ", ".join(f"{task} {loss:.4f}" for task, loss in best["dev"].items())
        lines.append(f"best        step {best['step']:,}, dev loss {best['mean']:.4f} ({each})")

    named = {"loss": "loss", "dev": "dev", "gates": "gates", "branches": "links add"}
    for name, what in named.items():
        if found[name]:
            each = ", ".join(f"{key} {value:.4g}" for key, value in found[name].items())
            lines.append(f"{what:11} {each} at the end")

    spent = "not recorded" if found["seconds"] is None else pages.duration(found["seconds"])
    lines.append(f"time        {spent}")
    if found["tokens_per_s"] is not None:
        share = ""
        if found["matmul_share"] is not None:
            share = f", {found['matmul_share']:.0%} of the machine's matmul rate"
        lines.append(f"speed       {found['tokens_per_s']:,.0f} tokens/s{share} (medians)")
    if found["resumed"]:
        lines.append("resumed     at step " + ", ".join(f"{step:,}" for step in found["resumed"]))
    return "\n".join(lines)


def curves(history: History) -> str:
    """All panels as one SVG, dotted lines where the run was resumed. Raises ZipperError where
    matplotlib is missing."""
    return pages.curves(history.panels(), history.summary()["resumed"])


def write(path: Path, history: History) -> None:
    """Write the page, whole or not at all. Raises ZipperError where matplotlib or jinja2 is
    missing."""
    found = history.summary()
    links = {
        "Gates |tanh|, at the end": found["gates"],
        "Links add, share of the stream": found["branches"],
    }
    recipe = history.recipe.items()
    pages.write(
        path,
        PAGE,
        title=f"The run {history.folder.resolve().name}",
        cards=_cards(found),
        curves=curves(history),
        links={caption: _rounded(held) for caption, held in links.items() if held},
        recipe={
            key: value if isinstance(value, str) else json.dumps(value) for key, value in recipe
        },
    )


def _cards(found: Mapping[str, Any]) -> list[pages.Card]:
    steps = f"of {found['steps']:,}" if found["steps"] else ""
    resumed = ", ".join(map(str, found["resumed"]))
    cards = [
        pages.Card("Steps", f"{found['step']:,}", steps, [f"resumed at {resumed}"] * bool(resumed))
    ]

    if best := found["best"]:
        each = [f"{name}: {value:.4f}" for name, value in best["dev"].items()]
        about = f"nats per token, at step {best['step']:,}"
        cards.append(pages.Card("Best dev loss", f"{best['mean']:.4f}", about, each))

    if found["tokens_per_s"]:
        more = []
        if found["seconds"] is not None:
            more.append(f"{pages.duration(found['seconds'])} in all")
        if found["matmul_share"] is not None:
            more.append(f"{found['matmul_share']:.0%} of the machine's matmul rate")
        cards.append(
            pages.Card("Tokens per second", f"{found['tokens_per_s']:,.0f}", "the median", more)
        )
    return cards


def _rounded(held: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.3f}" for key, value in held.items()}
