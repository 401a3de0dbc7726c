"""Pages: HTML that opens offline, from templates that escape what they are told, and its drawings.

A page is a template that extends page.html, wherever it lies. Nothing here knows what is shown: a
run, a report and the tables of experiments have templates of their own.
"""

import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zipper.environment import extra
from zipper.saving import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Readable on white and on near-black.
PALETTE = ("#3f83c8", "#d8792f", "#2f9e83", "#b4578f", "#8571c9", "#8a8f98")
# Stands for `currentColor`, which matplotlib does not know: the page decides what colour text has.
INK = "#010203"
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a token may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.linewidth": 1.6,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color"),
    INK,
)

#: Title of a drawing -> name of a line -> its steps and values.
Lines = Mapping[str, tuple[Sequence[int], Sequence[float]]]
Panels = Mapping[str, Lines]


class Card(NamedTuple):
    """A number that stands large at the head of a page. more: lines in small."""

    title: str
    number: str
    about: str = ""
    more: Sequence[str] = ()


def write(path: Path, template: Path, **said: Any) -> None:
    """Write a page, whole or not at all; its folder is made. Raises MissingExtra without jinja2."""
    page = render(template, **said)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, page.encode())


def render(
    template: Path, *, title: str, about: str = "", cards: Sequence[Card] = (), **said: Any
) -> str:
    """A page as text. What is said is escaped, but for what a template calls safe: drawings."""
    jinja2 = extra("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    page: str = environment.get_template(template.name).render(
        title=title, about=about, cards=cards, **said
    )
    return page


def percent(share: float) -> str:
    """A share in words that do not break: "12.3 %"."""
    return f"{100 * share:.1f}\u00a0%"


def duration(seconds: float) -> str:
    """How long, as people say it."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def cut(label: str, most: int = 16) -> str:
    """A label so long that it would leave no room for what it labels is cut."""
    return label if len(label) <= most else label[: most - 1] + "…"


def curves(panels: Panels, resumed: Collection[int] = ()) -> str:
    """Lines over steps as one SVG, two panels abreast, dotted where a run was resumed. Text and
    axes have the colour of the text around. Raises MissingExtra without matplotlib."""
    down = -(-len(panels) // 2)

    def draw(figure: "Figure") -> None:
        style = extra("cycler").cycler(linestyle=["-", "--"]) * extra("cycler").cycler(
            color=PALETTE
        )
        grid = list(figure.subplots(down, 2, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()

        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            axes.set_prop_cycle(style)
            for name, (steps, values) in lines.items():
                marker = "." if len(steps) < 25 else None
                axes.plot(steps, values, label=cut(name, 40), marker=marker)
            for step in resumed:
                axes.axvline(step, color=INK, linestyle=":", linewidth=1)

            axes.set(title=cut(title, 60), xlabel="step", xlim=(0, None), ylim=(0, None))
            axes.grid()
            if any(lines):
                axes.legend(ncols=1 + (len(lines) > 4))

    ends = []
    for title, lines in panels.items():
        ends += [f"{title}: {name} {values[-1]:.3g}" for name, (_, values) in lines.items()]
    return svg(draw, (9.6, 2.7 * down), "Curves over steps; at the end " + "; ".join(ends))


def svg(draw: Callable[["Figure"], None], inches: tuple[float, float], label: str) -> str:
    """A figure as SVG for inside a page: no header, no metadata, no ids that a second figure would
    repeat.

    matplotlib makes the remaining ids from what they name and a salt: the label keeps them apart,
    and the same from run to run.
    """
    out = io.StringIO()
    with extra("matplotlib").rc_context(STYLE | {"svg.hashsalt": label}), warnings.catch_warnings():
        # The browser has a font for it, and draws the text.
        warnings.filterwarnings("ignore", "Glyph")
        figure = extra("matplotlib.figure").Figure(figsize=inches, layout="constrained")
        draw(figure)
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=without)

    drawing = out.getvalue()
    drawing = re.sub(r'(<g) id="[^"]*"', r"\1", drawing[drawing.index("<svg") :])
    named = f'<svg role="img" aria-label="{escape(label)}"'
    return drawing.replace(INK, "currentColor").replace("<svg", named, 1)
