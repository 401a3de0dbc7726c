"""Results: tables, figures and verdicts of the paper's experiments, from the plain JSON of a run.

Every number is computed from the word errors per sentence in that JSON, every verdict by a rule
that is printed beside it. Any part of the cells will do; what lacks is said to be missing. It runs
nothing and knows no model. The paper is Zipper, arXiv:2405.18669.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from zipper import pages
from zipper.errors import ZipperError
from zipper.saving import files
from zipper.statistics import bootstrap, share, wilcoxon

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).parent / "templates" / "results.html"
ABOUT = (
    "The experiments of the Zipper paper (arXiv:2405.18669) on other and smaller data, with "
    "baselines of equal size, several seeds and intervals. What it claims, and what was found."
)
ZIP, FROZEN, BOTH = "zip, speech trained", "zip, speech frozen", "zip, text trained too"
PLAIN, MATCHED, ROWS = "baseline", "baseline, matched", "baseline, speech rows"
ORACLE, FLOOR = "oracle", "floor"
ARMS = (ZIP, FROZEN, BOTH, PLAIN, MATCHED, ROWS)
COLOURS = dict(zip((ZIP, MATCHED, FROZEN, PLAIN, BOTH, ROWS), pages.PALETTE, strict=True))
SEEDS, SENTENCES = 3, 300  # a comparison of fewer is shown, and decides nothing
LENGTHS = (
    0,
    40,
    60,
    80,
    100,
    150,
)  # characters at which a bin of figure 2 begins; in the paper the lines cross at about 100
TITLES = {
    "table1": "Table 1: speech to text",
    "table2": "Table 2: text to speech",
    "figure2": "Figure 2: text to speech by length of the transcript",
    "figure3": "Figure 3: by number of aligned pairs",
    "figure4a": "Figure 4a: input projections",
    "figure4b": "Figure 4b: number of junctions",
    "gate": "Gates at birth",
    "positions": "Positions in cross-attention",
    "depth": "Depth of the cross projection",
    "lora": "An adapter on the text tower against a frozen one",
    "schedule": "More steps",
    "towers": "What the towers could do, before and after",
}
# The paper's own figures: other data, other towers, other judges. Its text towers T and G, with a
# speech tower of 128M, stand beside our sizes S and L.
PAPER = {
    "table1": {
        ("S", ZIP): "3.54 / 8.34",
        ("S", FROZEN): "3.47 / 8.37",
        ("S", PLAIN): "3.78 / 7.53",
        ("L", ZIP): "3.31 / 7.70",
        ("L", FROZEN): "3.36 / 7.90",
        ("L", PLAIN): "3.49 / 7.09",
    },
    "table2": {
        ("S", ZIP): "20.14",
        ("S", FROZEN): "27.87",
        ("S", PLAIN): "33.38",
        ("L", ZIP): "17.70",
        ("L", FROZEN): "22.48",
        ("L", PLAIN): "32.35",
        ("", ORACLE): "6.00",
    },
}
PAPER_SWEEP = {
    30: (4.6, 5.1), 10: (5.9, 7.2), 3: (8.6, 17), 2: (11.3, 31), 1: (16, 103), 0.5: (72, 111), 0.3: (91, 114), 0.1: (133, 113),
}  # fmt: skip
NOTES = {
    "table1": "The paper: WER on LibriSpeech test-clean / test-other, other data than ours. Its "
    "largest zip (G/1B) had 3.17 / "
    "7.42 with the speech tower trained and 2.95 / 7.15 with it frozen.",
    "table2": "The paper: WER on LibriTTS test-clean, other data than ours, the best of three "
    "vocoder and recogniser runs per "
    "sentence; ours is a single run. Its largest zip (G/1B) had 19.97 with the speech tower "
    "trained and 20.35 with it frozen.",
    "figure2": "In the paper the baseline is the better one below about 100 characters, the zip "
    "above. In brackets the interval.",
    "figure3": "In brackets the interval. The paper: zip / single decoder on LibriSpeech at this "
    "share of its pairs, read off "
    "its plot, +-1; 1 % of them are about 2,800 utterances. A corpus with a single number of "
    "pairs stands in tables 1 and 2 only.",
    "figure4a": "The paper (speech to text / text to speech): all kept 3.58 / 20.66, no text "
    "projection 3.75 / 26.52, no speech "
    "projection 3.60 / 19.86, none 3.77 / 26.26.",
    "figure4b": "The paper, 1 / 2 / 4 / 8 junctions: speech to text 3.62 / 3.61 / 3.58 / 3.62, "
    "text to speech 20.34 / 20.52 / "
    "20.66 / 18.51.",
    "towers": "Perplexity per token. Alone: the path of one modality; through the zip: with the "
    "other modality of the pair in "
    "front. Means over seeds. The paper did not measure this.",
}
READING = (
    "WER: word errors per reference word, in %, mean over seeds, beside it the lowest and the "
    "highest seed. Interval: 95 %, by "
    "bootstrap over sentences with the seeds pooled; it says nothing of how seeds vary. p: "
    "Wilcoxon signed-rank test over the "
    "sentences' own error rates, averaged over seeds, against the parameter-matched and the plain "
    "baseline of the same size; "
    "two-sided. Floor: what a system gets that does not listen; oracle: the true units through "
    "the same chain."
)
Key: TypeAlias = tuple[str, str, str]  # task, test set, judge
Numbers: TypeAlias = Float64[np.ndarray, " sentences"]


# --- what was measured ---


@dataclass(frozen=True)
class Rate:
    """Word errors of one system on one test set by one judge. edits: per sentence, mean over seeds;
    by_seed: WER of each."""

    edits: Numbers
    words: Int64[np.ndarray, " sentences"]
    characters: Int64[np.ndarray, " sentences"]
    by_seed: dict[int, float]
    unended: float


@dataclass(frozen=True)
class Group:
    """Results of one cell under all its seeds: `results` as they stand in the JSON, `cell` that of
    the first."""

    cell: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    rates: Mapping[Key, Rate]

    @property
    def arm(self) -> str:
        """Name of the arm, with the size of its text tower where it is not S."""
        return self.cell["arm"] + (
            f", size {self.cell['size']}" if self.cell["size"] not in ("", "S") else ""
        )

    def mean(self, name: str) -> dict[str, float]:
        """A field that holds numbers by name, averaged over seeds."""
        found = [result[name] for result in self.results]
        return {
            key: fmean(one[key] for one in found if key in one)
            for key in dict.fromkeys(key for one in found for key in one)
        }


def _read(found: Mapping[str, Any]) -> list[Group]:
    missing = {
        "preset",
        "commit",
        "command",
        "versions",
        "machine",
        "core_hours",
        "results",
    } - found.keys()
    if missing:
        raise ZipperError(
            f"These results lack {', '.join(sorted(missing))}. Give the results.json that `zipper "
            "reproduce` writes."
        )

    def same(result: Mapping[str, Any]) -> str:
        return json.dumps(
            {
                key: value
                for key, value in result["cell"].items()
                if key not in ("name", "seed", "tables")
            },
            sort_keys=True,
        )

    ordered: dict[str, list[Mapping[str, Any]]] = {}
    for result in found["results"]:
        ordered.setdefault(same(result), []).append(result)
    groups = [Group(results[0]["cell"], results, _rates(results)) for results in ordered.values()]
    return sorted(
        groups,
        key=lambda group: ARMS.index(group.cell["arm"]) if group.cell["arm"] in ARMS else len(ARMS),
    )


def _rates(results: Sequence[Mapping[str, Any]]) -> dict[Key, Rate]:
    scores: dict[Key, dict[int, Mapping[str, Any]]] = {}
    for result in results:
        for score in result["scores"]:
            scores.setdefault((score["task"], score["test"], score["judge"]), {})[
                result["cell"]["seed"]
            ] = score
    rates = {}
    for key, by_seed in scores.items():
        one = next(iter(by_seed.values()))
        if any(score["words"] != one["words"] for score in by_seed.values()):
            raise ZipperError(
                f"The seeds of {results[0]['cell']['name']} were tested on different sentences of "
                f"{key[1]!r}. Run them again."
            )
        rates[key] = Rate(
            np.mean([score["edits"] for score in by_seed.values()], axis=0),
            np.array(one["words"]),
            np.array(one["characters"]),
            {seed: sum(score["edits"]) / sum(score["words"]) for seed, score in by_seed.items()},
            fmean(score["unended"] for score in by_seed.values()),
        )
    return rates


def interval(edits: Numbers, words: Int64[np.ndarray, " sentences"]) -> tuple[float, float, float]:
    """Edits per word of a corpus and its 95 % interval by bootstrap over sentences. Edits may be
    differences, and negative."""
    low, high = bootstrap(share, edits, words)
    value = float(share(edits, words))
    return round(value, 12), round(low, 12), round(high, 12)  # a bar just reached is reached


def significance(first: Rate, second: Rate) -> float:
    """p of `wilcoxon` over the sentences' own error rates, averaged over seeds."""
    _same_sentences(first, second)
    return wilcoxon((first.edits - second.edits) / first.words)


