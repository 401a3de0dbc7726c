"""What the decoding benchmark compares: arms that must say the same tokens do, and count what they
read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zipper.cli import main
from zipper.errors import ZipperError
from zipper_lab.bench import Here, decode
from zipper_lab.bench.decode import ARMS, SAME, SIZES, Settings, bench, build, markdown, timed

MEMORY = torch.ones(1000)
IDS = [5, 9, 7, 30]


def turn(arm: str, source: int = 12) -> dict[str, float]:
    return timed(
        build(Settings(arm, "tiny", source=source, prompt=6, tokens=len(IDS))), IDS, "cpu", MEMORY
    )


def test_arms_that_compute_the_same_choose_the_same_tokens() -> None:
    choices = {
        arm: turn(arm)["choice"] for arm in {arm for pair in SAME for arm in pair} - {"static"}
    }  # it would compile
    assert [
        pair for pair in SAME if "static" not in pair and choices[pair[0]] != choices[pair[1]]
    ] == []
    assert choices["zip"] != choices["blind"], "the source is seen"


@pytest.mark.slow  # `make gpu` runs it, on a real one
def test_arms_on_a_gpu_choose_the_tokens_of_the_cpu(cuda: torch.device) -> None:
    memory, made = torch.ones(1000, device=cuda), (decode._made, decode._zip, decode._reader)
    for arm in ("zip", "blind", "bare", "steps", "streams", "stock", "expanded", "mllama"):
        there = timed(
            build(Settings(arm, "tiny", source=12, prompt=6, tokens=4, device=str(cuda))),
            IDS,
            str(cuda),
            memory,
        )
        if not torch.cuda.is_available():  # a GPU has random numbers of its own
            assert there["choice"] == turn(arm)["choice"], arm
        assert there["decode_s"] > 0 and there["read"] > 0
    for known in made:
        known.cache_clear()  # what was made on the pretended device


def test_arms_in_one_process_share_weights_take_turns_and_may_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order, told = list[str](), list[dict[str, Any]]()

    def turns(settings: Settings) -> Callable[[], dict[str, float]]:
        def take() -> dict[str, float]:
            order.append(settings.arm)
            if settings.arm == "stock" and order.count("stock") == 3:
                raise RuntimeError("CUDA out of memory")
            return turn("bare") | {"prefill_flops": 1.0}

        return take

    monkeypatch.setattr(decode, "_turns", turns)
    found = bench("tiny", 3, 1, ["zip", "bare", "stock"], here=Here(told=told.append))
    assert order == [
        "zip",
        "bare",
        "stock",
        "stock",
        "bare",
        "zip",
        "zip",
        "bare",
        "stock",
        "bare",
        "zip",
    ]
    assert [*found["arms"]] == ["zip", "bare"] and found["rounds"] == 3 and len(told) == 4
    assert "CUDA out of memory" in found["lost"][
        "stock"
    ] and "Lost: stock: RuntimeError: CUDA out of memory" in markdown(found)
    assert "stock" in told[2]["arms"] or "stock" in told[1]["arms"]
    order.clear()
    assert bench("tiny", 9, 1, ["zip", "bare"], here=Here(apart=True, seconds=0.0))["rounds"] == 3
    assert order == ["zip"] * 4 + ["bare"] * 4


def test_what_cannot_see_goes_beside_the_tower_alone_on_the_same_weights() -> None:
    said, arm = list[tuple[str, int, torch.Tensor]](), build(Settings("blind", "tiny", prompt=6))
    assert arm.beside is not None

    def heard(
        name: str, start: Callable[[], Callable[[int], torch.Tensor]]
    ) -> Callable[[], Callable[[int], torch.Tensor]]:
        def started() -> Callable[[int], torch.Tensor]:
            step = start()

            def counted(i: int) -> torch.Tensor:
                said.append((name, i, step(i)))
                return said[-1][2]

            return counted

        return started

    found = timed(
        arm._replace(start=heard("blind", arm.start), beside=heard("alone", arm.beside)),
        IDS,
        "cpu",
        MEMORY,
    )
    assert [name for name, *_ in said[len(IDS) :]] == ["alone", "blind", "blind", "alone"] * 2
    logits = {
        name: [row for who, _, row in said[len(IDS) :] if who == name]
        for name in ("alone", "blind")
    }
    assert torch.equal(torch.stack(logits["alone"]), torch.stack(logits["blind"])), (
        "links cost no bit while nothing is visible"
    )
    assert found["in_turn_s"] > 0 and found["beside_s"] > 0 and turn("bare")["beside_s"] == 0


def test_blind_by_bare_is_what_went_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {arm: [turn(arm)] for arm in ("blind", "bare")}
    said["blind"][0] |= {"in_turn_s": 2.0, "beside_s": 1.0}
    monkeypatch.setattr(decode, "take_turns", lambda *given: said)
    (row,) = bench("tiny", 1, arms=["blind", "bare"])["ratios"]
    assert (row["above"], row["below"], row["median"]) == ("blind", "bare", 0.5)


def test_the_other_arms_read_the_same_number_of_tokens() -> None:
    for arm in ("int8", "expanded", "mllama", "streams", "lanes", "apart"):
        found = turn(arm)
        assert found["tokens"] == len(IDS) * found["streams"] and found["decode_s"] > 0
        streams = {"streams": 8, "lanes": 2, "apart": 2}
        assert found["streams"] == streams.get(arm, 1)
        assert (found["beside_s"] > 0) == (arm == "lanes")


def test_lanes_read_one_another_and_what_goes_apart_does_not() -> None:
    lanes, apart = (build(Settings(arm, "tiny", 12, 6)).start() for arm in ("lanes", "apart"))
    assert torch.equal(lanes(5), apart(5)), "in the first step there is nothing new to see"
    assert not torch.equal(lanes(9), apart(9))


def test_a_batch_is_so_many_sequences_in_every_arm() -> None:
    for arm in ("zip", "bare", "stock", "expanded", "mllama", "streams"):
        one, three = (
            timed(build(Settings(arm, "tiny", 12, 6, batch=batch)), IDS, "cpu", MEMORY)
            for batch in (1, 3)
        )
        assert three["streams"] == 3 * one["streams"] and three["tokens"] == 3 * one["tokens"]
        assert three["choice"] == one["choice"], "the first of them reads what it reads alone"


def test_a_step_reads_weights_once_and_keys_and_values_of_every_sequence() -> None:
    shape = SIZES["tiny"]["text"]
    width, hidden, layers = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_hidden_layers"],
    )
    tower = layers * (4 * width * width + 3 * width * hidden) + shape["vocab_size"] * width
    link = 4 * width * width  # query, output, and a feed-forward of factor 1
    links, own, memory = (
        layers // 2 - 1,
        layers * 2 * 6 * width,
        2 * 12 * width,
    )  # 6 tokens of text, 12 of speech
    assert turn("bare")["bytes"] == turn("blind")["bytes"] == 4 * (tower + own)
    assert turn("zip")["bytes"] == 4 * (tower + own + links * (link + memory))
    assert turn("streams")["bytes"] == 4 * (tower + links * link + 8 * (own + links * memory))


def test_the_work_of_a_prefill_is_that_of_blocks_and_links() -> None:
    shape = SIZES["tiny"]["text"]  # both towers have it, and vocabularies of their own
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    block = 4 * width * width + 3 * width * hidden
    source, prompt = 12, 6
    assert turn("expanded", source)["prefill_flops"] == 2 * 4 * block * (source + prompt)
    reading = 4 * width * width  # query, output and feed-forward
    shown = 3 * width * width  # projection, keys and values
    assert turn("zip", source)["prefill_flops"] == 2 * (
        (2 * block + shown) * source + (4 * block + reading) * prompt
    )


def test_mllama_sees_its_source() -> None:
    arm = build(Settings("mllama", "tiny", source=3, prompt=2))
    with torch.inference_mode():
        assert not torch.equal(
            arm.start()(5), build(Settings("mllama", "tiny", source=9, prompt=2)).start()(5)
        )


def test_arms_that_choose_other_tokens_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {arm: [{"choice": float(n)}] for n, arm in enumerate(("zip", "steps"))}
    monkeypatch.setattr(decode, "take_turns", lambda *given: said)
    with pytest.raises(ZipperError, match="'zip' and 'steps' choose other tokens"):
        bench("tiny", 1, arms=["zip", "steps"])


def test_unknown_arms_and_sizes_are_refused() -> None:
    with pytest.raises(ZipperError, match="no arms"):
        bench("tiny", 1, arms=["zap"])
    with pytest.raises(ZipperError, match=r"'whole'.* on cpu"):
        bench("tiny", 1, arms=["whole"])
    with pytest.raises(ZipperError, match="no size"):
        bench("9b", 1)


@pytest.mark.slow
def test_the_command_measures_what_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "zip,bare,steps,stock"
    sizes = ["--size", "tiny", "--rounds", "2", "--warm", "1", "--tokens", "4"]
    main(
        ["bench", "decode", *sizes, "--arms", arms, "--output", str(tmp_path / "decode"), "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "decode.json").read_text())
    lines = markdown(found)
    assert lines == (tmp_path / "decode.md").read_text()
    assert all(f"| {arm}: {ARMS[arm]}" in lines for arm in arms.split(","))
    assert {(row["above"], row["below"]) for row in found["ratios"]} == {
        ("zip", "bare"),
        ("zip", "stock"),
        ("zip", "steps"),
    }
