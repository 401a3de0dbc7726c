"""Adapters on a frozen tower: they change nothing at birth, learn alone, and are saved without
their base."""

import dataclasses
import math
from pathlib import Path

import pytest
import tiny
import torch
from laws import lay, number
from tiny import World

from zipper.errors import ZipperError
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.testing import tiny_tower
from zipper.tower import Strand, Tower
from zipper.training import train

# Peft sees GPT-2's transposed weights by itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
RANK = {"r": 4, "lora_alpha": 8}
SEQUENCE = [("speech", 3), ("speech", 4), ("text", 5), ("text", 6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def zipped(family: str = "llama", **settings: object) -> Zipper:
    towers = {"text": tiny_tower(family), "speech": tiny_tower("gpt2", seed=1)}
    return Zipper.from_towers(towers, lora={"text": RANK | settings})


def adapters(model: Zipper) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_changes_nothing_at_birth_and_the_base_keeps_its_hash(family: str) -> None:
    bare, model = tiny_tower(family), zipped(family)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model({"text": Strand.alone(ids)})["text"], bare(ids).logits)
    assert len(adapters(model)) > 0
    assert (
        model.config.towers["text"].digest == model.pin("text", torch.float32) == Tower(bare).pin()
    )


def test_only_the_adapter_and_the_links_learn() -> None:
    model = zipped().train()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == set(model.new_parameters()) and set(adapters(model)) < learns
    model(lay([number(SEQUENCE)]))["text"].sum().backward()
    grown = [p.grad for name, p in adapters(model).items() if "lora_B" in name]
    assert grown and all(grad is not None and grad.abs().max() > 0 for grad in grown)


def test_what_learns_is_changed_in_place_and_says_the_same() -> None:
    towers = {"text": tiny_tower("llama"), "speech": tiny_tower("gpt2", seed=1)}
    model = Zipper.from_towers(towers, train=["speech"])
    strands = lay([number(SEQUENCE)])
    before = {name: logits.clone() for name, logits in model(strands).items()}
    assert model.learn(lora={"speech": RANK}) is model
    after = model(strands)
    assert all(torch.equal(after[name], logits) for name, logits in before.items())
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters(model).keys() == {name for name in learns if name.startswith("towers.")}
    with pytest.raises(ZipperError, match="both name"):
        model.learn(train=["speech"])
    was = model.config, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZipperError, match="cannot be adapted"):
        model.learn(train=["text"], lora={"speech": {"r": 2, "target_modules": ["none"]}})
    assert was == (model.config, [p.requires_grad for p in model.parameters()])


def test_a_run_with_an_adapter_saves_it_beside_an_untouched_base(
    world: World, tmp_path: Path
) -> None:
    base = Tower.load(world.folder / "text" / "tower").pin()
    config = world.config(tmp_path / "run", lora={"text": RANK}, lr_tower=0.1)
    trained = train(config).model
    again = Pipeline.from_pretrained(tmp_path / "run" / "model").model
    assert again.pin("text", torch.float32) == base
    assert any(p.abs().max() > 0 for name, p in adapters(again).items() if "lora_B" in name)
    assert all(
        torch.equal(again.state_dict()[name], tensor)
        for name, tensor in trained.state_dict().items()
    )
    assert not (tmp_path / "run" / "model" / "towers" / "text").exists()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }


def test_a_base_that_is_included_is_saved_without_its_adapter(tmp_path: Path) -> None:
    model = zipped()
    with torch.no_grad():
        for p in adapters(model).values():
            p += 0.1
    model.save_pretrained(tmp_path / "zip", include=["text", "speech"])
    assert (
        Tower.load(tmp_path / "zip" / "towers" / "text").pin() == Tower(tiny_tower("llama")).pin()
    )
    again, strands = Zipper.from_pretrained(tmp_path / "zip"), lay([number(SEQUENCE)])
    assert torch.equal(again(strands)["text"], model(strands)["text"])


def test_what_cannot_be_adapted_is_a_clear_error() -> None:
    towers = {"text": tiny_tower("llama"), "speech": tiny_tower("gpt2")}
    for lora, train_too, message in (
        ({"texd": RANK}, (), "lora names the tower 'texd'"),
        ({"text": RANK}, ("text",), "train and lora both name"),
        ({"text": {"rank": 4}}, (), r"lora\['text'\] sets \['rank'\]; a zip can keep"),
        ({"text": {"target_modules": ["nothing"]}}, (), "cannot be adapted by lora="),
        (
            {"text": RANK | {"bias": "all"}},
            (),
            "'text': lora: bias is 'all'; only 'none' can be kept",
        ),
        (
            {"text": RANK | {"bias": "lora_only"}},
            (),
            "bias is 'lora_only'; only 'none' can be kept",
        ),
        (
            {"text": {"r": 33}},
            (),
            "'text': lora: r is 33; it must be at most 32, the width of the tower",
        ),
        ({"text": {"r": 0}}, (), "r(: it)? is 0; it must lie between"),
        ({"text": {"r": 2.0}}, (), "lora, r: it is 2.0; it must be of type int"),
        ({"text": {"lora_alpha": 0}}, (), "lora_alpha(: it)? is 0.0; it must lie between"),
        ({"text": {"lora_alpha": math.nan}}, (), "lora_alpha(: it)? is nan; it must lie between"),
        (
            {"text": {"lora_dropout": 1.0}},
            (),
            "lora_dropout(: it)? is 1.0; it must lie between 0 and 0.999",
        ),
        ({"text": {"target_modules": 3}}, (), "target_modules(: it)? is 3; it must be of type str"),
    ):
        with pytest.raises(ZipperError, match=message):
            Zipper.from_towers(towers, lora=lora, train=train_too)