def _same_sentences(first: Rate, second: Rate) -> None:
    if not np.array_equal(first.words, second.words):
        raise ZipperError(
            f"Two systems were tested on different sentences, {len(first.words)} and "
            f"{len(second.words)}, under one name. "
            "Evaluate both on the same test set."
        )


# --- verdicts ---


@dataclass(frozen=True)
class Rule:
    """A claim about word errors: those of `ours` do not lie above a bar, which is `share` of theirs
    (above the oracle where `over_oracle`) plus `margin`. part, least: at which share of the pairs,
    or at so many if that is more. fails: the claim is that they do lie above. measured: an aim of
    ours, for which the measured figure counts, and not a claim of the paper's.
    """

    claim: str
    task: str
    ours: str
    theirs: str
    bar: str
    share: float = 1.0
    margin: float = 0.0
    over_oracle: bool = False
    part: float = 1.0
    least: int = 0
    fails: bool = False
    measured: bool = False

    @property
    def pairs(self) -> str:
        """On how many pairs, in words."""
        least = f" (or {self.least}, if that is more)" if self.least else ""
        return "" if self.part == 1 else f", with {100 * self.part:g} % of the pairs{least}"

    def __str__(self) -> str:
        return f"WER of '{self.ours}' {'above' if self.fails else 'at or below'} {self.bar}{self.pairs}"


