"""From logits to the next token: greedy, temperature, top-k, top-p, and rules on what a segment may
say. Every row has its own random stream, so that what is drawn for it does not depend on its
neighbours in a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zipper.errors import ZipperError
from zipper.saving.files import MOST_INTEGER, settle

MOST_SEED = (1 << 63) - 1


def check_seed(seed: int) -> None:
    """Raises a ZipperError for what is no seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -MOST_SEED <= seed <= MOST_SEED:
        raise ZipperError(f"seed is {seed!r}; it must be a whole number of at most {MOST_SEED}.")


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 = greedy, whatever top_k and top_p say; else from 1e-6 to 1e6. top_k: keep the
    k likeliest (0 = all). top_p: keep the smallest set of at least this probability (nucleus
    sampling, arXiv:1904.09751). seed: row i of a batch draws from seed + i. guidance: how far to go
    from what the tower would say alone towards what it says having seen the others, in
    log-probabilities (classifier-free guidance, arXiv:2306.17806); 1 = no further than the model
    goes, 2 often helps text to speech, at the cost of the tower once more. A plan of one tower has
    no others, and is not guided.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        most = {
            "temperature": (0.0, 1e6),
            "top_k": (0, MOST_INTEGER),
            "top_p": (1e-300, 1.0),
            "guidance": (0.0, 1e3),
        }
        try:
            settle(self, most | {"seed": (-MOST_SEED, MOST_SEED)})
            if 0 < self.temperature < 1e-6:
                raise ZipperError(
                    f"temperature is {self.temperature}; it must be 0, which is greedy, or at "
                    "least 1e-6."
                )
        except ZipperError as error:
            wanted = "temperature >= 0, top_k >= 0, 0 < top_p <= 1 and guidance >= 0"
            raise ZipperError(f"Sampling wants {wanted}; {error}") from error

    def guide(
        self, seeing: Float[Tensor, "*rows vocabulary"], blind: Float[Tensor, "*rows vocabulary"]
    ) -> Float[Tensor, "*rows vocabulary"]:
        """Logits to choose from, by those of the model and those of the tower alone. What either
        rules out stays so."""
        seeing, blind = seeing.log_softmax(-1), blind.log_softmax(-1)
        guided = blind + self.guidance * (seeing - blind)
        return guided.masked_fill((seeing == -torch.inf) | (blind == -torch.inf), -torch.inf)

    def generators(self, rows: int) -> list[torch.Generator]:
        """One random stream per row."""
        return [torch.Generator().manual_seed(self.of_row(row).seed) for row in range(rows)]

    def of_row(self, row: int) -> "Sampling":
        """How a row of a batch is drawn: from the seed + row; behind the largest seed comes the
        smallest."""
        seed = (self.seed + row + MOST_SEED) % (2 * MOST_SEED + 1) - MOST_SEED
        return replace(self, seed=seed)


#: From the ids of a segment so far to those that may come next, its end id among them if it may
#: end; None = any.
Allowed = Callable[[Sequence[int]], Iterable[int] | None]


