"""The benchmark: what it says of FLOPs against torch's own count, of ratios against arithmetic, and
whether arms take turns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from zipper.cli import main
from zipper.errors import ZipperError
from zipper.tower import Tower
from zipper_lab.baseline import Baseline
from zipper_lab.bench import ratio, take_turns, write
from zipper_lab.bench.train import (
    ARMS,
    EQUAL,
    LONGEST,
    RATIOS,
    Settings,
    bench,
    build,
    markdown,
    mix,
)

TURNS = """
import json, sys, time
from zipper_lab.bench import serve
settings, done = json.loads(sys.argv[1]), []

def turn():
    print("a library talks")
    done.append(time.monotonic())
    if len(done) > settings["most"]:
        sys.exit(3)
    return {"seconds": settings["seconds"], "at": done[-1]}

serve(turn)
"""


@pytest.mark.parametrize("name", ["bare", "expanded", "frozen", "trained"])
def test_flops_by_formula_are_those_that_torch_counts(name: str) -> None:
    """Of matrices to 1 %: torch counts the attention of pairs that a mask hides too."""
    arm = build(Settings(name, size="tiny", pairs=2))
    with FlopCounterMode(display=False) as counter:
        given = arm.given(0)
        arm.step(given)
    pairs = given.pairs
    assert (list(pairs), given.padding) == ([EQUAL] * 2, 0.0)
    products = {
        op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    }
    assert sum(products.values()) == pytest.approx(
        arm.flops(pairs) - attention(name, len(pairs)), rel=0.01
    )


def attention(name: str, pairs: int) -> float:
    """FLOPs of attention in the tiny towers: text has four blocks of width 64, speech three of 32,
    with junctions behind the first and the second. A token sees itself and those before it;
    gradients cost twice as much where something learns below.
    """
    text, speech = EQUAL["text"], EQUAL["speech"]

    def own(tokens: int, width: int, forwards: int, backwards: int) -> float:
        return 4 * width * sum(range(1, tokens + 1)) * (forwards + 2 * backwards)

    if name in ("bare", "expanded"):
        return pairs * own(text + speech, 64, 4, 4)
    links = 2 * 3 * 4 * text * speech * 64
    if name == "frozen":
        return pairs * (own(text, 64, 4, 3) + own(speech, 32, 2, 0) + links)
    return pairs * (own(text, 64, 4, 4) + own(speech, 32, 2, 2) + links)


def test_a_frozen_zip_trains_its_links_alone_and_a_trained_one_everything() -> None:
    learns = {
        name: {
            n.split(".")[0]
            for n, p in build(Settings(name, size="tiny")).model.named_parameters()
            if p.requires_grad
        }
        for name in ("frozen", "trained")
    }
    assert learns == {"frozen": {"links"}, "trained": {"links", "towers"}}


def test_the_packed_arm_reads_what_the_padded_one_reads_in_fewer_slots() -> None:
    found = {
        name: build(Settings(name, size="tiny", pairs=6)).given(3) for name in ("padded", "packed")
    }
    assert found["padded"][0] == found["packed"][0] == mix(6, 3)
    assert found["packed"][1] < found["padded"][1] / 2


def test_the_mix_is_as_long_as_is_said() -> None:
    speech = [pair["speech"] / 50 for pair in mix(4000, 0)]
    assert max(speech) <= LONGEST / 50
    assert sum(speech[1::2]) / 2000 == pytest.approx(5.8, rel=0.05)
    assert sum(speech[::2]) / 2000 == pytest.approx(11.6, rel=0.05)


def test_a_ratio_is_the_median_of_rounds_and_lies_in_its_interval() -> None:
    assert ratio([2.0, 4.0, 30.0], [1.0, 2.0, 3.0]) == (2, 2, 10)
    above = [1.5 + 0.01 * n for n in range(15)]
    found = ratio(above, [1.0] * 15)
    assert found.median == above[7] and above[0] < found.low < found.median < found.high < above[-1]


def test_arms_take_turns_forwards_and_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "an_arm.py").write_text(TURNS)
    monkeypatch.chdir(tmp_path)
    arms = {name: {"seconds": seconds, "most": 4} for name, seconds in {"a": 1.0, "b": 2.0}.items()}
    found = take_turns("an_arm", arms, rounds=3, warm=1)
    assert {name: [turn["seconds"] for turn in turns] for name, turns in found.items()} == {
        "a": [1.0] * 3,
        "b": [2.0] * 3,
    }
    order = sorted((turn["at"], name) for name, turns in found.items() for turn in turns)
    # The round before them was "ab".
    assert "".join(name for _, name in order) == "ba" + "ab" + "ba"
    with pytest.raises(ZipperError, match="The arm 'a' ended with code 3"):
        take_turns("an_arm", arms, rounds=9, warm=0)


MEMORY = """
import json, mmap
from zipper_lab.bench import resident
resident()
said, size = [resident()], 256 << 20
held = mmap.mmap(-1, size)  # asked of the system, not of an allocator that may have some left
for page in range(0, size, mmap.PAGESIZE):
    held[page] = 1
