"""The zipped forward against what it must equal: bare towers, literal masks, a naive reference, and
itself in other layouts."""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import (
    LAYERS,
    LLAMAS,
    SMALL,
    TOKENS,
    VOCABULARY,
    WIDTH,
    assert_close,
    bare,
    by_token,
    draw,
    first_segment_is_bare,
    is_the_reference,
    lay,
    nothing_leaks,
    number,
    packed_is_separate,
    unchecked,
    unimodal_is_bare,
    zipped,
)
from torch import Tensor, nn

from zipper import model as models
from zipper.composition import compose
from zipper.config import ZipperConfig
from zipper.errors import ZipperError
from zipper.growth import add
from zipper.link import PAPER_LINK, LinkConfig
from zipper.model import Zipper
from zipper.strand import Ends, Segment, collate, visible
from zipper.testing import FAMILIES, tiny_tower
from zipper.tower import Strand

THREE = {"text": "llama", "speech": "gpt2", "image": "qwen3"}
LLAMAS_3 = dict.fromkeys(THREE, "llama")
PAPER = dataclasses.replace(PAPER_LINK, head_width=8)
every_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# Identity: a new zip is its towers, and a tower alone is never anything else.


@every_kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_zip_gives_every_towers_own_logits_bit_for_bit(family: str, attention: str) -> None:
    model = zipped({"text": family, "speech": "llama"}, attention=attention, awake=False)
    dice = random.Random(0)
    same_length = [
        number(
            draw(dice, [first], 1, most)
            + draw(dice, [second], 1, most)
            + draw(dice, [first], 1, most)
        )
        for first, second, most in [("text", "speech", 1)] * 2
    ]
    layouts = [
        lay(same_length),
        lay([number(draw(dice, ["text", "speech"], 5)) for _ in range(4)], left=True),
    ]
    assert all((strand.document >= 0).all() for strand in layouts[0].values())
    assert not all((strand.document >= 0).all() for strand in layouts[1].values())
    for strands in layouts:
        for name, logits in model(strands).items():
            valid = strands[name].document >= 0
            assert torch.equal(logits[valid], bare(model, name, strands[name])[valid])


@every_kernel
def test_a_new_zip_of_three_towers_gives_their_own_logits_bit_for_bit(attention: str) -> None:
    model = zipped(THREE, {"text": 2}, attention=attention, awake=False)
    dice = random.Random(1)
    for left in (False, True):
        strands = lay([number(draw(dice, list(THREE), 6)) for _ in range(4)], left)
        for name, logits in model(strands).items():
            valid = strands[name].document >= 0
            assert torch.equal(logits[valid], bare(model, name, strands[name])[valid])


@every_kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_one_modality_alone_has_the_bits_of_the_bare_tower_however_awake_the_zip_is(
    family: str, attention: str
) -> None:
    unimodal_is_bare(zipped({"text": family, "speech": "llama"}, attention=attention))


def test_one_modality_of_three_alone_has_the_bits_of_the_bare_tower_in_the_papers_preset() -> None:
    unimodal_is_bare(zipped(THREE, preset="paper", link=PAPER))


@every_kernel
def test_what_has_nothing_to_see_has_the_bits_of_the_bare_tower_however_awake_the_gates_are(
    attention: str,
) -> None:
    for family in ("llama", "gpt2", "gemma3"):
        first_segment_is_bare(
            zipped(
                {"text": family, "speech": "qwen3"}, input_projection="none", attention=attention
            )
        )


def test_awake_links_and_awake_projections_do_change_the_logits() -> None:
    strands = lay([number([("text", 3), ("speech", 4), ("text", 5)])])
    for options in ({"input_projection": "none"}, {"gates": False}):
        model = zipped(LLAMAS, **options)
        for name, logits in model(strands).items():
            assert (logits - bare(model, name, strands[name])).abs().max() > 1e-2


# The mask rule, as pictures: a row is what reads, a column what is read.

ENDS = {"text": Ends(0, 1), "speech": Ends(0, 1)}
SPEECH, TEXT = Segment("speech", [2, 3]), Segment("text", [4])


def picture(target: Strand, source: Strand, row: int = 0) -> list[str]:
    return ["".join(str(int(seen)) for seen in reader) for reader in visible(target, source)[row]]