@dataclass(frozen=True)
class Rules:
    """What a segment may say, whoever chooses.

    allowed: see `Allowed`. repetition: the log-probability of an id that the segment holds already
    is multiplied by it, 1 = let be (the penalty of CTRL, arXiv:1909.05858, on log-probabilities,
    which are never positive). period, repeats: a segment that ends in the same 1 to `period` ids so
    many times is closed: speech units that loop go on for ever. 0 = loops are let be; a long
    silence is a loop too.
    """

    allowed: Allowed | None = None
    repetition: float = 1.0
    period: int = 0
    repeats: int = 4

    def __post_init__(self) -> None:
        settle(
            self, {"repetition": (1.0, 1e6), "period": (0, 1_000_000), "repeats": (2, 1_000_000)}
        )

    def weigh(
        self, logprobs: Float[Tensor, " vocabulary"], ids: Sequence[int]
    ) -> Float[Tensor, " vocabulary"]:
        """Log-probabilities behind `ids`, or guided logits, what is not allowed at -inf. Raises a
        ZipperError where nothing is left."""
        if self.repetition != 1 and ids:
            logprobs = logprobs.log_softmax(-1)  # where they were guided some are above 0
            held = torch.tensor(sorted({*ids}), device=logprobs.device)
            logprobs = logprobs.index_copy(0, held, logprobs[held] * self.repetition)
        if self.allowed is not None and (few := self.allowed(tuple(ids))) is not None:
            kept = torch.full_like(logprobs, -torch.inf)
            ids_of = sorted({*few})
            if ids_of and not 0 <= ids_of[0] <= ids_of[-1] < len(logprobs):
                strange = ids_of[0] if ids_of[0] < 0 else ids_of[-1]
                raise ZipperError(
                    f"`allowed` names the id {strange}; this tower knows those from 0 to "
                    f"{len(logprobs) - 1}."
                )
            where = torch.tensor(ids_of, dtype=torch.long, device=logprobs.device)
            logprobs = kept.index_copy(0, where, logprobs[where])
            if bool((logprobs == -torch.inf).all()):
                raise ZipperError(
                    f"Behind {list(ids)[-8:]} no id is allowed, not even the end. Let `allowed` "
                    "name one."
                )
        return logprobs

    def loops(self, ids: Sequence[int]) -> bool:
        """Whether the segment ends in a loop."""
        return any(
            len(ids) >= n * self.repeats
            and list(ids[-n * self.repeats :]) == list(ids[-n:]) * self.repeats
            for n in range(1, self.period + 1)
        )


@dataclass(frozen=True)
class Search:
    """Beam search instead of sampling, segment by segment.

    width: hypotheses that go on. best: how many are told at the end; the first one is what the
    segments after it see.
    length_power: a hypothesis of n tokens, its end included, is ranked by log-probability / ((5 +
    n) / 6) ** length_power (GNMT, arXiv:1609.08144, eq. 14); 0 = by log-probability, which favours
    short ones.
    """

    width: int = 4
    best: int = 1
    length_power: float = 0.6

    def __post_init__(self) -> None:
        settle(self, {"width": (1, 10_000), "best": (1, 10_000), "length_power": (0.0, 100.0)})
        if self.best > self.width:
            raise ZipperError(
                f"A search for the best {self.best} with a width of {self.width} was wanted; it "
                "finds no more than its width."
            )

    def score(self, logprob: float, tokens: int) -> float:
        """What hypotheses are ranked by; the more tokens share a log-probability, the higher."""
        return logprob / ((5 + tokens) / 6) ** self.length_power


def one_of(sequences: Iterable[Sequence[int]], end: int) -> Allowed:
    """Allows these sequences of ids and nothing else, each followed by `end`."""
    tree: dict[tuple[int, ...], set[int]] = {}
    for sequence in sequences:
        for n, i in enumerate([*sequence, end]):
            tree.setdefault(tuple(sequence[:n]), set()).add(i)
    return lambda ids: tree.get(tuple(ids), ())


def choose(
    logits: Float[Tensor, "batch vocabulary"], sampling: Sampling, generators: list[torch.Generator]
) -> Int[Tensor, " batch"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    kept = keep(logits.float().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    probabilities = kept.softmax(-1)
    drawn = [
        torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def keep(
    logits: Float[Tensor, "batch vocabulary"], top_k: int, top_p: float
) -> Float[Tensor, "batch vocabulary"]:
    """Logits with everything outside the top k and the nucleus p at -inf; at least one token
    stays."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        # In float32 a tiny p is 0, and nothing comes before the likeliest.
        outside = (before >= top_p) & (before > 0)
        logits = logits.scatter(-1, order, ranked.masked_fill(outside, -torch.inf))
    return logits
