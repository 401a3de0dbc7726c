"""From logits to the next token: greedy, temperature, top-k, top-p. Every row has its own random stream, so that what is drawn
for it does not depend on its neighbours in a batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zipper.errors import ZipperError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 = greedy. top_k: keep the k likeliest (0 = all). top_p: keep the smallest set of at least this probability
    (nucleus sampling, arXiv:1904.09751). seed: row i of a batch draws from seed + i."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ZipperError(
                f"Sampling wants temperature >= 0, top_k >= 0 and 0 < top_p <= 1; "
                f"it got {self.temperature}, {self.top_k} and {self.top_p}."
            )

    def generators(self, rows: int) -> list[torch.Generator]:
        """One random stream per row."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(rows)]


def choose(
    logits: Float[Tensor, "batch vocabulary"], sampling: Sampling, generators: list[torch.Generator]
) -> Int[Tensor, " batch"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    kept = keep(logits.float().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    probabilities = kept.softmax(-1)
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


def keep(logits: Float[Tensor, "batch vocabulary"], top_k: int, top_p: float) -> Float[Tensor, "batch vocabulary"]:
    """Logits with everything outside the top k and the nucleus p at -inf; at least one token stays."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        logits = logits.scatter(-1, order, ranked.masked_fill(before >= top_p, -torch.inf))
    return logits