def test_recognition_text_sees_all_speech_and_speech_no_text() -> None:
    strands = collate([[SPEECH, TEXT]], ENDS).strands
    assert picture(strands["text"], strands["speech"]) == ["1111", "1111", "1111"]
    assert picture(strands["speech"], strands["text"]) == ["000", "000", "000", "000"]


def test_synthesis_speech_sees_all_text_and_text_no_speech() -> None:
    strands = collate([[TEXT, SPEECH]], ENDS).strands
    assert picture(strands["speech"], strands["text"]) == ["111", "111", "111", "111"]
    assert picture(strands["text"], strands["speech"]) == ["0000", "0000", "0000"]


def test_text_between_two_speeches_sees_the_first_and_is_seen_by_the_second() -> None:
    strands = collate([[SPEECH, TEXT, SPEECH]], ENDS).strands
    assert picture(strands["text"], strands["speech"]) == ["11110000", "11110000", "11110000"]
    assert picture(strands["speech"], strands["text"]) == [
        "000",
        "000",
        "000",
        "000",
        "111",
        "111",
        "111",
        "111",
    ]


def test_packed_documents_do_not_see_each_other() -> None:
    strands = collate([[SPEECH, TEXT], [TEXT, SPEECH], [TEXT]], ENDS, packed=[[0, 1, 2]]).strands
    assert picture(strands["text"], strands["speech"]) == ["11110000"] * 3 + ["00000000"] * 6
    assert picture(strands["speech"], strands["text"]) == ["000000000"] * 4 + ["000111000"] * 4


def test_padding_sees_nothing_and_is_not_seen() -> None:
    samples = [[SPEECH, TEXT], [Segment("speech", [2]), Segment("text", [4, 5])]]
    left, right = collate(samples, ENDS, left=True).strands, collate(samples, ENDS).strands
    assert picture(left["text"], left["speech"]) == ["0000", "1111", "1111", "1111"]
    assert picture(right["text"], right["speech"]) == ["1111", "1111", "1111", "0000"]
    assert picture(left["text"], left["speech"], row=1) == ["0111"] * 4
    assert picture(right["text"], right["speech"], row=1) == ["1110"] * 4
    assert (
        picture(left["speech"], left["text"], row=1)
        == picture(right["speech"], right["text"], row=1)
        == ["0000"] * 4
    )


def test_streams_side_by_side_see_strictly_the_past() -> None:
    def stream(*time: int) -> Strand:
        times = torch.tensor([time])
        return Strand(times, torch.arange(len(time))[None], times, torch.zeros_like(times))

    assert picture(stream(0, 2, 4), stream(0, 1, 2, 3, 4)) == ["00000", "11000", "11110"]


# The forward, against the naive reference.

JUNCTIONS = [
    {"text": 1, "speech": 1},
    {"text": 2, "speech": 1},
    {"text": 1, "speech": 3},
    {"text": 3, "speech": 2},
]


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("every", JUNCTIONS, ids=str)
def test_a_zip_of_two_is_the_naive_reference_and_so_are_its_gradients(
    every: dict[str, int], preset: str
) -> None:
    model = zipped(LLAMAS, every, preset=preset, link=PAPER if preset == "paper" else SMALL)
    for seed in range(2):
        is_the_reference(model, draw(random.Random(seed), ["text", "speech"], 4 + seed, 3))


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_zip_of_three_is_the_naive_reference_and_so_are_its_gradients(preset: str) -> None:
    model = zipped(LLAMAS_3, preset=preset, link=PAPER if preset == "paper" else SMALL)
    is_the_reference(model, draw(random.Random(3), list(LLAMAS_3), 6, 2))
    is_the_reference(model, draw(random.Random(4), ["text", "image"], 4, 2), gradients=False)


def test_a_zip_with_junctions_by_hand_is_the_naive_reference() -> None:
    junctions = [{"text": 1, "image": 2}, {"text": 3, "speech": 2}]
    is_the_reference(
        zipped(LLAMAS_3, junctions=junctions), draw(random.Random(5), list(LLAMAS_3), 6, 2)
    )


# No leak.


