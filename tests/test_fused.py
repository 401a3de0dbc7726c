"""The fast path against `Zipper.step`, which knows nothing of it: the same logits however tokens
are read, in whatever company."""

import random
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

import pytest
import torch
from laws import (
    ENDS,
    LAYERS,
    LLAMAS,
    SEED,
    TOKENS,
    VOCABULARY,
    WIDTH,
    draw,
    lay,
    number,
    read_one,
    wake,
    zipped,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from zipper.errors import ZipperError
from zipper.fast import native, weights
from zipper.fast import reader as reader_file
from zipper.fast import session as session_file
from zipper.fast.blocks import FastLink
from zipper.fast.graphs import Pool, Shape
from zipper.fast.reader import Fused
from zipper.fast.session import Cache, Session
from zipper.fast.weights import Form, Matrix
from zipper.growth import add
from zipper.link import PAPER_LINK, LinkConfig
from zipper.model import Zipper
from zipper.reading import Stepwise
from zipper.strand import Strand
from zipper.testing import tiny_tower
from zipper.tower import UnsupportedTower
from zipper.towers.families import drawn

KNOWN = ("llama", "qwen3")
Words = Sequence[tuple[str, int]]


@pytest.fixture(autouse=True)
def memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written is NaN, so that reading it shows."""
    monkeypatch.setattr(session_file, "empty", lambda shape, like: like.new_full(shape, torch.nan))
    monkeypatch.setattr(Pool, "free", freed)


free = Pool.free


@torch.inference_mode()
def freed(pool: Pool, row: int) -> None:
    for held in pool.held.values():
        held[row] = torch.nan
    free(pool, row)


@pytest.fixture(
    autouse=True,
    params=["compiled", "torch", "static", *(["cuda"] if torch.cuda.is_available() else [])],
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test by the compiled step, by torch, by steps of fixed shapes as on CUDA, and on
    CUDA."""
    if request.param != "compiled":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no C++ compiler with OpenMP")
    if request.param == "static":
        monkeypatch.setattr(Fused, "__init__", partialmethod(Fused.__init__, static=True))
    if request.param == "cuda":
        made = Fused.__init__
        monkeypatch.setattr(
            Fused,
            "__init__",
            lambda fast, model, *given, **named: made(fast, model.to("cuda"), *given, **named),
        )
    return request.param


def pieces(words: Words, dice: random.Random) -> list[tuple[str, list[int]]]:
    """A linear sequence, cut where the tower changes and at random."""
    cut: list[tuple[str, list[int]]] = []
    for tower, i in words:
        if cut and cut[-1][0] == tower and dice.random() < 0.6:
            cut[-1][1].append(i)
        else:
            cut.append((tower, [i]))
    return cut


@torch.no_grad()
def truth(model: Zipper, words: Words, towers: Sequence[str]) -> dict[int, Tensor]:
    """{time: logits} by one step over the whole, in a plan of these towers."""
    strands = lay([number(words)])
    hidden, _ = model.step(strands, model.start(towers, towers))
    found = {}
    for name, strand in strands.items():
        logits = model.unembed(name, hidden[name])[0]
        found |= {int(time): logits[slot] for slot, time in enumerate(strand.time[0])}
    return found


def read(
    model: Fused, sessions: Sequence[Session], cut: Sequence[Sequence[tuple[str, list[int]]]]
) -> list[dict[int, Tensor]]:
    """Sessions read their pieces side by side, grouped by tower: {time: logits} of each."""
    found: list[dict[int, Tensor]] = [{} for _ in sessions]
    time, left = [0] * len(sessions), [list(parts) for parts in cut]
    while any(left):
        for tower in {parts[0][0] for parts in left if parts}:
            group = [n for n, parts in enumerate(left) if parts and parts[0][0] == tower]
            now = [left[n].pop(0)[1] for n in group]
            answers = read_one(
                model, tower, [(sessions[n], ids) for n, ids in zip(group, now, strict=True)]
            )
            for n, ids, logits in zip(group, now, answers, strict=True):
                time[n] += len(ids)
                assert logits is not None
                found[n][time[n] - 1] = logits
    return found


def assert_close(
    found: dict[int, Tensor], wanted: dict[int, Tensor], tolerance: float = 1e-5
) -> None:
    for time, logits in found.items():
        torch.testing.assert_close(logits.cpu(), wanted[time].cpu(), atol=tolerance, rtol=0)


ZIPS = {
    "default": {"families": {"text": "llama", "speech": "qwen3"}, "every": {"text": 2}},
    "three": {"families": {"text": "llama", "speech": "qwen3", "image": "llama"}},
    "paper": {
        "families": LLAMAS,
        "preset": "paper",
        "link": PAPER_LINK.__class__(**{**PAPER_LINK.__dict__, "head_width": 8}),
    },
    "deep": {
        "families": LLAMAS,
        "link": LinkConfig(head_width=8, projection_depth=3, projection_relu=True, whiten=True),
    },
    "bent": {  # nothing stands before the ReLU
        "families": LLAMAS,
        "link": LinkConfig(head_width=8, projection_depth=0, projection_relu=True),
    },
    "plain": {
        "families": LLAMAS,
        "input_projection": "none",
        "link": LinkConfig(width=32, head_width=8, feedforward=0.0),
    },
}


@pytest.mark.parametrize("kind", ZIPS)
def test_pieces_of_several_sequences_side_by_side_are_one_step_over_each(kind: str) -> None:
    model = zipped(**ZIPS[kind])  # type: ignore[arg-type]
    names, fast = list(model.towers), Fused(model)
    for seed in range(4):
        dice = random.Random(seed)
        rows = [draw(dice, names, dice.randint(2, 6)) for _ in range(4)]
        sessions = [fast.open(names, names) for _ in rows]
        for words, found in zip(
            rows, read(fast, sessions, [pieces(words, dice) for words in rows]), strict=True
        ):
            assert found
            assert_close(found, truth(model, words, names))


def test_links_of_one_rate_may_have_heads_of_several_widths() -> None:
    new = tiny_tower("llama", SEED["image"], WIDTH["image"], LAYERS["image"], VOCABULARY["image"])
    wider, same = LinkConfig(head_width=4), TOKENS["speech"]
    model = add(zipped(LLAMAS), "image", new, link=wider, ends=ENDS["image"], tokens=same)
    wake(model)
    names, dice, fast = list(model.towers), random.Random(0), Fused(model)
    words = draw(dice, names, 8)
    (found,) = read(fast, [fast.open(names, names)], [pieces(words, dice)])
    assert_close(found, truth(model, words, names))


def test_a_fork_and_what_it_came_of_hear_different_things_later() -> None:
    model = zipped(LLAMAS)
    fast, names = Fused(model), ["text", "speech"]
    start = [("speech", [3, 4]), ("text", [5])]
    for first in 0, 1:
        sessions = [fast.open(names, names)]
        read(fast, sessions, [start])
        sessions.append(fast.fork(sessions[0]))
        for own in (first, 1 - first):
            end = [("speech", [6 + own]), ("text", [7]), ("speech", [8 + own]), ("text", [9])]
            words = [(tower, i) for tower, ids in (*start, *end) for i in ids]
            (found,) = read(fast, [sessions[own]], [end])
            wanted = truth(model, words, names)
            assert_close({time + 3: logits for time, logits in found.items()}, wanted)


def test_what_nobody_reads_for_long_is_kept_without_the_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader_file, "MOST_PARTS", 4)
    model, names = zipped(LLAMAS), ["text", "speech"]
    fast = Fused(model)
    sessions = [fast.open(names, names) for _ in range(3)]
    written = [[(("text"), [n + i]) for i in range(1, 15)] for n in range(3)]
    read(fast, sessions, written)
    for session in sessions:
        (parts,) = session.unread.values()
        assert len(parts) < 4 and sum(part.stop - part.start for part in parts) == 14
        whole = parts[0]
        assert (whole.start, whole.stop) == (0, len(whole.kept[0]))
    heard = [[("speech", [3 + n, 4])] for n in range(3)]
    for n, found in enumerate(read(fast, sessions, heard)):
        words = [(tower, i) for tower, ids in (*written[n], *heard[n]) for i in ids]
        assert_close(
            {time + 14: logits for time, logits in found.items()}, truth(model, words, names)
        )


