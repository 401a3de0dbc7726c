"""Every number of every configuration: what it cannot work with is refused when it is made, in one
sentence; what is accepted is finite, of the type that its field names and inside the limits that
hold for files too.
"""

import dataclasses
import math
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from laws import unchecked

from zipper import config as shapes
from zipper import generation, link, sampling
from zipper.config import Adapter, TowerConfig, ZipperConfig
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.sampling import Rules, Sampling, Search
from zipper.training import TrainConfig
from zipper.training import config as recipes

TOWER = {"source": "gpt2", "width": 8, "layers": 4, "vocabulary": 9, "begin": 0, "end": 1}
RECIPE = {
    "output": "runs/x",
    "towers": {"text": "a", "speech": "b"},
    "modalities": {"text": "c", "speech": "d"},
    "data": "x.jsonl",
    "dev": "y.jsonl",
    "tasks": {"speech -> text": 1.0, "text -> speech": 1.0},
    "steps": 3,
    "train": ("speech",),
}
MADE: dict[type, dict[str, Any]] = {
    LinkConfig: {},
    TowerConfig: TOWER,
    Adapter: {},
    Sampling: {},
    Rules: {},
    Search: {},
    TrainConfig: RECIPE,
}
#: Of mappings, something for one tower; of pairs, both.
CONTAINERS = {
    "tasks": lambda n: {"speech -> text": n},
    "data": lambda n: {"x.jsonl": n},
    "every": lambda n: {"text": n},
    "loss_weight": lambda n: {"text": n},
    "corrupt": lambda n: {"text": n},
    "pack": lambda n: {"text": n},
    "betas": lambda n: (n, n),
}
NOT_FINITE = (math.nan, math.inf, -math.inf)
ODD = (
    *NOT_FINITE,
    -1,
    -0.5,
    -(2**70),
    2**64,
    2.0**200,
    10**400,
    1e-45,
    True,
    False,
    "1",
    [1],
    None,
    1j,
)


def numeric(kind: type) -> list[str]:
    """The fields that hold numbers, in containers too."""

    def holds(annotation: Any) -> bool:
        return annotation in (int, float) or any(map(holds, get_args(annotation)))

    hints = get_type_hints(kind)
    return [
        field.name
        for field in dataclasses.fields(kind)
        if holds(hints[field.name]) and get_origin(hints[field.name]) is not type
    ]


FIELDS = [
    (kind, name)
    for kind in MADE
    for name in numeric(kind)
    if name not in ("junctions", "allowed", "lora")
]