@lru_cache
def woken(number: int) -> Zipper:
    """One of 18 zips: families with grouped queries, learned positions and sliding windows,
    intervals of 1 to 3, both kernels, single, half and mixed precision (half towers, single links),
    with dropout, the default and the paper's links.
    """
    families = [
        {"text": "llama", "speech": "gpt2"},
        {"text": "gemma3", "speech": "mistral"},
        THREE,
    ][number % 3]
    precision = number // 3 % 3
    model = zipped(
        families,
        [{"text": 2}, {}, {"speech": 3}][(number + precision) % 3],
        attention="sdpa" if number < 9 else "eager",
        dtype=torch.bfloat16 if precision == 2 else torch.float32,
        train=("speech",),
        preset="paper" if number % 5 == 4 else "default",
        link=dataclasses.replace(PAPER if number % 5 == 4 else SMALL, dropout=0.1),
    )
    return model.to(torch.bfloat16) if precision == 1 else model


def no_leaks(zip_number: int, seeds: Sequence[int]) -> None:
    """One random case per seed: 1 to 6 segments, any modality first; rows packed, padded left or
    right; in training or not."""
    model, seen = woken(zip_number), 0
    towers = list(model.config.towers)
    for seed in seeds:
        dice = random.Random(f"{zip_number} {seed}")
        model.train(dice.random() < 0.5)
        documents = [
            [number(draw(dice, towers, dice.randint(1, 6)), d) for d in range(dice.randint(1, 3))]
            for _ in range(2)
        ]
        packed = dice.random() < 0.5
        rows = [
            [token for document in row for token in document] if packed else row[0]
            for row in documents
        ]
        row = dice.randrange(2)
        document = dice.randrange(len(documents[row]) if packed else 1)
        length = len(documents[row][document])
        time = dice.randint(length // 2, length - 1)
        control = nothing_leaks(
            model, lay(rows, left=not packed and dice.random() < 0.5), row, document, time
        )
        assert control is None or control > 1e-4
        seen += control is not None
    assert seen >= len(seeds) / 4, "too few of these cases have anything to see"


@pytest.mark.parametrize("zip_number", range(18))
def test_no_position_sees_what_comes_after_it(zip_number: int) -> None:
    no_leaks(zip_number, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("zip_number", range(18))
def test_no_position_sees_what_comes_after_it_in_500_cases_of_each_kernel(zip_number: int) -> None:
    no_leaks(zip_number, range(100, 156))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_nothing_to_see_leave_all_gradients_finite(
    dtype: torch.dtype, attention: str
) -> None:
    model = zipped(THREE, attention=attention, train=tuple(THREE)).to(dtype)
    rows = [
        number([("text", 3), ("text", 4)]),
        number([("speech", 3), ("text", 4), ("speech", 5)]),
        number([("image", 3)]),
        [],
    ]
    for left in (False, True):
        logits = model(lay(rows, left))
        loss = sum(value.float().square().sum() for value in logits.values())
        gradients = torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 20


# One truth.


@every_kernel
@pytest.mark.parametrize("families", [LLAMAS, {"text": "gpt2", "speech": "gemma3"}, THREE], ids=str)
def test_packed_ragged_and_alone_are_the_same(families: dict[str, str], attention: str) -> None:
    model = zipped(families, {"text": 2}, attention=attention)
    for seed in range(4):
        dice = random.Random(seed)
        packed_is_separate(
            model, [draw(dice, list(families), dice.randint(1, 6)) for _ in range(5)]
        )


def test_the_order_of_towers_and_junctions_does_not_matter() -> None:
    strands = lay([number(draw(random.Random(seed), list(THREE), 6)) for seed in range(3)])
    model = zipped(THREE)
    wanted = model(strands)
    reverse = dict(reversed(THREE.items()))
    junctions = [dict(reversed(junction.items())) for junction in model.config.junctions]
    for other in (model, zipped(reverse), zipped(THREE, junctions=junctions)):
        found = other(dict(reversed(strands.items())))
        assert all(torch.equal(found[name], logits) for name, logits in wanted.items())


def test_a_seed_makes_the_same_new_parameters_whatever_the_order() -> None:
    def new(order: Sequence[str], seed: int) -> dict[str, Tensor]:
        towers = {
            name: tiny_tower("llama", 0, WIDTH[name], LAYERS[name], VOCABULARY[name])
            for name in order
        }
        return Zipper.from_towers(towers, link=SMALL, seed=seed).new_parameters()

    first, again, other = (
        new(["text", "speech"], 3),
        new(["speech", "text"], 3),
        new(["text", "speech"], 4),
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_logits_of_one_tower_only_are_the_same_and_the_others_stop_at_their_last_junction() -> None:
    model = zipped(THREE)
    strands = lay([number(draw(random.Random(0), list(THREE), 6))])
    whole = model(strands)
    for name in ("speech", "image"):
        ran = watch(model, name)
        only = model(strands, outputs=["text"])
        assert list(only) == ["text"]
        assert torch.equal(only["text"], whole["text"])
        last = max(junction[name] for junction in model.config.junctions if name in junction)
        assert ran == list(range(last))


def watch(model: Zipper, name: str) -> list[int]:
    """The numbers of the blocks of a tower that run from now on."""
    ran: list[int] = []

    def note(index: int) -> None:
        ran.append(index)

    for index, block in enumerate(model.towers[name].blocks):
        block.register_forward_pre_hook(lambda module, given, index=index: note(index))
    return ran


def test_a_tower_that_input_does_not_name_is_not_run() -> None:
    model = zipped(THREE)
    ran = watch(model, "image")
    model(lay([number(draw(random.Random(0), ["text", "speech"], 4))]))
    assert ran == []


# What trains.


def test_only_new_parts_and_declared_towers_learn_and_frozen_ones_keep_every_byte() -> None:
    # GPT-2 would drop out if it ever trained.
    model = zipped({"text": "gpt2", "speech": "llama"}, train=("speech",))
    model.train()
    assert not any(module.training for module in model.towers["text"].modules())
    assert all(module.training for module in model.towers["speech"].modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = lay([number([("text", i) for i in range(9)])])
    own = model(alone)["text"]

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for step in range(3):
        sequence = [("speech", step), ("text", step), ("speech", 7), ("text", 9)]
        strands = lay([number(sequence), number(sequence[1:])])
        loss = sum(logits.square().mean() for logits in model(strands).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name.startswith("towers.text")), name
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        if name.startswith("towers.text"):
            assert same, name
        elif tensor.is_floating_point() and "inv_freq" not in name:
            assert not same, name
    assert torch.equal(model(alone)["text"], own)
    model.eval()
    assert not model.training and not model.towers["speech"].training


def test_all_towers_are_frozen_unless_declared() -> None:
    model = zipped(LLAMAS).train()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "inputs",
        "links",
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        model.new_parameters()
    )


# Configuration.


def junctions_of(
    families: dict[str, str], every: dict[str, int] | None
) -> tuple[dict[str, int], ...]:
    return zipped(families, every, awake=False).config.junctions


def test_the_nth_junctions_pair_up_and_none_stands_after_a_last_block() -> None:
    assert (LAYERS["text"], LAYERS["speech"], LAYERS["image"]) == (5, 4, 3)
    assert junctions_of(LLAMAS, {"text": 2, "speech": 1}) == (
        {"text": 2, "speech": 1},
        {"text": 4, "speech": 2},
    )
    assert junctions_of(LLAMAS, None) == tuple({"text": n, "speech": n} for n in (1, 2, 3))
    assert junctions_of(LLAMAS, {"speech": 2}) == ({"text": 1, "speech": 2},)
    assert junctions_of(LLAMAS_3, {"text": 2}) == (
        {"text": 2, "speech": 1, "image": 1},
        {"text": 4, "speech": 2, "image": 2},
    )
    assert junctions_of(LLAMAS_3, None)[2] == {"text": 3, "speech": 3}  # the image tower has ended


def test_junctions_can_be_given_one_by_one() -> None:
    junctions = [{"text": 1, "image": 2}, {"text": 4, "speech": 3}]
    model = zipped(LLAMAS_3, junctions=junctions)
    assert model.config.junctions == tuple(junctions)
    assert set(model.links) == {"0:image>text", "0:text>image", "1:speech>text", "1:text>speech"}


def test_the_papers_preset_follows_the_paper() -> None:
    towers = {"text": tiny_tower("llama", width=64), "speech": tiny_tower("llama", width=128)}
    model = Zipper.from_towers(towers, preset="paper")
    for n in range(3):
        for source, target in (("text", "speech"), ("speech", "text")):
            link = model.links[f"{n}:{source}>{target}"]
            width, source_width = (
                towers[target].config.hidden_size,
                towers[source].config.hidden_size,
            )
            linear = [layer for layer in link.projection if isinstance(layer, nn.Linear)]
            assert [(layer.in_features, layer.out_features) for layer in linear] == [
                (source_width, width),
                *[(width, width)] * 2,
            ]
            assert not link.gate.any() and not link.feedforward_gate.any()
            assert link.feedforward[1].out_features == 4 * width  # Flamingo
            assert link.config.projection_relu and not link.config.rotary
    for name, tower in towers.items():
        linear = [layer for layer in model.inputs[name].mlp if isinstance(layer, nn.Linear)]
        width = tower.config.hidden_size
        assert [(layer.in_features, layer.out_features) for layer in linear] == [(width, width)] * 3
        assert model.inputs[name].kind == "paper"
    # The last layer of ReLU projections is 0 for about half of what it reads; nothing else is added
    # to the embeddings.
    h = torch.randn(2, 3, 64)
    assert (model.inputs["text"](h) >= 0).all() and (model.inputs["text"](h) == 0).any()


def test_input_projections_can_differ_by_tower() -> None:
    model = zipped(LLAMAS, input_projection={"text": "none", "speech": "paper"})
    assert set(model.inputs) == {"speech"}
    assert {name: tower.input_projection for name, tower in model.config.towers.items()} == {
        "text": "none",
        "speech": "paper",
    }


def test_a_configuration_survives_json() -> None:
    config = zipped(THREE, {"text": 2}, train=("image",), preset="paper", link=PAPER).config
    assert ZipperConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert {n: tower.tokens for n, tower in config.towers.items()} == {n: TOKENS[n] for n in THREE}
    assert [name for name, tower in config.towers.items() if tower.train] == ["image"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("junctions"),
        lambda data: data["link"].update(colour="red"),
        lambda data: data["towers"]["text"].pop("width"),
        lambda data: data.update(towers=None),
        lambda data: data.update(link=3),
    ],
)
def test_a_damaged_configuration_is_refused(spoil: object) -> None:
    data = zipped(LLAMAS, awake=False).config.to_dict()
    spoil(data)  # type: ignore[operator]
    with pytest.raises(ZipperError, match="This is not the configuration of a zip"):
        ZipperConfig.from_dict(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"every": {"txt": 1}},
            r"every names the tower 'txt'; this model has \['speech', 'text'\]",
        ),
        (
            {"every": {"text": 0}},
            r"every\['text'\] is 0; an interval is a number of blocks, at least 1",
        ),
        ({"every": {"text": -2}}, "at least 1"),
        ({"every": {"text": 5}}, "gives no junction inside towers"),
        (
            {"every": {"text": 1}, "junctions": [{"text": 1, "speech": 1}]},
            "one of every=..., junctions=... and links=..., not several",
        ),
        (
            {"junctions": [{"text": 5, "speech": 1}]},
            "must come after block 0 and before block 5, the last",
        ),
        ({"junctions": [{"text": 0, "speech": 1}]}, "must come after block 0"),
        (
            {"junctions": [{"text": 2, "speech": 2}, {"text": 2, "speech": 3}]},
            "must come after block 2",
        ),
        ({"junctions": [{"text": 2}]}, "names fewer than two towers"),
        ({"junctions": [{"text": 2, "txt": 2}]}, "junctions names the tower 'txt'"),
        ({"train": ("txt",)}, "train names the tower 'txt'"),
        ({"tokens": {"txt": 3.0}}, "tokens names the tower 'txt'"),
        ({"ends": {"txt": (0, 1)}}, "ends names the tower 'txt'"),
        (
            {"ends": {"text": (0, 31)}},
            "The token 31 that begins or ends 'text' is outside its vocabulary of 31",
        ),
        (
            {"ends": {"text": (-1, 1)}},
            "The token -1 that begins or ends 'text' is outside its vocabulary of 31",
        ),
        ({"input_projection": {"txt": "none"}}, "input_projection names the tower 'txt'"),
        ({"input_projection": "gated"}, "'residual', 'paper' or 'none'"),
        ({"preset": "pepper"}, "preset='pepper' is unknown"),
        ({"link": LinkConfig(head_width=5)}, "cannot be cut into heads of 5"),
        ({"every": "text"}, r"every is 'text'; \{name of a tower: ...\} was wanted"),
        ({"every": 2}, "every is 2; "),
        ({"every": {"text": 1.5}}, r"every\['text'\] is 1.5; a whole number of blocks"),
        ({"junctions": 3}, "junctions is 3; a list was wanted"),
        ({"junctions": [3]}, "junctions is 3; "),
        ({"junctions": [{"text": 1.0, "speech": 1}]}, "A depth of 'text' is 1.0; a whole number"),
        ({"links": 3}, "links is 3; a list was wanted"),
        ({"links": [("text", 0.5, "speech", 1)]}, "A depth of 'text' is 0.5"),
        ({"shows": "before"}, "shows is 'before'; "),
        ({"shows": {"text": 1.5}}, r"shows\['text'\] is 1.5; it must be 'same', 'before'"),
        ({"train": "text"}, "train is 'text'; names of towers were wanted"),
        ({"train": 3}, "train is 3; "),
        ({"lora": {"text": "r"}}, r"lora\['text'\] is 'r'; \{name of a setting"),
        ({"ends": {"text": 3}}, r"ends\['text'\] is 3; \(begin id, end id\) was wanted"),
        ({"ends": {"text": (1, 2, 3)}}, r"\(begin id, end id\) was wanted"),
        ({"ends": {"text": ("a", "b")}}, "The token 'a' that begins or ends 'text'"),
        ({"tokens": 3}, "tokens is 3; "),
    ],
    ids=str,
)
def test_what_cannot_be_zipped_is_refused_in_one_sentence(
    options: dict[str, object], message: str
) -> None:
    towers = {
        name: tiny_tower("llama", 0, WIDTH[name], LAYERS[name], VOCABULARY[name]) for name in LLAMAS
    }
    given = {"link": SMALL, **options}
    with unchecked(), pytest.raises(ZipperError, match=message):
        Zipper.from_towers(towers, **given)