def test_a_model_with_an_adapter_is_not_taken_for_a_bare_one() -> None:
    adapted = zipped().tower("text")
    other = {"speech": tiny_tower("gpt2")}
    assert (
        Zipper.from_towers({"text": adapted, **other}, lora={"text": RANK})
        .config.towers["text"]
        .lora
        == RANK
    )
    with pytest.raises(ZipperError, match="has an adapter with other settings"):
        Zipper.from_towers({"text": adapted, **other}, lora={"text": RANK | {"r": 2}})
    with pytest.raises(ZipperError, match="'text' has an adapter"):
        Zipper.from_towers({"text": adapted, **other})


def test_the_settings_survive_the_configuration() -> None:
    config = zipped(target_modules=["q_proj"]).config
    assert type(config).from_dict(config.to_dict()) == dataclasses.replace(config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": r".*\.1\..*_proj", "use_rslora": True},
        {
            "target_modules": "all-linear",
            "exclude_modules": ["lm_head", "mlp.c_fc", "up_proj"],
            "use_dora": True,
        },
        {"target_modules": ("c_proj", "o_proj"), "lora_alpha": 4},
        {"r": 32},
    ],
    ids=str,
)
def test_whatever_adapter_a_zip_is_born_with_can_be_loaded_again(
    tmp_path: Path, family: str, settings: dict[str, object]
) -> None:
    if family == "gpt2" and "o_proj" in str(settings):
        settings = settings | {"target_modules": ("c_proj",)}
    model = zipped(family, **settings)
    with torch.no_grad():
        for p in adapters(model).values():
            p += 0.05
    model.save_pretrained(tmp_path / "zip", include=["text", "speech"])
    again, strands = Zipper.from_pretrained(tmp_path / "zip"), lay([number(SEQUENCE)])
    assert adapters(again).keys() == adapters(model).keys() and len(adapters(again)) > 0
    assert torch.equal(again(strands)["text"], model(strands)["text"])
    modules = again.config.towers["text"].lora or {}
    assert (
        modules == model.config.towers["text"].lora
        and modules.get("target_modules") != "all-linear"
    )
    again.save_pretrained(tmp_path / "again", include=["text", "speech"])
    assert Zipper.from_pretrained(tmp_path / "again").config.towers["text"].lora == modules


def test_an_adapter_of_a_word_is_known_again_by_the_word() -> None:
    adapted, other = (
        zipped(target_modules="all-linear").tower("text"),
        {"speech": tiny_tower("gpt2")},
    )
    same = Zipper.from_towers(
        {"text": adapted, **other}, lora={"text": RANK | {"target_modules": "all-linear"}}
    )
    assert len((same.config.towers["text"].lora or {})["target_modules"]) == 7
    with pytest.raises(ZipperError, match="has an adapter with other settings"):
        Zipper.from_towers(
            {"text": adapted, **other}, lora={"text": RANK | {"target_modules": ["q_proj"]}}
        )


def test_a_tower_that_cannot_be_adapted_stays_as_it_is() -> None:
    bare = tiny_tower("llama")
    with pytest.raises(ZipperError, match="cannot be adapted"):
        Tower(bare).adapt({"target_modules": ["nothing"]})
    assert not any(".lora_" in name or ".base_layer" in name for name, _ in bare.named_parameters())
    assert getattr(bare, "peft_config", None) is None


def test_one_adapter_that_fails_changes_no_tower(tmp_path: Path) -> None:
    towers = {"text": tiny_tower("llama"), "speech": tiny_tower("gpt2")}
    wrong = {"text": RANK, "speech": {"target_modules": ["nothing"]}}
    with pytest.raises(ZipperError, match="cannot be adapted"):
        Zipper.from_towers(towers, lora=wrong)
    model = Zipper.from_towers(towers)
    with pytest.raises(ZipperError, match="cannot be adapted"):
        model.learn(lora=wrong)
    model.learn(train=["speech"])
    model.save_pretrained(tmp_path / "zip", include=["text", "speech"])
    assert Zipper.from_pretrained(tmp_path / "zip").config.towers["text"].lora is None
