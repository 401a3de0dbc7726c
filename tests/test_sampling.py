"""Sampling against cases worked out by hand, and against frequencies."""

from math import inf, log

import pytest
import torch
from torch import Tensor

from zipper.errors import ZipperError
from zipper.sampling import MOST_SEED, Rules, Sampling, check_seed, choose, keep, one_of

# Probabilities 0.4, 0.3, 0.2, 0.1, not in order.
LOGITS = torch.tensor([[log(0.2), log(0.4), log(0.1), log(0.3)]])


def kept(logits: Tensor) -> list[list[int]]:
    return [(row > -inf).nonzero().flatten().tolist() for row in logits]


def draws(logits: Tensor, sampling: Sampling, count: int) -> Tensor:
    generators = sampling.generators(len(logits))
    return torch.stack([choose(logits, sampling, generators) for _ in range(count)], dim=1)


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.0]])
    assert choose(logits, Sampling(), Sampling().generators(2)).tolist() == [1, 0]
    with_options = Sampling(temperature=0.0, top_k=2, top_p=0.5, seed=9)
    assert choose(logits, with_options, with_options.generators(2)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (0, [0, 1, 2, 3]),
        (1, [1]),
        (2, [1, 3]),
        (3, [0, 1, 3]),
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3]),
    ],
)
def test_top_k_keeps_the_k_likeliest(k: int, wanted: list[int]) -> None:
    found = keep(LOGITS, k, 1.0)
    assert kept(found) == [wanted]
    assert torch.equal(found[0, wanted], LOGITS[0, wanted])


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [0, 1, 3]),
        (0.91, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_the_probability(p: float, wanted: list[int]) -> None:
    found = keep(LOGITS, 0, p)
    assert kept(found) == [wanted]
    assert torch.equal(found[0, wanted], LOGITS[0, wanted])


def test_a_tiny_p_keeps_the_likeliest() -> None:
    row = torch.tensor([[1.0, 3.0, 2.0]])
    assert (keep(row, 0, 1e-200) > -torch.inf).tolist() == [[False, True, False]]
    chosen = choose(row, Sampling(1.0, top_p=1e-50), Sampling().generators(1))
    assert chosen.tolist() == [1]


def test_what_was_said_gets_rarer_also_where_it_was_guided() -> None:
    guided = Sampling(guidance=3.0).guide(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]))
    assert guided.max() > 0
    before, after = guided.softmax(-1), Rules(repetition=2.0).weigh(guided, [0]).softmax(-1)
    assert after[0] < before[0]


def test_top_p_counts_what_top_k_has_left() -> None:
    # Of 0.4 and 0.3 the first is 0.57: enough for 0.5, not for 0.6.
    assert kept(keep(LOGITS, 2, 0.5)) == [[1]]
    assert kept(keep(LOGITS, 2, 0.6)) == [[1, 3]]


def test_each_row_keeps_its_own() -> None:
    assert kept(keep(torch.cat([LOGITS, LOGITS.flip(1)]), 2, 1.0)) == [[1, 3], [0, 2]]


def test_draws_follow_the_probabilities() -> None:
    found = draws(LOGITS, Sampling(temperature=1.0), 4000)[0].bincount(minlength=4) / 4000
    # Four standard deviations.
    torch.testing.assert_close(found, LOGITS.exp()[0], atol=0.03, rtol=0)


def test_temperature_divides_the_logits() -> None:
    squared = LOGITS.exp()[0] ** 2  # p^(1/T) for T = 0.5
    found = draws(LOGITS, Sampling(temperature=0.5), 4000)[0].bincount(minlength=4) / 4000
    torch.testing.assert_close(found, squared / squared.sum(), atol=0.03, rtol=0)