said.append(resident())
held.close()
print(json.dumps([*said, resident()]))
"""


def test_memory_is_that_of_the_process() -> None:
    """In a process of its own, in which nothing else takes memory or gives some back meanwhile."""
    said = json.loads(
        subprocess.run(
            [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
        ).stdout
    )
    (before, _), (holding, most), (after, still) = said
    assert holding - before == pytest.approx(
        256 << 20, rel=0.02
    ) and holding - after == pytest.approx(256 << 20, rel=0.02)
    # The kernel counts by some pages.
    assert most >= holding and still == pytest.approx(holding, rel=0.02)


def test_unknown_arms_sizes_and_too_little_room_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ZipperError, match=r"no arms \['frosen'\]"):
        bench("tiny", 1, arms=["frosen"])
    with pytest.raises(ZipperError, match="no size 'small'; there are tiny, 30m"):
        bench("small", 1)
    with pytest.raises(ZipperError, match="Give --room 1002"):
        bench("tiny", 1, room=500)
    assert main(["bench", "train", "--size", "small"]) == 2
    assert "zipper bench train: There is no size 'small'" in capsys.readouterr().err


def test_the_table_has_every_arm_and_a_verdict_for_every_ratio(tmp_path: Path) -> None:
    arm = {
        "pairs_per_s": 2.0,
        "gflop_per_pair": 3.0,
        "gflop_per_s": 6.0,
        "padding": 0.04,
        "peak_memory": 5e6,
    }
    arms = dict.fromkeys(ARMS, arm | {"trained_parameters": 7_000_000})
    rows = [
        {
            "what": what,
            "above": above,
            "below": below,
            "target": target,
            "median": target + n % 2 - 0.5,
            "low": 0.1,
            "high": 9.0,
        }
        for n, (what, above, below, target) in enumerate(RATIOS)
    ]
    found = {
        "hardware": "a machine",
        "month": "2026-11",
        "versions": {"torch": "2"},
        "rounds": 3,
        "settings": {"size": "tiny"},
    }
    found |= {"arms": arms, "ratios": rows}
    lines = markdown(found)
    assert all(f"| {name}: {about} |" in lines for name, about in ARMS.items())
    assert [
        line.count("(held)") - line.count("(missed)")
        for line in lines.splitlines()
        if " / " in line
    ] == [-1, 1] * (len(RATIOS) // 2)
    write(tmp_path / "new" / "train_a", found, lines)
    assert json.loads((tmp_path / "new" / "train_a.json").read_text()) == found
    assert (tmp_path / "new" / "train_a.md").read_text() == lines


def test_the_extended_decoder_is_as_large_as_the_baseline() -> None:
    """The arm in stock transformers has the shape of zipper's own `Baseline`."""
    stock = build(Settings("expanded", size="tiny", pairs=1)).model
    bare = build(Settings("bare", size="tiny", pairs=1)).model
    ours = Baseline.from_tower(
        {"text": Tower(bare)}, {"speech": 40}, {"text": (0, 1), "speech": (0, 1)}
    )  # type: ignore[arg-type]
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.slow
def test_the_command_measures_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "train_tiny"
    options = ["--size", "tiny", "--rounds", "2", "--warm", "1", "--pairs", "4", "--threads", "1"]
    assert main(["bench", "train", *options, "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(output.with_suffix(".json").read_text())
    assert {*ARMS} - {*found["arms"]} == {"flex"} and len(found["ratios"]) == len(RATIOS) - 1
    for arm in found["arms"].values():
        assert len(arm["seconds"]) == 2 and min(arm["seconds"]) > 0 and arm["peak_memory"] > 1e6


def test_a_dot_in_a_results_name_is_its_own(tmp_path: Path) -> None:
    for name in ("train_0.5b", "train_0.75b", "decode.json", "speech.md"):
        write(tmp_path / name, {"name": name}, f"# {name}\n")
    stems = ("train_0.5b", "train_0.75b", "decode", "speech")
    every = {f"{stem}{ending}" for stem in stems for ending in (".json", ".md")}
    assert {path.name for path in tmp_path.iterdir()} == every
    assert json.loads((tmp_path / "train_0.5b.json").read_text()) == {"name": "train_0.5b"}