def test_no_tower_and_a_word_for_a_list_are_refused() -> None:
    with pytest.raises(ZipperError, match="No tower was given"):
        Zipper.from_towers({})
    with unchecked(), pytest.raises(ZipperError, match=r"towers is 'text'; \{name of a tower"):
        Zipper.from_towers("text")
    with unchecked(), pytest.raises(ZipperError, match="3 cannot name a tower"):
        Zipper.from_towers({3: tiny_tower("llama", width=16)})
    with unchecked(), pytest.raises(ZipperError, match=r"Write \['text'\]"):
        zipped(LLAMAS).generate([], "text")


@pytest.mark.parametrize(
    "name", ["Text!", "a.b", "Text", "1st", "", "a b", "keys", "train", "float", "forward"]
)
def test_names_that_cannot_name_a_tower_are_refused(name: str) -> None:
    towers = {name: tiny_tower("llama", width=16), "speech": tiny_tower("llama", width=16)}
    with pytest.raises(ZipperError, match="cannot name a tower"):
        Zipper.from_towers(towers, link=SMALL)


def test_a_tower_without_end_token_needs_to_be_told() -> None:
    tower = tiny_tower("llama", width=16, vocabulary=31)
    tower.config.bos_token_id = tower.config.eos_token_id = None
    towers = {"text": tower, "speech": tiny_tower("llama", width=16)}
    with pytest.raises(
        ZipperError,
        match=r"'text' has no begin and end token .* Pass ends=\{'text': \(begin, end\)\}",
    ):
        Zipper.from_towers(towers, link=SMALL)
    model = Zipper.from_towers(towers, link=SMALL, ends={"text": (2, 3)})
    assert model.ends() == {"text": (2, 3), "speech": (0, 1)}