def test_plans_of_one_and_of_several_towers_go_side_by_side() -> None:
    model = zipped(LLAMAS, {"text": 2})
    fast, words = Fused(model), [("text", 3), ("text", 4), ("text", 5)]
    plans = [["text"], ["text", "speech"], ["text"]]
    found = read(
        fast, [fast.open(plan, plan) for plan in plans], [[("text", [3, 4]), ("text", [5])]] * 3
    )
    for plan, logits in zip(plans, found, strict=True):
        assert_close(logits, truth(model, words, plan))
    assert (found[0][2] - found[1][2]).abs().max() > 1e-3, (
        "the second goes through an input projection"
    )


def test_a_long_sequence_outgrows_its_buffers() -> None:
    model = zipped(LLAMAS)
    fast, dice = Fused(model), random.Random(0)
    words = [("text", dice.randrange(31)) for _ in range(70)] + [
        ("speech", dice.randrange(23)) for _ in range(150)
    ]
    words += [("text", dice.randrange(31)) for _ in range(20)]
    for seed in (0, 1):
        (found,) = read(
            fast,
            [fast.open(["text", "speech"], ["text", "speech"])],
            [pieces(words, random.Random(seed))],
        )
        assert_close(found, truth(model, words, ["text", "speech"]), 2e-5)


