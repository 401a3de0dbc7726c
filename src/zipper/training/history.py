"""History: what a run has left in its folder so far, as text and as one HTML page that opens
offline.

It reads config.json and metrics.jsonl, of a run that goes on as of one that ended, and loads no
model. Rows of older runs lack some keys; what is not there is not shown. The page looks like
report.html and is drawn by the same means.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from zipper.errors import ZipperError
from zipper.saving import checkpoint
from zipper_lab import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        lines = (
            (folder / METRICS).read_text(encoding="utf-8").splitlines()
            if (folder / METRICS).is_file()
            else []
        )
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append(row | {"step": int(row["step"])})
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):  # the last one may just be being written
                    raise ZipperError(
                        f"{folder / METRICS}, line {number} is no row of metrics: {line!r:.80}."
                    ) from error
        if not rows:
            raise ZipperError(
                f"{folder} holds no metrics yet. Give the folder of a run (TrainConfig.output) "
                "that has taken steps."
            )
        recipe = (
            checkpoint.read_json(folder / "config.json")
            if (folder / "config.json").is_file()
            else {}
        )
        return cls(folder, recipe, rows)

    def lines(self, prefix: str) -> Lines:
        """Steps and values of every key that begins with `prefix`, without it."""
        return report.series(self.rows, prefix)

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of every such key."""
        return {name: values[-1] for name, (_, values) in self.lines(prefix).items()}

    def summary(self) -> dict[str, Any]:
        """Plain data: step, steps, best (step and dev losses), loss, dev, gates, branches, resumed
        (steps that a process began at, but 0), seconds (of all processes, as far as rows say),
        tokens_per_s and matmul_share (medians); None = not recorded.
        """
        evaluated = {
            row["step"]: {key[4:]: row[key] for key in row if key.startswith("dev/")}
            for row in self.rows
        }
        means = {
            step: statistics.fmean(found.values()) for step, found in evaluated.items() if found
        }
        best = min(means, key=lambda step: means[step], default=None)
        spent = {
            row.get("started", 0): row["seconds"] for row in self.rows if "seconds" in row
        }  # of each process its last row
        return {
            "folder": str(self.folder),
            "step": self.rows[-1]["step"],
            "steps": self.recipe.get("steps"),
            "best": None
            if best is None
            else {"step": best, "mean": means[best], "dev": evaluated[best]},
            "loss": self.last("loss/"),
            "dev": self.last("dev/"),
            "gates": self.last("gate/"),
            "branches": self.last("branch/"),
            "resumed": sorted(step for step in spent if step),
            "seconds": sum(spent.values()) if spent else None,
            "tokens_per_s": self._median("tokens_per_s"),
            "matmul_share": self._median("matmul_share"),
        }

    def _median(self, key: str) -> float | None:
        found = [row[key] for row in self.rows if key in row]
        return statistics.median(found) if found else None

    def panels(self) -> dict[str, Lines]:
        """What there is to draw: title -> lines."""
        found = {
            "training loss, nats per token": self.lines("loss/"),
            "dev loss, nats per token": self.lines("dev/"),
            "learning rate of the first group": self.lines("lr"),
            "gradient norm": {
                name or "all": line
                for name, line in (self.lines("grad_norm") | self.lines("grad/")).items()
            },
        }
        for prefix, title in {
            "gate/": "gate |tanh|",
            "branch/": "share of the stream that links add",
        }.items():
            for link, line in self.lines(prefix).items():
                junction, _, direction = link.partition(":")
                source, _, target = direction.partition(">")
                found.setdefault(f"{title}, {target} reads {source}", {})[
                    f"junction {junction}"
                ] = line
        found["tokens per second"] = self.lines("tokens_per_s")
        found["share of the machine's matmul rate"] = self.lines("matmul_share")
        return {title: lines for title, lines in found.items() if lines}