RULES = (
    Rule("(a) speech to text is as good as a decoder with expanded vocabulary", "asr", ZIP, MATCHED,
         "the matched baseline's WER plus one point", margin=0.01),
    Rule("(a) freezing the text tower costs nothing", "asr", ZIP, BOTH,
         "the WER of 'zip, text trained too' plus one point", margin=0.01),
    Rule("(b) text to speech has 40 % fewer word "
         "errors", "tts", ZIP, MATCHED, "60 % of the matched baseline's WER", share=0.6),
    Rule("(b) text to speech is best with the speech tower "
         "trained", "tts", ZIP, FROZEN, "the WER of 'zip, speech frozen'"),
    Rule("(c) 1 % of the pairs is enough for the "
         "zip", "asr", ZIP, FLOOR, "half of the floor's WER", share=0.5, part=0.01),
    Rule("(c) with 1 % of the pairs the baseline "
         "fails", "asr", MATCHED, FLOOR, "half of the floor's WER",
         share=0.5, part=0.01, fails=True),
    Rule("Aim: speech to text of the zip is not above the matched "
         "baseline", "asr", ZIP, MATCHED, "the matched baseline's WER",
         measured=True),
    Rule("Aim: text to speech, WER above the oracle's is 40 % less", "tts", ZIP, MATCHED,
         "the oracle's WER plus 60 % of what the matched baseline has above "
         "it", share=0.6, over_oracle=True, measured=True),
    Rule("Aim: with 10 % of the pairs the zip's speech to text at least halves the baseline's "
         "errors", "asr", ZIP, MATCHED,
         "half of the matched baseline's WER", share=0.5, part=0.1, least=400, measured=True),
)  # fmt: skip
KEPT = 1.01  # perplexity after by before, up to which a tower kept what it could do
DECISION = (
    "How it is decided. Room is the bar minus our WER, on the same sentences. A claim of the "
    "paper's holds if the room's whole "
    "interval is at or above 0, does not hold if all of it is below, and is undecided if 0 lies "
    "inside. For an aim of this "
    "project the measured figure counts: it holds if the room is not negative, does not hold if "
    "the interval lies below 0, and "
    "is undecided if the bar is missed by less than the interval. A comparison of fewer than "
    f"{SEEDS} seeds or {SENTENCES} "
    "sentences is shown, and decides nothing. Where test sets, sizes or judges disagree, the "
    "claim is undecided."
)


@dataclass(frozen=True)
class Comparison:
    """One rule at one place: a corpus, test set, size and judge. room: how far our WER lies below
    the bar, with its interval."""

    rule: Rule
    place: str
    ours: float
    theirs: float
    bar: float
    room: tuple[float, float, float]
    seeds: int
    sentences: int

    @property
    def counts(self) -> bool:
        """Whether there are seeds and sentences enough to decide anything."""
        return self.seeds >= SEEDS and self.sentences >= SENTENCES

    @property
    def state(self) -> str:
        """ "holds", "does not hold" or "undecided"."""
        room, low, high = self.room
        if (room if self.rule.measured else low) >= 0:
            return "does not hold" if self.rule.fails else "holds"
        if high < 0:
            return "holds" if self.rule.fails else "does not hold"
        return "undecided"


@dataclass(frozen=True)
class Verdict:
    """A claim, "holds", "does not hold" or "undecided", and why in a few words."""

    claim: str
    state: str
    why: str
    rule: str


def verdicts(found: Mapping[str, Any]) -> list[Verdict]:
    """What the results say of each claim of the paper and each aim of this project, by `RULES`.
    Raises ZipperError as `tables`."""
    return _verdicts(_read(found))


def _verdicts(groups: Sequence[Group]) -> list[Verdict]:
    decided = [_verdict(rule, _comparisons(rule, groups)) for rule in RULES]
    return sorted(
        [*decided, *_preserved(groups)], key=lambda verdict: verdict.claim.startswith("Aim")
    )