def test_positions_beyond_the_first_table_are_right() -> None:
    model = Zipper.from_towers({"text": tiny_tower("llama", width=16, layers=2, positions=600)})
    fast, dice = Fused(model), random.Random(0)
    words = [("text", dice.randrange(97)) for _ in range(400)]
    session = fast.open(["text"], ["text"])
    first = read_one(fast, "text", [(session, [i for _, i in words[:300]])])[0]
    second = read_one(fast, "text", [(session, [i for _, i in words[300:]])])[0]
    assert first is not None and second is not None
    assert_close({299: first, 399: second}, truth(model, words, ["text"]), 2e-5)


def test_a_neighbour_that_goes_far_takes_nothing_away(way: str) -> None:
    """A step that is held ready points to rotary positions, and a long prompt beside it replaces
    them."""
    model = Zipper.from_towers({"text": tiny_tower("llama", width=16, layers=2, positions=600)})
    fast, words = Fused(model), [("text", i) for i in (3, 4, 5)]
    session, other = (fast.open(["text"], ["text"]) for _ in range(2))
    (found,) = read(fast, [session], [[("text", [3]), ("text", [4])]])
    held, far = {*fast._prepared, *fast._replays}, fast._far
    assert bool(held) == (way != "torch")
    read_one(fast, "text", [(other, [i % 90 for i in range(far + 1)])])
    assert held.isdisjoint({*fast._prepared, *fast._replays}) and fast._far > far
    (logits,) = read_one(fast, "text", [(session, [5])])
    assert logits is not None
    assert_close(found | {2: logits}, truth(model, words, ["text"]))


def test_the_company_of_a_sequence_changes_no_bit_of_it() -> None:
    """The same shapes beside it, other tokens: another neighbour must not be seen, nor its place in
    a matrix be felt."""
    model = zipped(LLAMAS, {"text": 2})
    fast, names = Fused(model), ["text", "speech"]
    mine = [("speech", [3, 4, 5]), ("text", [6]), ("text", [7]), ("speech", [8])]
    answers = []
    for other in (2, 9):
        theirs = [(tower, [(other + i) % 20 for i in ids]) for tower, ids in mine]
        answers.append(
            read(fast, [fast.open(names, names) for _ in range(3)], [theirs, mine, theirs])[1]
        )
    assert (
        all(torch.equal(answers[0][time], answers[1][time]) for time in answers[0]) and answers[0]
    )