def text(found: Mapping[str, Any]) -> str:
    """`History.summary` for a terminal."""
    lines = [
        f"{found['folder']}: step {found['step']:,}"
        + (f" of {found['steps']:,}" if found["steps"] else "")
    ]
    if best := found["best"]:
        each = ", ".join(f"{task} {loss:.4f}" for task, loss in best["dev"].items())
        lines.append(f"best        step {best['step']:,}, dev loss {best['mean']:.4f} ({each})")
    for name, what in {
        "loss": "loss",
        "dev": "dev",
        "gates": "gates",
        "branches": "links add",
    }.items():
        if found[name]:
            lines.append(
                f"{what:11} "
                + ", ".join(f"{key} {value:.4g}" for key, value in found[name].items())
                + " at the end"
            )
    lines.append(
        "time        "
        + ("not recorded" if found["seconds"] is None else _duration(found["seconds"]))
    )
    if found["tokens_per_s"] is not None:
        share = (
            ""
            if found["matmul_share"] is None
            else f", {found['matmul_share']:.0%} of the machine's matmul rate"
        )
        lines.append(f"speed       {found['tokens_per_s']:,.0f} tokens/s{share} (medians)")
    if found["resumed"]:
        lines.append("resumed     at step " + ", ".join(f"{step:,}" for step in found["resumed"]))
    return "\n".join(lines)


def curves(history: History) -> str:
    """All panels as one SVG, dotted lines where the run was resumed. Raises ZipperError where
    matplotlib is missing."""
    panels, resumed = history.panels(), history.summary()["resumed"]

    def draw(figure: "Figure") -> None:
        from cycler import cycler

        grid = list(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=report.PALETTE))
            for name, (steps, values) in lines.items():
                axes.plot(steps, values, label=name, marker="." if len(steps) < 25 else None)
            for step in resumed:
                axes.axvline(step, color=report.INK, linestyle=":", linewidth=1)
            axes.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, None))
            axes.grid()
            if any(lines):
                axes.legend(ncols=1 + (len(lines) > 4))

    ends = [
        f"{title}: {name} {values[-1]:.3g}"
        for title, lines in panels.items()
        for name, (_, values) in lines.items()
    ]
    return report.svg(
        draw, (9.6, 2.7 * -(-len(panels) // 2)), "Curves over steps; at the end " + "; ".join(ends)
    )


def write(path: Path, history: History) -> None:
    """Write the page, whole or not at all. Raises ZipperError where matplotlib is missing."""
    found = history.summary()
    head = Template(
        report.PAGE.read_text(encoding="utf-8").partition("<body>")[0]
    )  # its style, also for dark screens
    title = f"The run {history.folder.resolve().name}"
    best = found["best"]
    cards = _card(
        "Steps",
        f"{found['step']:,}",
        f"of {found['steps']:,}" if found["steps"] else "",
        "resumed at " + ", ".join(map(str, found["resumed"])) if found["resumed"] else "",
    )
    if best:
        cards += _card(
            "Best dev loss",
            f"{best['mean']:.4f}",
            f"nats per token, at step {best['step']:,}",
            *_pairs(best["dev"]),
        )
    if found["tokens_per_s"]:
        spent = "" if found["seconds"] is None else f"{_duration(found['seconds'])} in all"
        share = (
            ""
            if found["matmul_share"] is None
            else f"{found['matmul_share']:.0%} of the machine's matmul rate"
        )
        cards += _card(
            "Tokens per second", f"{found['tokens_per_s']:,.0f}", "the median", spent, share
        )
    tables = {
        "Gates |tanh|, at the end": found["gates"],
        "Links add, share of the stream": found["branches"],
    }
    facts = "".join(
        _table(name, {key: f"{value:.3f}" for key, value in held.items()})
        for name, held in tables.items()
        if held
    )
    recipe = _table(
        "",
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in history.recipe.items()
        },
    )
    page = (
        head.substitute(title=escape(title))
        + f"<body><header><h1>{escape(title)}</h1><div class=cards>{cards}</div></header><main>"
        + f"<section><h2>Curves</h2><figure>{curves(history)}</figure></section>"
        + (f"<section><h2>Links</h2><div class=facts>{facts}</div></section>" if facts else "")
        + "<section><h2>How it was made</h2><details><summary>The recipe, in "
        f"full</summary>{recipe}</details></section>" + "</main></body></html>\n"
    )
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def _card(title: str, number: str, about: str, *more: str) -> str:
    quiet = "<br>".join(escape(line) for line in more if line)
    return f"<div class=card><h2>{title}</h2><p class=number>{number}</p><p>{escape(about)}</p><p class=quiet>{quiet}</p></div>"


def _pairs(found: Mapping[str, float]) -> list[str]:
    return [f"{name}: {value:.4f}" for name, value in found.items()]


def _table(caption: str, rows: Mapping[str, str]) -> str:
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table class=facts>{f'<caption>{caption}</caption>' if caption else ''}<tbody>{body}</tbody></table>"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