def _comparisons(rule: Rule, groups: Sequence[Group]) -> list[Comparison]:
    """The rule wherever both of its arms were run on as many pairs as it asks for."""
    most: dict[str, int] = {}
    for group in groups:
        most[group.cell["corpus"]] = max(group.cell["pairs"], most.get(group.cell["corpus"], 0))
    table = "figure3" if rule.part < 1 else "table1" if rule.task == "asr" else "table2"
    found = []
    for group in _of(groups, table):
        corpus, size, pairs = (group.cell[name] for name in ("corpus", "size", "pairs"))
        if group.cell["arm"] != rule.ours or pairs != max(
            round(rule.part * most[corpus]), min(rule.least, most[corpus])
        ):
            continue
        for key, ours in group.rates.items():
            reference = _reference(groups, ORACLE, key)
            theirs = (
                _reference(groups, FLOOR, key)
                if rule.theirs == FLOOR
                else _rival(groups, group, rule.theirs, table, key)
            )
            if key[0] != rule.task or theirs is None or (rule.over_oracle and reference is None):
                continue
            oracle = (
                reference.edits if rule.over_oracle and reference else np.zeros(len(ours.words))
            )
            for other in (theirs, reference or ours):
                _same_sentences(ours, other)
            bar = rule.share * theirs.edits + (1 - rule.share) * oracle + rule.margin * ours.words
            rates = [
                float(edits.sum() / ours.words.sum()) for edits in (ours.edits, theirs.edits, bar)
            ]
            seeds = min(
                len(rate.by_seed) for rate in ((ours,) if rule.theirs == FLOOR else (ours, theirs))
            )
            place = _place(key) + ("" if size == "S" else f", size {size}")
            room = interval(bar - ours.edits, ours.words)
            found.append(
                Comparison(rule, place, rates[0], rates[1], rates[2], room, seeds, len(ours.words))
            )
    return found


def _verdict(rule: Rule, comparisons: Sequence[Comparison]) -> Verdict:
    if not comparisons:
        why = f"not run: it takes '{rule.ours}' and '{rule.theirs}' on one test set{rule.pairs}."
        return Verdict(rule.claim, "undecided", why, str(rule))
    counted = [c for c in comparisons if c.counts]
    by_state = {
        state: [c for c in counted or comparisons if c.state == state]
        for state in ("holds", "does not hold", "undecided")
    }
    said = [
        f"{state}: " * (len({c.state for c in counted}) != 1)
        + ", ".join(
            f"{c.place} {_percent(c.ours)} % against a bar of {_percent(c.bar)} %" for c in some
        )
        for state, some in by_state.items()
        if some
    ]
    states = {c.state for c in counted}
    clear = "too close to tell: " * (states == {"undecided"})
    why = {0: f"fewer than {SEEDS} seeds or {SENTENCES} sentences; so far ", 1: clear}.get(
        len(states), "the places disagree; "
    )
    return Verdict(
        rule.claim,
        states.pop() if len(states) == 1 else "undecided",
        why + "; ".join(said) + ".",
        str(rule),
    )


def _preserved(groups: Sequence[Group]) -> list[Verdict]:
    """Claim (d): the text tower of every zip that froze it, on the path of one modality."""
    frozen = [
        (result["cell"]["name"], result["perplexity"]["text"])
        for group in groups
        for result in group.results
        if group.cell["arm"] in (ZIP, FROZEN) and "text" in result["perplexity"]
    ]
    tested = {
        "(d) the text tower keeps what it could do": (
            f"perplexity alone after at most {KEPT} times that before, in every zip with a frozen "
            "text tower",
            [name for name, text in frozen if text["after"] > KEPT * text["before"]],
        ),
        "Aim: text on its own path is identical to the bit": (
            "logits alone equal to the bit, in every zip with a frozen text tower",
            [name for name, text in frozen if text.get("identical") != 1.0],
        ),
    }
    found = []
    for claim, (rule, broken) in tested.items():
        state, why = "undecided", "not run: no zip with a frozen text tower."
        if frozen:
            state = "does not hold" if broken else "holds"
            why = f"so in {len(frozen) - len(broken)} of {_many(len(frozen), 'run')}"
            why += f"; not in {', '.join(broken[:3])}." if broken else "."
        found.append(Verdict(claim, state, why, rule))
    return found


def _of(groups: Iterable[Group], table: str) -> list[Group]:
    """The groups of a table, without references."""
    return [
        group
        for group in groups
        if table in group.cell["tables"] and not group.cell["arm"].startswith((ORACLE, FLOOR))
    ]


def _rival(groups: Sequence[Group], group: Group, arm: str, table: str, key: Key) -> Rate | None:
    """How another arm did under the same conditions; None where it was not run, or is the group
    itself."""
    wanted = {name: group.cell[name] for name in ("corpus", "size", "pairs")} | {"arm": arm}
    others = (
        other
        for other in _of(groups, table)
        if other is not group and all(other.cell[name] == value for name, value in wanted.items())
    )
    return next((other.rates[key] for other in others if key in other.rates), None)


def _reference(groups: Sequence[Group], arm: str, key: Key) -> Rate | None:
    """The oracle or floor of a test set: where there are several, the one with the fewest
    errors."""
    rates = [
        group.rates[key]
        for group in groups
        if group.cell["arm"].startswith(arm) and key in group.rates
    ]
    return min(rates, key=lambda rate: float(rate.edits.sum()), default=None)