def numbers(value: Any) -> list[Any]:
    """All numbers in a value."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    return (
        [n for item in value for n in numbers(item)] if isinstance(value, list | tuple) else [value]
    )


def test_the_fields_are_those_that_there_are() -> None:
    names = {name for _, name in FIELDS}
    assert {
        "temperature",
        "seed",
        "guidance",
        "width",
        "lr_new",
        "betas",
        "corrupt",
        "gate_init",
        "lora_alpha",
        "most_bad",
    } <= names
    assert len(FIELDS) > 50


@pytest.mark.parametrize("kind", [*MADE], ids=lambda kind: kind.__name__)
def test_a_number_is_refused_or_such_as_work_can_be_done_with(kind: type) -> None:
    refused = []
    for name, odd in product([name for owner, name in FIELDS if owner is kind], ODD):
        given = CONTAINERS[name](odd) if kind is TrainConfig and name in CONTAINERS else odd
        try:
            with unchecked():
                made = kind(**(MADE[kind] | {name: given}))
        except ZipperError as error:
            refused.append(f"{name} {odd}: {error}")
            continue
        assert odd not in NOT_FINITE and not isinstance(odd, str | bool | list | complex), (
            f"{name}={odd!r} was accepted"
        )
        for number in numbers(getattr(made, name)):
            assert number is None or (type(number) in (int, float) and abs(number) < 2**63), (
                f"{name}={odd!r} became {number!r}"
            )
    assert len(refused) > 8 * len({name for owner, name in FIELDS if owner is kind})
    assert all(len(sentence) < 1000 for sentence in refused)


@pytest.mark.parametrize("name", ["width", "begin", "tokens", "layers"])
def test_a_configuration_is_checked_in_a_program_as_in_a_file(name: str) -> None:
    worst = dict(
        zip(("width", "begin", "tokens", "layers"), (2**21, -1, 1e7, 10_001), strict=True)
    )[name]
    with pytest.raises(ZipperError, match=rf"{name} is .*; it must lie between") as made:
        TowerConfig(**(TOWER | {name: worst}))
    with pytest.raises(ZipperError, match=r"^x, towers, 'text': ") as read:
        ZipperConfig.from_dict({"towers": {"text": TOWER | {name: worst}}, "junctions": []}, "x")
    assert str(made.value) in str(read.value)


def test_the_ids_that_begin_and_end_are_among_those_of_the_tower() -> None:
    with pytest.raises(ZipperError, match=r"ids 0 and 9, begin and end, are not all below 9"):
        TowerConfig(**(TOWER | {"end": 9}))


def test_every_limit_names_a_field() -> None:
    """A field that is renamed would lose its limits without a word."""
    fields = {field.name for kind in (*MADE, ZipperConfig) for field in dataclasses.fields(kind)}
    for limits in (link.LIMITS, shapes.LIMITS, recipes.LIMITS):
        assert limits.keys() <= fields
    assert sampling.MOST_SEED + (1 << 20) < 2**64 and generation.CHUNK


@pytest.mark.parametrize("seed", [2**63, 2**64, 1.5, True, math.nan, "1"])
def test_a_zip_is_born_from_a_seed_that_torch_takes(seed: Any) -> None:
    with unchecked(), pytest.raises(ZipperError, match=r"seed is .*; it must be a whole number"):
        sampling.check_seed(seed)


def test_what_a_recipe_was_made_of_may_change_and_the_recipe_does_not() -> None:
    tasks, towers, link_settings = (
        {"speech -> text": 1.0},
        {"text": {"model_type": "llama", "sizes": [1]}, "speech": Path("b")},
        {"r": 2},
    )
    lora = {"speech": link_settings | {"target_modules": ["q_proj"]}}
    with unchecked():
        recipe = TrainConfig(
            **(RECIPE | {"tasks": tasks, "towers": towers, "lora": lora, "train": ["text"]})
        )
    tasks["text -> speech"] = 1.0
    towers["text"]["sizes"].append(2)  # type: ignore[index, union-attr]
    lora["speech"]["target_modules"].append("v_proj")  # type: ignore[attr-defined]
    assert recipe.tasks == {"speech -> text": 1.0} and recipe.towers["text"]["sizes"] == [1]
    assert recipe.lora == {"speech": {"r": 2, "target_modules": ["q_proj"]}} and recipe.train == (
        "text",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"text -> speech": 1.0}, "corrupt": {"text": 0.1}},
            "corrupt names 'text', which is produced in no task",
        ),
        (
            {"tasks": {"text -> speech": 1.0}, "loss_weight": {"text": 2.0}},
            "loss_weight names 'text', which is produced in no task",
        ),
        (
            {"tasks": {"-> speech": 1.0}, "pack": {"text": 64}},
            "pack names 'text', which is named by no task",
        ),
        ({"tasks": {"-> text": 1.0}}, "train names 'speech', which is named by no task"),
        (
            {"tasks": {"-> text": 1.0, "text -> speech": 0.0}},
            "train names 'speech', which is named by no task",
        ),
        (
            {"tasks": {"-> speech": 1.0}, "lora": {"text": {"r": 2}}},
            "lora names 'text', which is named by no task",
        ),
        ({"loss_weight": {"text": 0.0, "speech": 0.0}}, "nothing that is produced has a loss"),
        (
            {"calibrate": 8, "link": LinkConfig(projection_depth=0)},
            "without a projection cannot be calibrated",
        ),
        ({"frozen_dtype": "bfloat16", "train": ("text", "speech")}, "every tower learns"),
        ({"least_ids": 9, "most_ids": 8}, "no row has so many and so few"),
        ({"lora": {"text": {"r": 2, "bias": "all"}}}, "bias is 'all'; only 'none' can be kept"),
        ({"lora": {"text": {"lora_alpha": 0}}}, "lora_alpha is 0.0; it must lie between"),
        ({"lora": {"text": {"rank": 2}}}, "it has the key 'rank'"),
    ],
)
def test_a_setting_of_a_recipe_that_would_do_nothing_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with unchecked(), pytest.raises(ZipperError, match=message):
        TrainConfig(**(RECIPE | changes))


@pytest.mark.parametrize(
    "option", [{"calibrate": 8}, {"every": {"text": 1}}, {"junctions": [{"text": 1}]}]
)
def test_what_is_of_links_is_refused_for_one_tower(option: dict[str, Any]) -> None:
    one = {
        "towers": {"text": "a"},
        "modalities": {"text": "c"},
        "tasks": {"-> text": 1.0},
        "train": (),
    }
    TrainConfig(**(RECIPE | one))
    with pytest.raises(ZipperError, match="one tower has no links: leave it out"):
        TrainConfig(**(RECIPE | one | option))