def test_unknown_towers_are_refused_wherever_they_are_named() -> None:
    model = zipped(LLAMAS)
    strand = Strand.alone(torch.tensor([[2, 3]]))
    for call in (
        lambda: model({"txt": strand}),
        lambda: model({"text": strand}, outputs=["txt"]),
        lambda: model.start(["text"], ["txt"]),
        lambda: model.unembed("txt", torch.zeros(1, 1, 16)),
        lambda: model.tower("txt"),
        lambda: model.check([Segment("txt", [])]),
    ):
        with pytest.raises(ZipperError, match="no tower 'txt'"):
            call()


def test_logits_of_a_tower_that_reads_nothing_cannot_be_had() -> None:
    with pytest.raises(ZipperError, match="'speech'"):
        zipped(LLAMAS)({"text": Strand.alone(torch.tensor([[2, 3]]))}, outputs=["speech"])


def test_towers_of_unlike_numbers_of_rows_are_refused() -> None:
    two, one = (Strand.alone(torch.tensor([[2, 3]] * rows)) for rows in (2, 1))
    with unchecked(), pytest.raises(ZipperError, match=r"\{'text': 2, 'speech': 1\} rows"):
        zipped(LLAMAS)({"text": two, "speech": one})


def test_tower_gives_the_model_of_transformers_itself() -> None:
    towers = {"text": tiny_tower("llama", width=16), "speech": tiny_tower("gpt2", width=16)}
    assert Zipper.from_towers(towers, link=SMALL).tower("speech") is towers["speech"]