def test_a_fork_goes_on_by_itself() -> None:
    model = zipped(LLAMAS)
    fast, names = Fused(model), ["text", "speech"]
    session = fast.open(names, names)
    start = [("speech", [3, 4]), ("text", [5, 6])]
    read(fast, [session], [start])
    twin = fast.fork(session)
    ends = [
        [("text", [7]), ("speech", [8]), ("text", [9])],
        [("text", [10]), ("speech", [11]), ("text", [12])],
    ]
    for found, end in zip(read(fast, [session, twin], ends), ends, strict=True):
        words = [(tower, i) for tower, ids in (*start, *end) for i in ids]
        assert_close(
            {time + 4: logits for time, logits in found.items()}, truth(model, words, names)
        )


def test_links_cost_no_bit_while_nothing_of_another_tower_is_visible(way: str) -> None:
    model = zipped(LLAMAS, input_projection="none")
    fast, cut = Fused(model), [[("text", [3, 4, 5]), ("text", [6])]]
    (alone,) = read(fast, [fast.open(["text"], ["text"])], cut)
    (zip_,) = read(fast, [fast.open(["text", "speech"], ["text", "speech"])], cut)
    if way == "cuda":  # a second session has another row there, a product of another shape
        return assert_close(zip_, alone)
    assert all(torch.equal(alone[time], zip_[time]) for time in alone)


def test_what_is_only_given_has_no_logits_and_runs_no_further_than_its_last_junction() -> None:
    # Speech, of 4 blocks, has junctions after its blocks 1 and 2.
    model = zipped(LLAMAS, {"text": 2})
    fast = Fused(model)
    session = fast.open(["speech", "text"], ["text"])
    assert read_one(fast, "speech", [(session, [3, 4])]) == [None]
    held = session.caches["speech"].held[:, :, :, :2]
    written = ~(held.isnan() | (held == 0)).flatten(1).all(1)
    assert written.tolist() == [True, True, False, False]
    (logits,) = read_one(fast, "text", [(session, [5])])
    assert logits is not None
    assert_close(
        {2: logits}, truth(model, [("speech", 3), ("speech", 4), ("text", 5)], ["speech", "text"])
    )


def test_towers_read_in_one_step_do_not_see_each_other_and_are_seen_afterwards() -> None:
    """Two towers of one sequence in one call: as if the tokens of the step stood at one time."""
    model = zipped(dict.fromkeys(("text", "speech", "image"), "llama"), {"text": 2})
    towers, cut = (
        list(model.config.towers),
        [
            {"text": [5, 6]},
            {"text": [7], "speech": [3]},
            {"text": [8], "speech": [4], "image": [2]},
            {"image": [3], "speech": [5]},
            {"text": [9]},
        ],
    )
    fast, step = Fused(model), Stepwise(model)
    one, other = fast.open(towers, towers), step.open(towers, towers)
    whole: dict[str, list[tuple[int, int]]] = {name: [] for name in towers}
    found: dict[str, list[Tensor]] = {name: [] for name in towers}
    time = 0
    for pieces in cut:
        mine = fast.read({name: [(one, ids)] for name, ids in pieces.items()})
        theirs = step.read({name: [(other, ids)] for name, ids in pieces.items()})
        for name, ids in pieces.items():
            torch.testing.assert_close(mine[name][0], theirs[name][0], atol=1e-4, rtol=0)
            whole[name] += [(time + n, id) for n, id in enumerate(ids)]
            found[name].append(mine[name][0])
        time += max(map(len, pieces.values()))
    strands = {}
    for name, tokens in whole.items():
        times, ids = (torch.tensor([column]) for column in zip(*tokens, strict=True))
        place = torch.arange(len(tokens))[None]
        strands[name] = Strand(ids, place, times, torch.zeros_like(ids))
    with torch.no_grad():
        wanted = model(strands)
    for name, logits in found.items():
        said = torch.stack(logits)
        torch.testing.assert_close(said, wanted[name][0, -len(said) :], atol=1e-4, rtol=0)


