"""The checks behind every other test see a wrong shape, a shape that two arguments do not share, a
wrong kind of number, and fields of a dataclass that do not go together."""

from typing import Any

import jaxtyping
import pytest
import torch

from zipper.strand import Strand

violation = pytest.importorskip("beartype.roar").BeartypeCallHintViolation


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda any: Strand.alone(any(torch.zeros(3).long())), id="dimensions"),
        pytest.param(
            lambda any: Strand.alone(torch.zeros(2, 3).long(), any(torch.zeros(2, 4).long())),
            id="lengths that differ",
        ),
        pytest.param(lambda any: Strand.alone(any(torch.zeros(2, 3))), id="kind of number"),
        pytest.param(
            lambda any: Strand(*[any(torch.zeros(2, n).long()) for n in (3, 3, 3, 4)]),
            id="fields of a dataclass that differ",
        ),
    ],
)
def test_what_does_not_fit_is_seen(call: Any) -> None:
    with pytest.raises((TypeError, jaxtyping.TypeCheckError, violation)):
        call(lambda value: value)