def test_calibration_changes_how_a_zip_learns_and_not_what_it_says() -> None:
    for preset in ("default", "paper"):
        model = zipped(THREE, preset=preset, link=PAPER if preset == "paper" else SMALL)
        strands = lay([number(draw(random.Random(seed), list(THREE), 6)) for seed in range(20)])
        before, weights = (
            model(strands),
            {name: p.clone() for name, p in model.new_parameters().items()},
        )
        model.calibrate(strands)
        assert_close(model(strands), before, 1e-3)
        after = model.new_parameters()
        changed = {
            name.split(".", 2)[2]
            for name, p in after.items()
            if name not in weights or not torch.equal(p, weights[name])
        }
        assert changed == {
            "whiten.weight",
            "whiten.bias",
            "projection.0.weight",
            "projection.0.bias",
        }
        assert model.config.link.whiten and not any(
            p.requires_grad for name, p in after.items() if ".whiten." in name
        )


def test_the_state_before_the_head_and_the_head_give_the_logits() -> None:
    model = zipped(THREE)
    strands = lay([number(draw(random.Random(0), list(THREE), 5))])
    logits = model(strands)
    heads = {name: model.unembed(name, h) for name, h in model.hidden(strands).items()}
    assert_close(heads, logits, 0.0)
    assert by_token(strands, logits).keys() == {
        (0, 0, time) for time in range(sum(s.ids.shape[1] for s in strands.values()))
    }


