"""Results: tables, figures and verdicts of the paper's experiments, from the plain JSON of a run.

Every number is computed from the word errors per sentence in that JSON, every verdict by a rule
that is printed beside it. Any part of the cells will do; what lacks is said to be missing. It runs
nothing and knows no model. The paper is Zipper, arXiv:2405.18669.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
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
JUNCTIONS = "zip, the paper's junctions"
ORACLE, FLOOR = "oracle", "floor"
ARMS = (ZIP, FROZEN, BOTH, JUNCTIONS, PLAIN, MATCHED, ROWS)
COLOURS = dict(zip((ZIP, MATCHED, FROZEN, PLAIN, BOTH, ROWS), pages.PALETTE, strict=True))
SAID = {"asr": "speech to text", "tts": "text to speech"}
SEEDS, SENTENCES = 3, 300  # a comparison of fewer is shown, and decides nothing
# Characters at which a bin of figure 2 begins; in the paper the lines cross at about 100.
LENGTHS = (0, 40, 60, 80, 100, 150)
TITLES = {
    "table1": "Table 1: speech to text",
    "table2": "Table 2: text to speech",
    "figure2": "Figure 2: text to speech by length of the transcript",
    "figure3": "Figure 3: by number of aligned pairs",
    "figure4a": "Figure 4a: input projections",
    "figure4b": "Figure 4b: number of junctions",
    "shows": "Where towers are read",
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
    30: (4.6, 5.1), 10: (5.9, 7.2), 3: (8.6, 17), 2: (11.3, 31),
    1: (16, 103), 0.5: (72, 111), 0.3: (91, 114), 0.1: (133, 113),
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
    "highest seed. Interval: 95 %, by bootstrap over sentences with the seeds pooled; it says "
    "nothing of how seeds vary. p: Wilcoxon signed-rank test over the sentences' own error rates, "
    "averaged over seeds, against the parameter-matched and the plain baseline of the same size; "
    "two-sided. Floor: what a system gets that does not listen; oracle: the true units through the "
    "same chain."
)
#: What a run says of itself.
HEAD = ("preset", "commit", "command", "versions", "machine", "core_hours")

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
        arm, size = self.cell["arm"], self.cell["size"]
        return str(arm) if size in ("", "S") else f"{arm}, size {size}"

    def mean(self, name: str) -> dict[str, float]:
        """A field that holds numbers by name, averaged over seeds."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            for key, value in result[name].items():
                found.setdefault(key, []).append(value)
        return {key: fmean(values) for key, values in found.items()}


def _read(found: Mapping[str, Any]) -> list[Group]:
    if missing := {*HEAD, "results"} - found.keys():
        raise ZipperError(
            f"These results lack {', '.join(sorted(missing))}. Give the results.json that `zipper "
            "reproduce` writes."
        )
    for number, result in enumerate(found["results"]):
        if not isinstance(result, Mapping) or {"cell", "scores"} - result.keys():
            raise ZipperError(f"Result {number} is {result!r:.80}; it has no cell and scores.")

    def same(cell: Mapping[str, Any]) -> str:
        own = {key: cell[key] for key in cell.keys() - {"name", "seed", "tables"}}
        return json.dumps(own, sort_keys=True)

    def place(group: Group) -> int:
        return (*ARMS, group.cell["arm"]).index(group.cell["arm"])

    ordered: dict[str, list[Mapping[str, Any]]] = {}
    for result in found["results"]:
        ordered.setdefault(same(result["cell"]), []).append(result)
    groups = [Group(results[0]["cell"], results, _rates(results)) for results in ordered.values()]
    return sorted(groups, key=place)


def _rates(results: Sequence[Mapping[str, Any]]) -> dict[Key, Rate]:
    scores: dict[Key, dict[int, Mapping[str, Any]]] = {}
    for result in results:
        for score in result["scores"]:
            by_seed = scores.setdefault((score["task"], score["test"], score["judge"]), {})
            by_seed[result["cell"]["seed"]] = score

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
            f"{len(second.words)}, under one name. Evaluate both on the same test set."
        )


# --- verdicts ---