def _place(key: Key) -> str:
    task, test, judge = key
    return test if task == "asr" else f"{test} by {judge}"


# --- the document: sections of sentences, grids and drawings ---


@dataclass(frozen=True)
class Grid:
    """A table of words. words: how many of its columns, from the left, are text rather than
    numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Drawing:
    """A figure to be, for the HTML page alone."""

    label: str
    draw: Callable[["Figure"], None]
    inches: tuple[float, float]


@dataclass(frozen=True)
class Section:
    """name: of the table of a cell, "" for the head."""

    name: str
    title: str
    blocks: Sequence[str | Grid | Drawing]


def tables(found: Mapping[str, Any]) -> str:
    """All that was found as Markdown, numbers only. found: what results.json holds. Raises
    ZipperError where it lacks something, or where systems that are compared were tested on
    different sentences.
    """
    return (
        "\n\n".join(
            ["# The paper's experiments", *(_markdown(section) for section in _document(found))]
        )
        + "\n"
    )


def plain(found: Mapping[str, Any], only: Sequence[str] = ()) -> str:
    """Tables for a terminal, without notes. only: those a cell is a part of ("table1", ...); none =
    all, with the verdicts."""
    shown = [section for section in _document(found) if section.name in only or not only]
    return "\n\n".join(
        _lined(block, section.title)
        for section in shown
        for block in section.blocks
        if isinstance(block, Grid)
    )


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write results.md and results.html, one page that asks the network for nothing. Raises
    ZipperError as `tables` does, and where matplotlib or jinja2 is missing."""
    text = tables(found)
    pages.write(
        folder / "results.html",
        PAGE,
        title="The paper's experiments, run again",
        about=ABOUT,
        sections=_document(found),
        drawn=lambda drawing: pages.svg(drawing.draw, drawing.inches, drawing.label),
    )
    files.write(folder / "results.md", text.encode())


def _document(found: Mapping[str, Any]) -> list[Section]:
    groups = _read(found)
    sections = [_head(found, groups), _verdict_section(groups)]
    for name, title in TITLES.items():
        builder = BUILDERS.get(name, _ablation)
        if blocks := builder(groups, name):
            sections.append(
                Section(name, title, [*blocks, *([NOTES[name]] if name in NOTES else [])])
            )
    ends = {
        "What was trained": _trained(groups),
        "The comparisons behind the verdicts": _behind(groups),
    }
    return [*sections, *(Section("", title, [grid]) for title, grid in ends.items() if grid.rows)]


def _head(found: Mapping[str, Any], groups: Sequence[Group]) -> Section:
    cells = [
        result["cell"] for group in groups for result in group.results if not _is_reference(group)
    ]
    tested = {key[1]: len(rate.words) for group in groups for key, rate in group.rates.items()}
    facts = {
        "preset": str(found["preset"]),
        "command": str(found["command"]),
        "commit": str(found["commit"]),
        "cost": f"{found['core_hours']:,.1f} core-hours",
        "machine": str(found["machine"]),
        "versions": ", ".join(f"{name} {value}" for name, value in found["versions"].items()),
        "cells": f"{len(cells)} done, seeds "
        f"{', '.join(map(str, sorted({cell['seed'] for cell in cells}))) or '-'}",
        "test sentences": ", ".join(f"{test} {count}" for test, count in sorted(tested.items()))
        or "-",
    }
    return Section("", "The run", [Grid("", ("", ""), list(facts.items()), words=2), READING])


def _verdict_section(groups: Sequence[Group]) -> Section:
    decided = _verdicts(groups)
    said = Grid(
        "", ("claim", "verdict", "why"), [(v.claim, v.state, v.why) for v in decided], words=3
    )
    rules = Grid(
        "The rules", ("claim", "holds where"), [(v.claim, v.rule) for v in decided], words=2
    )
    return Section("", "Verdicts", [said, rules, DECISION])


def _behind(groups: Sequence[Group]) -> Grid:
    rows = [
        (
            c.rule.claim,
            c.place,
            *(_percent(rate) for rate in (c.ours, c.theirs, c.bar)),
            f"{100 * c.room[0]:+.1f} ({100 * c.room[1]:+.1f} to {100 * c.room[2]:+.1f})",
            str(c.seeds),
            str(c.sentences),
            c.state if c.counts else f"{c.state}, not counted",
        )
        for rule in RULES
        for c in _comparisons(rule, groups)
    ]
    head = (
        "claim",
        "where",
        "ours",
        "theirs",
        "bar",
        "room, points",
        "seeds",
        "sentences",
        "so it",
    )
    return Grid("WER in %", head, rows, words=2)