def learnt(folder: Path) -> Zipper:
    """A zip on folders whose speech tower learnt since it was loaded."""
    for name in ("text", "speech"):
        tiny_tower("llama").save_pretrained(folder / name)
    towers = {name: folder / name for name in ("text", "speech")}
    model = Zipper.from_towers(towers, train=["speech"], link=SMALL)
    with torch.no_grad():
        for parameter in model.towers["speech"].parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("way", ["learn", "add", "compose"])
def test_a_tower_that_learnt_is_not_lost_when_it_learns_no_more(tmp_path: Path, way: str) -> None:
    model = learnt(tmp_path)
    if way == "learn":
        still = model.learn()
    elif way == "add":
        still = add(model, "image", tiny_tower("llama", seed=3))
    else:
        towers = {"text": tmp_path / "text", "image": tiny_tower("llama", seed=3)}
        still = compose(model, Zipper.from_towers(towers, link=SMALL))
    pin = still.config.towers["speech"]
    assert not pin.train and not pin.source and pin.digest == still.pin("speech", torch.float32)
    with pytest.raises(
        ZipperError, match=r"'speech' was given as an object, or has learnt.*includ"
    ):
        still.save_pretrained(tmp_path / "lost", include={*still.towers} - {"speech", "text"})
    still.save_pretrained(tmp_path / "kept", include={*still.towers} - {"text"})
    again = Zipper.from_pretrained(tmp_path / "kept")
    held = again.towers["speech"].state_dict()
    for name, tensor in model.towers["speech"].state_dict().items():
        assert torch.equal(tensor, held[name])