@dataclass(frozen=True)
class Rule:
    """A claim about word errors: those of `ours` do not lie above a bar, which is `share` of theirs
    (above the oracle where `over_oracle`) plus `margin`.

    part, least: at which share of the pairs, or at so many if that is more. fails: the claim is
    that they do lie above. measured: an aim of ours, for which the measured figure counts, and not
    a claim of the paper's.
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
        side = "above" if self.fails else "at or below"
        return f"WER of '{self.ours}' {side} {self.bar}{self.pairs}"


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
    "paper's holds if the room's whole interval is at or above 0, does not hold if all of it is "
    "below, and is undecided if 0 lies inside. For an aim of this project the measured figure "
    "counts: it holds if the room is not negative, does not hold if the interval lies below 0, and "
    "is undecided if the bar is missed by less than the interval. A comparison of fewer than "
    f"{SEEDS} seeds or {SENTENCES} sentences is shown, and decides nothing. Where test sets, sizes "
    "or judges disagree, the claim is undecided."
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

    table = "table1" if rule.task == "asr" else "table2"
    if rule.part < 1:
        table = "figure3"
    found = []
    for group in _of(groups, table):
        every = most[group.cell["corpus"]]
        pairs = max(round(rule.part * every), min(rule.least, every))
        if group.cell["arm"] != rule.ours or group.cell["pairs"] != pairs:
            continue
        for key in [key for key in group.rates if key[0] == rule.task]:
            oracle, theirs = _reference(groups, ORACLE, key), _reference(groups, FLOOR, key)
            if rule.theirs != FLOOR:
                theirs = _rival(groups, group, rule.theirs, table, key)
            if theirs is None or (rule.over_oracle and oracle is None):
                continue
            size = group.cell["size"]
            place = _place(key) + ("" if size == "S" else f", size {size}")
            found.append(_comparison(rule, place, group.rates[key], theirs, oracle))
    return found


def _comparison(
    rule: Rule, place: str, ours: Rate, theirs: Rate, oracle: Rate | None
) -> Comparison:
    for other in (theirs, oracle or ours):
        _same_sentences(ours, other)
    sure = np.zeros(len(ours.words))
    if rule.over_oracle and oracle:
        sure = oracle.edits
    bar = rule.share * theirs.edits + (1 - rule.share) * sure + rule.margin * ours.words

    wer = [float(edits.sum() / ours.words.sum()) for edits in (ours.edits, theirs.edits, bar)]
    seeds = len(ours.by_seed)
    if rule.theirs != FLOOR:
        seeds = min(seeds, len(theirs.by_seed))
    room = interval(bar - ours.edits, ours.words)
    return Comparison(rule, place, wer[0], wer[1], wer[2], room, seeds, len(ours.words))


def _verdict(rule: Rule, comparisons: Sequence[Comparison]) -> Verdict:
    if not comparisons:
        why = f"not run: it takes '{rule.ours}' and '{rule.theirs}' on one test set{rule.pairs}."
        return Verdict(rule.claim, "undecided", why, str(rule))
    counted = [c for c in comparisons if c.counts]
    by_state = {
        state: [c for c in counted or comparisons if c.state == state]
        for state in ("holds", "does not hold", "undecided")
    }
    states, said = {c.state for c in counted}, []
    for state, some in by_state.items():
        places = [
            f"{c.place} {_percent(c.ours)} % against a bar of {_percent(c.bar)} %" for c in some
        ]
        if some:
            said.append(f"{state}: " * (len(states) != 1) + ", ".join(places))

    state, why = "undecided", "the places disagree; "
    if not states:
        why = f"fewer than {SEEDS} seeds or {SENTENCES} sentences; so far "
    elif len(states) == 1:
        (state,) = states
        why = "too close to tell: " * (state == "undecided")
    return Verdict(rule.claim, state, why + "; ".join(said) + ".", str(rule))


def _preserved(groups: Sequence[Group]) -> list[Verdict]:
    """Claim (d): the text tower of every zip that froze it, on the path of one modality."""
    frozen = []
    for group in groups:
        if group.cell["arm"] in (ZIP, FROZEN):
            measured = [result for result in group.results if "text" in result["perplexity"]]
            frozen += [(one["cell"]["name"], one["perplexity"]["text"]) for one in measured]
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


Block: TypeAlias = str | Grid | Drawing


@dataclass(frozen=True)
class Section:
    """name: of the table of a cell, "" for the head."""

    name: str
    title: str
    blocks: Sequence[Block]


def tables(found: Mapping[str, Any]) -> str:
    """All that was found as Markdown, numbers only. found: what results.json holds. Raises
    ZipperError where it lacks something, or where systems that are compared were tested on
    different sentences.
    """
    sections = [_markdown(section) for section in _document(found)]
    return "\n\n".join(["# The paper's experiments", *sections]) + "\n"


def plain(found: Mapping[str, Any], only: Sequence[str] = ()) -> str:
    """Tables for a terminal, without notes. only: those a cell is a part of ("table1", ...); none =
    all, with the verdicts."""
    said = []
    for section in _document(found):
        if section.name in only or not only:
            grids = (block for block in section.blocks if isinstance(block, Grid))
            said += [_lined(grid, section.title) for grid in grids]
    return "\n\n".join(said)


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
        if blocks := BUILDERS.get(name, _ablation)(groups, name):
            notes = [NOTES[name]] if name in NOTES else []
            sections.append(Section(name, title, [*blocks, *notes]))
    ends = {
        "What was trained": _trained(groups),
        "The comparisons behind the verdicts": _behind(groups),
    }
    return [*sections, *(Section("", title, [grid]) for title, grid in ends.items() if grid.rows)]


def _head(found: Mapping[str, Any], groups: Sequence[Group]) -> Section:
    seeds, done, tested = set[int](), 0, dict[str, int]()
    for group in groups:
        tested |= {key[1]: len(rate.words) for key, rate in group.rates.items()}
        if not _is_reference(group):
            done += len(group.results)
            seeds |= {result["cell"]["seed"] for result in group.results}
    facts = {
        "preset": str(found["preset"]),
        "command": str(found["command"]),
        "commit": str(found["commit"]),
        "cost": f"{found['core_hours']:,.1f} core-hours",
        "machine": str(found["machine"]),
        "versions": ", ".join(f"{name} {value}" for name, value in found["versions"].items()),
        "cells": f"{done} done, seeds {', '.join(map(str, sorted(seeds))) or '-'}",
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
    compared = chain.from_iterable(_comparisons(rule, groups) for rule in RULES)
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
        for c in compared
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


def _scores(groups: Sequence[Group], name: str) -> list[Block]:
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
    grids: list[Block] = []
    for key in _keys(shown, task):
        rows = [_score(groups, group, key, name) for group in shown if key in group.rates]
        references = filter(_is_reference, groups)
        rows += [_score(groups, group, key, name) for group in references if key in group.rates]
        grids.append(Grid(f"{key[1]}, by {key[2]}", head, rows))
    return grids


def _score(groups: Sequence[Group], group: Group, key: Key, table: str) -> Sequence[str]:
    """A row of tables 1 and 2."""
    rate, trained = group.rates[key], not _is_reference(group)
    value, low, high = interval(rate.edits, rate.words)
    seeds = [100 * wer for wer in rate.by_seed.values()]
    ps = ["", ""]
    if trained:
        rivals = [_rival(groups, group, arm, table, key) for arm in (MATCHED, PLAIN)]
        ps = ["" if rival is None else _p(significance(rate, rival)) for rival in rivals]

    return (
        group.arm,
        str(len(seeds)) if trained else "",
        _percent(value),
        f"{min(seeds):.1f} - {max(seeds):.1f}" if len(seeds) > 1 else "",
        f"{_percent(low)} to {_percent(high)}",
        *ps,
        _percent(rate.unended) if trained else "",
        PAPER[table].get((group.cell["size"] if trained else "", group.cell["arm"]), ""),
    )


def _lengths(groups: Sequence[Group], name: str) -> list[Block]:
    """Figure 2: WER of the sentences of each length."""
    grids: list[Block] = []
    panels: list[Panel] = []
    for (key, size), column in _columns(_of(groups, name), "tts").items():
        characters = column[0].rates[key].characters
        edges = zip(LENGTHS, (*LENGTHS[1:], 10**9), strict=True)
        bins = [some for some in edges if _within(characters, *some).any()]
        labels = [
            f"{low} - {high - 1}" if high < 10**9 else f"{low} and more" for low, high in bins
        ]
        lines = {}
        for group in column:
            rate = group.rates[key]
            inside = [_within(rate.characters, *some) for some in bins]
            lines[group.cell["arm"]] = [interval(rate.edits[i], rate.words[i]) for i in inside]

        counts = [str(int(_within(characters, *some).sum())) for some in bins]
        rows = [
            (label, count, *(_bracketed(line[n]) for line in lines.values()))
            for n, (label, count) in enumerate(zip(labels, counts, strict=True))
        ]
        title, across = f"{key[1]}, by {key[2]}, size {size}", "characters of the transcript"
        grids.append(Grid(title, ("characters", "sentences", *lines), rows))
        panels.append(Panel(title, across, [float(n) for n in range(len(bins))], lines, labels))
    return [*_drawn("Word errors of text to speech by length of the transcript", panels), *grids]


def _sweep(groups: Sequence[Group], name: str) -> list[Block]:
    """Figure 3: WER by number of pairs."""
    grids: list[Block] = []
    panels: list[Panel] = []
    for task, said in SAID.items():
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
                there = [(arm, pairs) for arm in arms if (arm, pairs) in at]
                seeds = sorted({str(len(at[place].by_seed)) for place in there})
                cells = [
                    _bracketed(found[arm, pairs]) if (arm, pairs) in found else "" for arm in arms
                ]
                theirs = f"{paper[0]} / {paper[1]}" if paper else ""
                rows.append((f"{pairs:,}", f"{share:g}", " / ".join(seeds), *cells, theirs))

            title = f"{said.capitalize()}, {_place(key)}, size {size}"
            head = ("pairs", "share, %", "seeds", *arms, "paper, other data")
            grids.append(Grid(title, head, rows, words=0))
            nothing = (np.nan,) * 3
            lines = {arm: [found.get((arm, pairs), nothing) for pairs in counts] for arm in arms}
            panels.append(Panel(title, "aligned pairs", [float(pairs) for pairs in counts], lines))
    return [*_drawn("Word errors by number of aligned pairs", panels), *grids]


def _ablation(groups: Sequence[Group], name: str) -> list[Block]:
    """One thing varied: a row per value, a column per test set and judge."""
    shown = sorted(_of(groups, name), key=lambda group: len(group.cell["changes"]))
    if name == "schedule":
        what = itemgetter("arm", "corpus", "size", "pairs")
        same = [what(group.cell) for group in shown]
        shown += [group for group in _of(groups, "figure3") if what(group.cell) in same]
        shown.sort(
            key=lambda group: (
                -group.cell["pairs"],
                group.cell["arm"],
                name in group.cell["tables"],
            )
        )
    if not shown:
        return []
    keys = [*_keys(shown, "asr"), *_keys(shown, "tts")]
    tasks = list(dict.fromkeys(chain.from_iterable(group.mean("dev") for group in shown)))

    rows = []
    for group in shown:
        dev, said = group.mean("dev"), _changed(group.cell)
        if name == "schedule":
            said = f"{group.arm} {said}".strip()
        rates = [group.rates.get(key) for key in keys]
        rows.append(
            (
                said or group.arm,
                f"{group.cell['pairs']:,}",
                f"{group.cell['changes'].get('steps', 0):,}",
                str(len(group.results)),
                f"{group.mean('parameters').get('trained', 0):,.0f}",
                _gates(group),
                *(f"{dev[task]:.3f}" if task in dev else "" for task in tasks),
                *(_bracketed(interval(rate.edits, rate.words)) if rate else "" for rate in rates),
            )
        )
    head = (
        "",
        "pairs",
        "steps",
        "seeds",
        "trained parameters",
        "gates at the end",
        *(f"dev, {task}" for task in tasks),
        *(f"{SAID[key[0]]}, {_place(key)}" for key in keys),
    )
    return [Grid("WER in % (95 % interval); dev: nats per token", head, rows)]


def _kept(groups: Sequence[Group], name: str) -> list[Block]:
    """Perplexities before and after, and some continuations."""
    shown = [
        group
        for group in _of(groups, name)
        if any(result["perplexity"] for result in group.results)
    ]
    results = chain.from_iterable(group.results for group in shown)
    towers = list(dict.fromkeys(chain.from_iterable(one["perplexity"] for one in results)))
    rows = []
    for tower, group in product(towers, shown):
        measured = [one["perplexity"] for one in group.results]
        if measured := [one[tower] for one in measured if tower in one]:
            rows.append((tower, group.cell["corpus"], group.arm, *_perplexities(measured)))
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
    grids: list[Block] = [Grid("Perplexity", head, rows, words=3)] if rows else []

    for group in shown:
        said = group.results[0]["continuations"]
        if said and group.cell["arm"] in (ZIP, BOTH, MATCHED):
            lines = list(zip(*(texts[:4] for texts in said.values()), strict=False))
            title = f"Continuations, {group.cell['corpus']}, {group.arm}"
            grids.append(Grid(title, tuple(said), lines, words=len(said)))
    return grids


def _perplexities(measured: Sequence[Mapping[str, float]]) -> list[str]:
    """Means over seeds, and whether logits are equal to the bit."""
    cells = []
    for when in ("before", "after", "zip", "unrelated"):
        some = [one[when] for one in measured if when in one]
        cells.append(f"{fmean(some):.3f}" if some else "")

    identical = [one["identical"] == 1.0 for one in measured if "identical" in one]
    said = f"{sum(identical)} of {len(identical)} identical" if identical else ""
    return [*cells, "identical to the bit" if identical and all(identical) else said]


def _trained(groups: Sequence[Group]) -> Grid:
    rows = []
    for group in groups:
        if _is_reference(group):
            continue
        sizes, rates = group.mean("parameters"), group.mean("rates")
        steps = [
            f"{fmean(result[count] for result in group.results):,.0f}"
            for count in ("best_step", "steps")
        ]
        rows.append(
            (
                group.arm,
                group.cell["corpus"],
                _changed(group.cell),
                f"{group.cell['pairs']:,}",
                str(len(group.results)),
                *(f"{sizes.get(kind, 0):,.0f}" for kind in ("total", "trained")),
                ", ".join(f"{name.removeprefix('lr_')} {rate:.2g}" for name, rate in rates.items()),
                " of ".join(steps),
                f"{fmean(result['core_s'] for result in group.results):,.0f}",
            )
        )
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
    title = "Learning rates were searched on dev; numbers are means over seeds"
    return Grid(title, head, rows, words=3)


BUILDERS: Mapping[str, Callable[[Sequence[Group], str], list[Block]]] = {
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
    there = dict.fromkeys(chain.from_iterable(group.rates for group in groups))
    return [key for key in there if key[0] == task]


def _columns(groups: Sequence[Group], task: str) -> dict[tuple[Key, str], list[Group]]:
    """The groups that may be compared: same test set, judge and size of tower."""
    sizes = sorted({group.cell["size"] for group in groups}, reverse=True)
    found = {}
    for key, size in product(_keys(groups, task), sizes):
        mine = [group for group in groups if key in group.rates and group.cell["size"] == size]
        if mine:
            found[key, size] = mine
    return found


def _within(characters: Int64[np.ndarray, " sentences"], low: int, high: int) -> np.ndarray:
    return (characters >= low) & (characters < high)


def _changed(cell: Mapping[str, Any]) -> str:
    """What sets a cell apart from its arm, in words; the number of steps has a column of its
    own."""
    said = []
    for name, value in cell["changes"].items():
        if name == "junctions":
            blocks = ", ".join(str(one["text"]) for one in value)
            said.append(f"{_many(len(value), 'junction')}, after blocks {blocks}")
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
        named: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel)
            named |= {str(line.get_label()): line for line in axes.get_lines()}
        figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=len(ARMS))

    return [Drawing(label, draw, (9.6, 0.4 + 3.0 * down))]


def _draw(axes: Any, panel: Panel) -> None:
    for n, (arm, line) in enumerate(panel.lines.items()):
        value, low, high = 100 * np.array(line).T
        x = np.array(panel.x)
        # So that intervals do not hide one another.
        shift = (n - (len(panel.lines) - 1) / 2) * 0.08
        x = x + shift if panel.labels else x * np.exp(shift)
        colour = COLOURS.get(arm)
        dashes = "--" if arm.startswith("baseline") else "-"
        axes.plot(x, value, label=arm, marker="o", markersize=3.5, color=colour, linestyle=dashes)
        axes.vlines(x, low, high, color=colour, linewidth=1)

    if panel.labels:
        axes.set_xticks(panel.x, panel.labels)
    else:
        axes.set_xscale("log")
        axes.set_xticks(panel.x, [f"{count:,.0f}" for count in panel.x])
        axes.minorticks_off()
    axes.set(title=panel.title, xlabel=panel.across, ylabel="WER, %", ylim=(0, None))
    axes.grid()


# --- the document as Markdown and as text ---


def _markdown(section: Section) -> str:
    said = [f"## {section.title}"]
    for block in section.blocks:
        if isinstance(block, Grid):
            rows = [[*map(_cell, row)] for row in (block.head, *block.rows)]
            lines = _aligned(rows, block.words)
            rule = [
                "-" * (len(cell) - 1) + ("-" if n < block.words else ":")
                for n, cell in enumerate(lines[0])
            ]
            lines.insert(1, rule)
            said += [f"**{block.title}**"] * bool(block.title)
            said.append("\n".join(f"|{'|'.join(line)}|" for line in lines))
        elif isinstance(block, str):
            said.append(block)
    return "\n\n".join(said)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _lined(grid: Grid, title: str) -> str:
    lines = ["".join(line).rstrip() for line in _aligned([grid.head, *grid.rows], grid.words)]
    head = f"{title}: {grid.title}" if grid.title else title
    return "\n".join([head, *filter(None, lines)])


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