def _scores(groups: Sequence[Group], name: str) -> list[str | Grid | Drawing]:
    """Tables 1 and 2: one grid per test set and judge."""
    task = "asr" if name == "table1" else "tts"
    shown = _of(groups, name)
    head = (
        "",
        "seeds",
        "WER",
        "seeds from - to",
        "95 % interval",
        "p, matched",
        "p, plain",
        "never ended, %",
        "paper, other data",
    )
    grids: list[str | Grid | Drawing] = []
    for key in _keys(shown, task):
        rows = []
        for group in [*shown, *filter(_is_reference, groups)]:
            if key not in group.rates:
                continue
            rate = group.rates[key]
            value, low, high = interval(rate.edits, rate.words)
            rivals = [
                None if _is_reference(group) else _rival(groups, group, arm, name, key)
                for arm in (MATCHED, PLAIN)
            ]
            seeds = [100 * wer for wer in rate.by_seed.values()]
            rows.append(
                (
                    group.arm,
                    "" if _is_reference(group) else str(len(seeds)),
                    _percent(value),
                    f"{min(seeds):.1f} - {max(seeds):.1f}" if len(seeds) > 1 else "",
                    f"{_percent(low)} to {_percent(high)}",
                    *("" if rival is None else _p(significance(rate, rival)) for rival in rivals),
                    "" if _is_reference(group) else _percent(rate.unended),
                    PAPER[name].get(
                        ("" if _is_reference(group) else group.cell["size"], group.cell["arm"]), ""
                    ),
                )
            )
        grids.append(Grid(f"{key[1]}, by {key[2]}", head, rows))
    return grids


def _lengths(groups: Sequence[Group], name: str) -> list[str | Grid | Drawing]:
    """Figure 2: WER of the sentences of each length."""
    grids: list[str | Grid | Drawing] = []
    panels: list[Panel] = []
    for (key, size), column in _columns(_of(groups, name), "tts").items():
        characters = column[0].rates[key].characters
        bins = [
            (low, high)
            for low, high in zip(LENGTHS, (*LENGTHS[1:], 10**9), strict=True)
            if _within(characters, low, high).any()
        ]
        labels = [
            f"{low} - {high - 1}" if high < 10**9 else f"{low} and more" for low, high in bins
        ]
        lines = {
            group.cell["arm"]: [
                interval(group.rates[key].edits[inside], group.rates[key].words[inside])
                for inside in (
                    _within(group.rates[key].characters, low, high) for low, high in bins
                )
            ]
            for group in column
        }
        counts = [str(int(_within(characters, low, high).sum())) for low, high in bins]
        rows = [
            (label, count, *(_bracketed(line[n]) for line in lines.values()))
            for n, (label, count) in enumerate(zip(labels, counts, strict=True))
        ]
        title = f"{key[1]}, by {key[2]}, size {size}"
        grids.append(Grid(title, ("characters", "sentences", *lines), rows))
        panels.append(
            Panel(
                title,
                "characters of the transcript",
                [float(n) for n in range(len(bins))],
                lines,
                labels,
            )
        )
    return [*_drawn("Word errors of text to speech by length of the transcript", panels), *grids]


def _sweep(groups: Sequence[Group], name: str) -> list[str | Grid | Drawing]:
    """Figure 3: WER by number of pairs."""
    grids: list[str | Grid | Drawing] = []
    panels: list[Panel] = []
    for task in ("asr", "tts"):
        for (key, size), column in _columns(_of(groups, name), task).items():
            counts = sorted({group.cell["pairs"] for group in column})
            if len(counts) < 2:
                continue
            arms = list(dict.fromkeys(group.cell["arm"] for group in column))
            at = {(group.cell["arm"], group.cell["pairs"]): group.rates[key] for group in column}
            found = {place: interval(rate.edits, rate.words) for place, rate in at.items()}
            rows = []
            for pairs in counts:
                share = 100 * pairs / counts[-1]
                paper = PAPER_SWEEP.get(round(share, 2)) if task == "asr" else None
                seeds = "".join(
                    sorted({str(len(at[arm, pairs].by_seed)) for arm in arms if (arm, pairs) in at})
                )
                cells = (
                    _bracketed(found[arm, pairs]) if (arm, pairs) in found else "" for arm in arms
                )
                rows.append(
                    (
                        f"{pairs:,}",
                        f"{share:g}",
                        " / ".join(seeds),
                        *cells,
                        f"{paper[0]} / {paper[1]}" if paper else "",
                    )
                )
            title = f"{'Speech to text' if task == 'asr' else 'Text to speech'}, {_place(key)}, size {size}"
            grids.append(
                Grid(
                    title, ("pairs", "share, %", "seeds", *arms, "paper, other data"), rows, words=0
                )
            )
            lines = {
                arm: [found.get((arm, pairs), (np.nan,) * 3) for pairs in counts] for arm in arms
            }
            panels.append(Panel(title, "aligned pairs", [float(pairs) for pairs in counts], lines))
    return [*_drawn("Word errors by number of aligned pairs", panels), *grids]