def test_a_link_turns_source_states_into_keys_once_and_in_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = zipped(LLAMAS), []
    fast = Fused(model)
    for way in "read", "unread":
        turn = getattr(FastLink, way)

        def counted(link: FastLink, memory: Cache, states: Tensor, *rest: Any, turn=turn) -> Any:
            number = next(name for name, other in fast._links.items() if other is link)
            calls.append((number, len(states)))
            return turn(link, memory, states, *rest)

        monkeypatch.setattr(FastLink, way, counted)
    cut = [
        ("speech", [2]),
        ("speech", [3, 4]),
        ("text", [5]),
        ("text", [6]),
        ("speech", [7]),
        ("text", [8]),
    ]
    read(fast, [fast.open(["speech", "text"], ["speech", "text"])], [cut])
    for n in range(len(model.config.junctions)):
        assert [tokens for name, tokens in calls if name == (n, "speech", "text")] == [3, 1]
        assert [tokens for name, tokens in calls if name == (n, "text", "speech")] == [2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "mistral", "gemma3", "gpt2"])
def test_a_tower_is_read_as_it_reads_itself_or_refused(family: str) -> None:
    model = Zipper.from_towers({"text": tiny_tower(family, width=16, layers=4)})
    if family not in KNOWN:
        with pytest.raises(UnsupportedTower):
            Fused(model)
        return
    fast, words = Fused(model), [("text", i) for i in (3, 4, 5, 6, 7)]
    (found,) = read(
        fast, [fast.open(["text"], ["text"])], [[("text", [3, 4]), ("text", [5]), ("text", [6, 7])]]
    )
    assert_close(found, truth(model, words, ["text"]))