def test_a_tower_that_learnt_nothing_still_lies_where_it_lay(tmp_path: Path) -> None:
    for name in ("text", "speech"):
        tiny_tower("llama").save_pretrained(tmp_path / name)
    towers = {name: tmp_path / name for name in ("text", "speech")}
    model = Zipper.from_towers(towers, train=["speech"], link=SMALL)
    assert model.learn().config.towers["speech"].source == str(tmp_path / "speech")


def test_calibration_takes_some_rows_at_a_time_and_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strands = lay([number(draw(random.Random(seed), list(THREE), 6)) for seed in range(21)])
    seen, found = list[int](), list[dict[str, Tensor]]()
    taps = Zipper.taps

    def noted(model: Zipper, some: Mapping[str, Strand]) -> Any:
        seen.append(max(len(strand.ids) for strand in some.values()))
        return taps(model, some)

    monkeypatch.setattr(Zipper, "taps", noted)
    for rows in (64, 5):
        monkeypatch.setattr(models, "CALIBRATED", rows)
        model = zipped(THREE)
        model.calibrate(strands)
        white = {n: p for n, p in model.state_dict().items() if "whiten.weight" in n}
        found.append({name: p.T @ p for name, p in white.items()})  # a direction has two signs
    assert seen == [21, 5, 5, 5, 5, 1] and found[0]
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_tower_alone_are_calibrated_among_others(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of like length stand together, so that some rows at a time may be of one tower."""
    rows = [[Segment("text", [3 + n, 4])] for n in range(4)]
    rows += [[Segment("text", [3 + n, 4, 5]), Segment("speech", [5, n])] for n in range(2, 12)]
    found = []
    for at_once in (64, 2):
        monkeypatch.setattr(models, "CALIBRATED", at_once)
        model = zipped({"text": "llama", "speech": family})
        model.calibrate(collate(rows, model.ends()).strands)
        link = model.link(0, "text", "speech")
        found.append(link.whiten.weight.T @ link.whiten.weight)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].max()))


def test_links_are_calibrated_where_their_towers_are(cuda: torch.device) -> None:
    model = zipped(LLAMAS).to(cuda)
    samples = [[Segment("text", [3 + n, 4]), Segment("speech", [5, n + 2])] for n in range(9)]
    model.calibrate(collate(samples, model.ends()).to(cuda).strands)
    white = [p for name, p in model.state_dict().items() if "whiten" in name]
    assert white and all(p.device == cuda and p.isfinite().all() for p in white)


def test_one_model_as_two_towers_cannot_learn_as_one_of_them() -> None:
    both = tiny_tower("llama")
    Zipper.from_towers({"text": both, "speech": both})
    with pytest.raises(ZipperError, match="is another tower too, and would learn there"):
        Zipper.from_towers({"text": both, "speech": both}, train=["speech"])


def test_links_that_no_sample_shows_are_named_and_nothing_is_whitened() -> None:
    model = zipped({"text": "llama", "speech": "llama", "image": "llama"})
    before = {name: p.clone() for name, p in model.state_dict().items()}
    batch = collate([[Segment("text", [3, 4]), Segment("speech", [5])]], model.ends())
    with pytest.raises(ZipperError, match=r"without tokens of \['image'\]"):
        model.calibrate(batch.strands)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_links_that_are_frozen_need_no_samples_to_be_calibrated() -> None:
    grown = add(zipped(LLAMAS), "image", tiny_tower("llama", seed=3), partners=["text"])
    frozen = {
        name: p.clone() for name, p in grown.links.state_dict().items() if "image" not in name
    }
    samples = [[Segment("text", [3 + n, 4]), Segment("image", [5, n])] for n in range(2, 9)]
    grown.calibrate(collate(samples, grown.ends()).strands)
    assert all(grown.config.link_of(k).whiten for k in grown.config.links if "image" in k[1:])
    after = grown.links.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