def _ablation(groups: Sequence[Group], name: str) -> list[str | Grid | Drawing]:
    """One thing varied: a row per value, a column per test set and judge."""
    shown = sorted(_of(groups, name), key=lambda group: len(group.cell["changes"]))
    if name == "schedule":
        what = itemgetter("arm", "corpus", "size", "pairs")
        same = [what(group.cell) for group in shown]
        found = [group for group in _of(groups, "figure3") if what(group.cell) in same]
        shown = sorted(
            [*found, *shown], key=lambda group: (-group.cell["pairs"], group.cell["arm"])
        )
    if not shown:
        return []
    keys = [key for task in ("asr", "tts") for key in _keys(shown, task)]
    tasks = list(dict.fromkeys(task for group in shown for task in group.mean("dev")))
    rows = [
        (
            " ".join(filter(None, [(name == "schedule") * group.arm, _changed(group.cell)]))
            or group.arm,
            f"{group.cell['pairs']:,}",
            f"{group.cell['changes'].get('steps', 0):,}",
            str(len(group.results)),
            f"{group.mean('parameters').get('trained', 0):,.0f}",
            _gates(group),
            *(
                f"{group.mean('dev')[task]:.3f}" if task in group.mean("dev") else ""
                for task in tasks
            ),
            *(
                _bracketed(interval(group.rates[key].edits, group.rates[key].words))
                if key in group.rates
                else ""
                for key in keys
            ),
        )
        for group in shown
    ]
    named = {"asr": "speech to text", "tts": "text to speech"}
    head = (
        "",
        "pairs",
        "steps",
        "seeds",
        "trained parameters",
        "gates at the end",
        *(f"dev, {task}" for task in tasks),
    )
    columns = [f"{named[key[0]]}, {_place(key)}" for key in keys]
    return [Grid("WER in % (95 % interval); dev: nats per token", (*head, *columns), rows)]


def _kept(groups: Sequence[Group], name: str) -> list[str | Grid | Drawing]:
    """Perplexities before and after, and some continuations."""
    shown = [
        group
        for group in _of(groups, name)
        if any(result["perplexity"] for result in group.results)
    ]
    towers = list(
        dict.fromkeys(
            tower for group in shown for result in group.results for tower in result["perplexity"]
        )
    )
    rows = []
    for group, tower in ((group, tower) for tower in towers for group in shown):
        measured = [
            result["perplexity"][tower] for result in group.results if tower in result["perplexity"]
        ]
        if not measured:
            continue
        means = [
            [one[when] for one in measured if when in one]
            for when in ("before", "after", "zip", "unrelated")
        ]
        identical = [one["identical"] == 1.0 for one in measured if "identical" in one]
        said = (
            (
                "identical to the bit"
                if all(identical)
                else f"{sum(identical)} of {len(identical)} identical"
            )
            if identical
            else ""
        )
        rows.append(
            (
                tower,
                group.cell["corpus"],
                group.arm,
                *(f"{fmean(some):.3f}" if some else "" for some in means),
                said,
            )
        )
    head = (
        "tower",
        "corpus",
        "",
        "before",
        "alone, after",
        "through the zip",
        "unrelated in front",
        "logits alone",
    )
    grids: list[str | Grid | Drawing] = [Grid("Perplexity", head, rows, words=3)] if rows else []
    for group in shown:
        said = group.results[0]["continuations"]
        if said and group.cell["arm"] in (ZIP, BOTH, MATCHED):
            spoken = [
                tuple(line) for line in zip(*(texts[:4] for texts in said.values()), strict=False)
            ]
            grids.append(
                Grid(
                    f"Continuations, {group.cell['corpus']}, {group.arm}",
                    tuple(said),
                    spoken,
                    words=len(said),
                )
            )
    return grids


def _trained(groups: Sequence[Group]) -> Grid:
    rows = [
        (
            group.arm,
            group.cell["corpus"],
            _changed(group.cell),
            f"{group.cell['pairs']:,}",
            str(len(group.results)),
            *(f"{group.mean('parameters').get(kind, 0):,.0f}" for kind in ("total", "trained")),
            ", ".join(
                f"{name.removeprefix('lr_')} {rate:.2g}"
                for name, rate in group.mean("rates").items()
            ),
            " of ".join(
                f"{fmean(result[count] for result in group.results):,.0f}"
                for count in ("best_step", "steps")
            ),
            f"{fmean(result['core_s'] for result in group.results):,.0f}",
        )
        for group in groups
        if not _is_reference(group)
    ]
    head = (
        "arm",
        "corpus",
        "changed",
        "pairs",
        "seeds",
        "parameters",
        "trained",
        "learning rates",
        "best step",
        "core-s each",
    )
    return Grid(
        "Learning rates were searched on dev; numbers are means over seeds", head, rows, words=3
    )


BUILDERS: Mapping[str, Callable[[Sequence[Group], str], list[str | Grid | Drawing]]] = {
    "table1": _scores,
    "table2": _scores,
    "figure2": _lengths,
    "figure3": _sweep,
    "towers": _kept,
}