def test_projections_may_have_biases() -> None:
    """As those of Qwen2 have, whose shapes the benchmarks take."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model("qwen2", vocab_size=97, bos_token_id=0, eos_token_id=1, **sizes)
    model = Zipper.from_towers(
        {"text": drawn(lambda: AutoModelForCausalLM.from_config(config), seed=0)}
    )
    assert model.tower("text").model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    (found,) = read(
        fast := Fused(model),
        [fast.open(["text"], ["text"])],
        [[("text", [3, 4]), ("text", [5]), ("text", [6, 7])]],
    )
    assert_close(found, truth(model, [("text", i) for i in (3, 4, 5, 6, 7)], ["text"]))


def test_a_tower_with_other_arithmetic_in_familiar_parts_is_refused() -> None:
    model = tiny_tower("llama")
    fast_enough = Zipper.from_towers({"text": model})
    block = fast_enough.tower("text").model.layers[0]
    own = block.mlp.forward
    block.mlp.forward = lambda x: 1.05 * own(x)
    with pytest.raises(UnsupportedTower, match="differ from its own"):
        Fused(fast_enough)


def test_another_activation_is_left_to_torch() -> None:
    model = Zipper.from_towers({"text": tiny_tower("llama")})
    for block in model.tower("text").model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    fast = Fused(model)
    (found,) = read(fast, [fast.open(["text"], ["text"])], [[("text", [3, 4]), ("text", [5])]])
    assert_close(found, truth(model, [("text", i) for i in (3, 4, 5)], ["text"]))


def test_weights_may_lie_in_any_order_of_memory() -> None:
    model = Zipper.from_towers({"text": tiny_tower("llama")})
    wanted = truth(model, [("text", i) for i in (3, 4, 5)], ["text"])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    fast = Fused(model)
    (found,) = read(fast, [fast.open(["text"], ["text"])], [[("text", [3, 4]), ("text", [5])]])
    assert_close(found, wanted)


@pytest.mark.parametrize("wrong", [-1, 97])
def test_ids_that_a_tower_does_not_know_are_refused_and_nothing_is_lost(wrong: int) -> None:
    fast = Fused(Zipper.from_towers({"text": tiny_tower("llama")}))
    one, other, untouched = (fast.open(["text"], ["text"]) for _ in range(3))
    for session in (one, untouched):
        read_one(fast, "text", [(session, [3, 4])])
    with pytest.raises(
        ZipperError, match=f"text was given ids from .*{wrong}.*; it knows those from 0 to 96"
    ):
        read_one(fast, "text", [(one, [5]), (other, [6, wrong])])
    found, wanted = (read_one(fast, "text", [(session, [5])])[0] for session in (one, untouched))
    torch.testing.assert_close(found, wanted)
    assert not other.caches


def test_half_precision_and_eight_bits_stay_close() -> None:
    towers = {name: tiny_tower("llama", seed, 32, 3) for seed, name in enumerate(LLAMAS)}
    model = Zipper.from_towers(towers, link=LinkConfig(gate_init=0.7, head_width=8))
    names, words = (
        list(LLAMAS),
        [("speech", 3), ("speech", 5), ("text", 9), ("text", 7), ("speech", 4), ("text", 6)],
    )
    wanted, cut = truth(model, words, names), [pieces(words, random.Random(1))]

    def error(fast: Fused) -> float:
        (found,) = read(fast, [fast.open(names, names)], cut)
        pairs = [(logits.cpu().float(), wanted[time]) for time, logits in found.items()]
        return max(
            float((logits - truth).norm() / (truth - truth.mean()).norm())
            for logits, truth in pairs
        )

    assert 0 < error(Fused(model, int8=True)) < 0.05
    model.cast(torch.bfloat16)
    assert 0 < error(Fused(model)) < 0.05
    assert 0 < error(Fused(model, int8=True)) < 0.08


def test_a_matrix_of_several_layers_is_their_products_side_by_side(way: str) -> None:
    plain, eight = (Form(int8, compiled=way == "compiled") for int8 in (False, True))
    layers = [torch.nn.Linear(32, n) for n in (8, 16)]
    x = torch.randn(3, 32)
    wanted = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(Matrix(layers, plain)(x), wanted)
    assert (Matrix(layers, eight)(x) - wanted).norm() / wanted.norm() < 0.02
    assert Matrix(layers, plain).bytes == 4 * (24 * 32 + 24)
    assert Matrix(layers, eight).bytes == 24 * 32 + 4 * 24 + 4 * 24
    narrow = torch.nn.Linear(24, 8)
    torch.testing.assert_close(Matrix([narrow], eight)(x[:, :24]), narrow(x[:, :24]))
    torch.testing.assert_close(Matrix(layers, plain, factor=0.5)(x), wanted / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kernel_of_torch_gives_the_same_product(
    dtype: torch.dtype, amx: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "AMX", amx)
    if not packed:
        monkeypatch.setattr(weights, "PACKED", set())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for width, out in ((32, 48), (48, 32), (40, 40)):
        layer = torch.nn.Linear(width, out, dtype=dtype)
        for tokens in (1, 2, 8, 70):
            x = torch.randn(tokens, width, dtype=dtype)
            found = Matrix([layer], Form(int8=False, compiled=False))(x)
            torch.testing.assert_close(found, layer(x), atol=tolerance, rtol=tolerance)


def test_the_bytes_of_a_token_are_those_of_the_weights_it_reads() -> None:
    model = zipped(LLAMAS, {"text": 2})
    tower, links = Fused(model).bytes("text")
    text = model.tower("text")
    assert tower == 4 * sum(
        p.numel() for p in (*text.model.layers.parameters(), text.lm_head.weight) if p.ndim == 2
    )
    reading = [link for name, link in model.links.items() if name.endswith(">text")]
    assert links == 4 * sum(
        m.weight.numel()
        for link in reading
        for m in (link.query, link.out, link.feedforward[1], link.feedforward[3])
    )


def test_a_cache_keeps_what_it_holds_when_it_grows() -> None:
    cache = Cache(Shape(1, 1, 2, torch.zeros(1)))
    cache.reserve(3)
    cache.held[:, :, :, :3] = 7.0
    cache.length = 3
    cache.reserve(100)
    assert (cache.held[:, :, :, :3] == 7.0).all() and cache.held[:, :, :, 3:].isnan().all()