def test_what_was_cut_is_never_drawn() -> None:
    assert set(draws(LOGITS, Sampling(temperature=5.0, top_k=3, top_p=0.6), 500)[0].tolist()) == {
        1,
        3,
    }
    masked = LOGITS.clone()
    masked[0, 1] = -inf
    assert 1 not in draws(masked, Sampling(temperature=5.0), 500)[0].tolist()


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    flat = torch.zeros(1, 50)
    first = draws(flat, Sampling(temperature=1.0, seed=3), 20)
    assert torch.equal(first, draws(flat, Sampling(temperature=1.0, seed=3), 20))
    assert not torch.equal(first, draws(flat, Sampling(temperature=1.0, seed=4), 20))


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    flat = torch.zeros(1, 50)
    batch = draws(
        torch.cat([torch.randn(1, 50), flat, torch.randn(1, 50)]),
        Sampling(temperature=1.0, seed=3),
        20,
    )
    # Row i draws from seed + i.
    assert torch.equal(batch[1:2], draws(flat, Sampling(temperature=1.0, seed=4), 20))


def test_behind_the_largest_seed_comes_the_smallest() -> None:
    last = Sampling(temperature=1.0, seed=MOST_SEED)
    assert [last.of_row(row).seed for row in range(3)] == [MOST_SEED, -MOST_SEED, 1 - MOST_SEED]
    assert last.generators(2)[1].initial_seed() == 2**64 - MOST_SEED
    assert Sampling(seed=-MOST_SEED).of_row(2).seed == 2 - MOST_SEED


def test_seeds_go_up_to_the_largest_and_no_further() -> None:
    for seed in (MOST_SEED, -MOST_SEED):
        check_seed(seed)
        with pytest.raises(ZipperError, match="it must be a whole number of at most"):
            check_seed(seed + (1 if seed > 0 else -1))


def test_logits_of_half_the_bytes_are_drawn_from_in_full_precision() -> None:
    half = torch.zeros(2, 5000).bfloat16()
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert torch.equal(draws(half, sampling, 50), draws(half.float(), sampling, 50))


def test_a_temperature_so_low_that_it_could_only_mean_greedy_is_refused() -> None:
    for well in (0.0, 1e-6):
        assert Sampling(temperature=well).temperature == well
    with pytest.raises(ZipperError, match=r"temperature is 1e-07; it must be 0, which is greedy"):
        Sampling(temperature=1e-7)


def test_what_is_not_allowed_is_told_by_its_id_and_by_what_came_last() -> None:
    flat = torch.zeros(5)
    with pytest.raises(ZipperError, match=r"names the id -1; this tower knows those from 0 to 4"):
        Rules(lambda _: [-1, 3]).weigh(flat, [])
    with pytest.raises(ZipperError, match=r"Behind \[2, 3, 4, 5, 6, 7, 8, 9\] no id is allowed"):
        Rules(lambda _: []).weigh(flat, range(10))
    with pytest.raises(ZipperError, match="not even the end"):  # what guidance had ruled out
        Rules(lambda _: [1]).weigh(torch.tensor([0.0, -inf]), [])


def test_of_some_sequences_each_may_go_on_as_one_of_them_and_nothing_else_may() -> None:
    allowed = one_of([[1], [1, 2], [3]], 9)
    found = [set(allowed(ids) or ()) for ids in ((), (1,), (1, 2), (3,))]
    assert found == [{1, 3}, {2, 9}, {9}, {9}]
    for ids in ((2,), (1, 2, 9), (3, 1)):  # None would let anything follow
        few = allowed(ids)
        assert few is not None and not {*few}


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_numbers_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ZipperError, match="temperature >= 0, top_k >= 0, 0 < top_p <= 1"):
        Sampling(**bad)


def test_guidance_of_one_is_the_model_and_none_is_the_tower_alone() -> None:
    seeing, blind = torch.randn(2, 3, 5).log_softmax(-1)
    torch.testing.assert_close(Sampling(guidance=1.0).guide(seeing, blind), seeing)
    torch.testing.assert_close(Sampling(guidance=0.0).guide(seeing, blind), blind)
    torch.testing.assert_close(Sampling(guidance=3.0).guide(seeing, blind), 3 * seeing - 2 * blind)
    seeing[0, 1] = blind[1, 2] = -torch.inf
    guided = Sampling(guidance=2.0).guide(seeing, blind)
    assert (guided == -torch.inf).nonzero().tolist() == [[0, 1], [1, 2]]
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ZipperError, match="guidance >= 0"):
            Sampling(guidance=wrong)