def _is_reference(group: Group) -> bool:
    return group.cell["arm"].startswith((ORACLE, FLOOR))


def _keys(groups: Iterable[Group], task: str) -> list[Key]:
    """Test sets and judges of a task, in the order in which they appear."""
    return list(dict.fromkeys(key for group in groups for key in group.rates if key[0] == task))


def _columns(groups: Sequence[Group], task: str) -> dict[tuple[Key, str], list[Group]]:
    """The groups that may be compared: same test set, judge and size of tower."""
    sizes = sorted({group.cell["size"] for group in groups}, reverse=True)
    found = {
        (key, size): [
            group for group in groups if key in group.rates and group.cell["size"] == size
        ]
        for key in _keys(groups, task)
        for size in sizes
    }
    return {place: column for place, column in found.items() if column}


def _within(characters: Int64[np.ndarray, " sentences"], low: int, high: int) -> np.ndarray:
    return (characters >= low) & (characters < high)


def _changed(cell: Mapping[str, Any]) -> str:
    """What sets a cell apart from its arm, in words; the number of steps has a column of its
    own."""
    said = []
    for name, value in cell["changes"].items():
        if name == "junctions":
            said.append(
                f"{_many(len(value), 'junction')}, after blocks "
                f"{', '.join(str(one['text']) for one in value)}"
            )
        elif isinstance(value, Mapping):
            said += [f"{name}.{inner} {setting}" for inner, setting in value.items()]
        elif name != "steps" and value is not None:
            said.append(f"{name} {value}")
    return "; ".join(said)


def _gates(group: Group) -> str:
    values = group.mean("gates").values()
    return f"{min(values):.2f} - {max(values):.2f}" if values else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _bracketed(found: tuple[float, float, float]) -> str:
    value, low, high = map(_percent, found)
    return f"{value} ({low} to {high})"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


# --- drawings ---


@dataclass(frozen=True)
class Panel:
    """Lines with intervals over the same x. lines: by arm, (value, low, high) as fractions at each
    x. labels: of x; none = x is logarithmic."""

    title: str
    across: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    labels: Sequence[str] = ()


def _drawn(label: str, panels: Sequence[Panel]) -> list[Drawing]:
    """All panels as one drawing, two abreast."""
    if not panels:
        return []
    down = -(-len(panels) // 2)

    def draw(figure: "Figure") -> None:
        grid = list(figure.subplots(down, 2, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid, panels, strict=False):
            for n, (arm, line) in enumerate(panel.lines.items()):
                value, low, high = 100 * np.array(line).T
                x = np.array(panel.x)
                shift = (
                    n - (len(panel.lines) - 1) / 2
                ) * 0.08  # so that intervals do not hide one another
                x = x + shift if panel.labels else x * np.exp(shift)
                style = {
                    "color": COLOURS.get(arm),
                    "linestyle": "--" if arm.startswith("baseline") else "-",
                }
                axes.plot(x, value, label=arm, marker="o", markersize=3.5, **style)
                axes.vlines(x, low, high, color=style["color"], linewidth=1)
            if panel.labels:
                axes.set_xticks(panel.x, panel.labels)
            else:
                axes.set_xscale("log")
                axes.set_xticks(panel.x, [f"{count:,.0f}" for count in panel.x])
                axes.minorticks_off()
            axes.set(title=panel.title, xlabel=panel.across, ylabel="WER, %", ylim=(0, None))
            axes.grid()
        named = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=len(ARMS))

    return [Drawing(label, draw, (9.6, 0.4 + 3.0 * down))]


# --- the document as Markdown and as text ---


def _markdown(section: Section) -> str:
    said = [f"## {section.title}"]
    for block in section.blocks:
        if isinstance(block, Grid):
            rows = [
                [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
                for row in (block.head, *block.rows)
            ]
            lines = _aligned(rows, block.words)
            lines.insert(
                1,
                [
                    "-" * (len(cell) - 1) + ("-" if n < block.words else ":")
                    for n, cell in enumerate(lines[0])
                ],
            )
            said += [f"**{block.title}**"] * bool(block.title) + [
                "\n".join(f"|{'|'.join(line)}|" for line in lines)
            ]
        elif isinstance(block, str):
            said.append(block)
    return "\n\n".join(said)


def _lined(grid: Grid, title: str) -> str:
    lines = ["".join(line).rstrip() for line in _aligned([grid.head, *grid.rows], grid.words)]
    return "\n".join(
        [f"{title}{f': {grid.title}' if grid.title else ''}", *(line for line in lines if line)]
    )


def _aligned(rows: Sequence[Sequence[str]], words: int) -> list[list[str]]:
    """Cells padded to the width of their column, sentences excepted, with a blank on each side;
    text to the left, numbers to the right."""
    widths = [
        max(len(cell) for cell in column if len(cell) < 80) for column in zip(*rows, strict=True)
    ]
    return [
        [
            f" {cell:<{width}} " if n < words else f" {cell:>{width}} "
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
