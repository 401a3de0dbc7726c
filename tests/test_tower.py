"""Towers against the models they drive: bit by bit where the kernel is the same, and every row
against the row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from zipper.errors import ZipperError
from zipper.testing import FAMILIES, tiny_tower
from zipper.tower import Past, Strand, Tower, UnsupportedTower
from zipper.towers import families

every_family = pytest.mark.parametrize("family", FAMILIES)
every_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
# Run by a recorded dry pass: alibi, per-layer inputs, positions that begin at the padding id, norms
# without a module ...
RECORDED = {
    "bloom": "packed",
    "falcon": "packed",
    "gemma4_text": "packed",
    "nanochat": "packed",
    "roberta": "packed",
}
FEWER = {"mpt": "padded", "bigbird_pegasus": "unpadded"}  # rows that they read
every_recorded = pytest.mark.parametrize("family", RECORDED | FEWER)
WINDOWED = ("mistral", "gemma3")  # with a window of 8 tokens


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def layout(*rows: str) -> Tensor:
    """Documents drawn as text: a digit is a document, a dot is padding."""
    return torch.tensor([[-1 if slot == "." else int(slot) for slot in row] for row in rows])


def own(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the bare model says of one row without padding."""
    return model(tokens[None]).logits[0]


def part(strand: Strand, start: int, stop: int) -> Strand:
    return Strand(
        *(
            field[:, start:stop]
            for field in (strand.ids, strand.position, strand.time, strand.document)
        )
    )


def assert_rows_are_as_alone(
    model: nn.Module, strand: Strand, logits: Tensor, relative: float
) -> None:
    """Every document of every row has the logits that the bare model gives it alone."""
    for row in range(len(strand.ids)):
        for document in strand.document[row].unique():
            if document >= 0:
                mine = strand.document[row] == document
                alone = own(model, strand.ids[row, mine])
                assert (logits[row, mine] - alone).abs().max() <= relative * alone.abs().max(), (
                    row,
                    int(document),
                )


def precise(model: Any) -> Any:
    """In double precision, where a family's own rounding in float32 comes near to what is allowed
    (gemma4_text: 1.06e-5 of 1e-5 on one CPU; 2e-16 so). Not for "eager", whose masks are of
    float32."""
    kind, kernel = model.config.model_type, model.config._attn_implementation
    return model.double() if (kind, kernel) == ("gemma4_text", "sdpa") else model


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@every_family
@every_kernel
@every_dtype
def test_a_tower_gives_its_models_own_logits_bit_for_bit(
    family: str, attention: Any, dtype: torch.dtype
) -> None:
    model = tiny_tower(family, dtype=dtype, attention=attention)
    tower, tokens = Tower(model), ids(3, 21)
    assert torch.equal(tower(Strand.alone(tokens)), model(tokens, use_cache=False).logits)

    strand = Strand.alone(tokens, layout("0" * 21, "." * 5 + "0" * 16, "." * 20 + "0"))
    valid = strand.document >= 0
    logits = model(
        tokens, attention_mask=valid.long(), position_ids=strand.position, use_cache=False
    ).logits
    assert torch.equal(tower(strand)[valid], logits[valid])


@every_family
def test_blocks_run_in_parts_give_the_models_own_hidden_states(family: str) -> None:
    model = tiny_tower(family)
    tower, strand = Tower(model), Strand.alone(ids(2, 13))
    truth = model(strand.ids, output_hidden_states=True)
    h = tower.embed(strand)
    run = tower.start(strand, h)
    assert torch.equal(h, truth.hidden_states[0])
    for start, stop in ((0, 1), (1, 3), (3, 3), (3, 4)):
        h = tower.run(h, range(start, stop), run)
        assert stop == tower.layers or torch.equal(h, truth.hidden_states[stop])
    assert torch.equal(tower.unembed(h), truth.logits)


@every_family
def test_a_tower_gives_its_models_own_gradients(family: str) -> None:
    model = tiny_tower(family)
    strand = Strand.alone(ids(2, 13))
    gradients = []
    for logits in (model(strand.ids).logits, Tower(model)(strand)):
        model.zero_grad()
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# Transformers renames this switch; the old name works everywhere.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "nanochat"])
def test_recomputing_blocks_keeps_the_gradient(family: str) -> None:
    model = families.tiny(family).train()
    strand, gradients = Strand.alone(ids(2, 13)), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        Tower(model)(strand).log_softmax(-1)[..., 3].sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_dropout_falls_where_the_model_lets_it_fall(family: str) -> None:
    model = tiny_tower(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    strand, logits = Strand.alone(ids(2, 13)), []
    for forward in (lambda: model(strand.ids).logits, lambda: Tower(model)(strand)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            logits.append(forward())
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], model.eval()(strand.ids).logits)


@every_family
@pytest.mark.parametrize("steps", [(1,) * 20, (7, 7, 6), (13, 1, 1, 5), (20,)], ids=str)
def test_reading_in_steps_is_reading_at_once(family: str, steps: tuple[int, ...]) -> None:
    model = tiny_tower(family)
    tower = Tower(model)
    strand = Strand.alone(ids(3, 20), layout("0" * 20, "." * 6 + "0" * 14, "0" * 15 + "." * 5))
    past, logits, start = tower.new_past(), [], 0
    for step in steps:
        logits.append(tower(part(strand, start, start + step), past))
        start += step
        assert past.length == start
    assert_rows_are_as_alone(model, strand, torch.cat(logits, 1), 1e-5)


@every_family
@every_kernel
def test_padding_may_be_left_right_between_and_everywhere(family: str, attention: Any) -> None:
    model = tiny_tower(family, attention=attention)
    rows = [
        "0" * 20,
        "." * 6 + "0" * 14,
        "0" * 14 + "." * 6,
        "." * 20,
        "00..0000.00000...000",
        ".0.0.0.0.0.0.0.0.0.0",
    ]
    strand = Strand.alone(ids(len(rows), 20), layout(*rows))
    logits = Tower(model)(strand)
    assert logits.isfinite().all()
    assert_rows_are_as_alone(model, strand, logits, 1e-5)


@every_family
def test_padding_gives_no_nan_in_the_gradient(family: str) -> None:
    model = tiny_tower(family)
    Tower(model)(
        Strand.alone(ids(3, 8), layout("00000000", "........", "..0.0..."))
    ).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_family
@every_kernel
def test_packed_documents_are_as_separate_rows(family: str, attention: Any) -> None:
    model = tiny_tower(family, attention=attention)
    packed = layout(
        "0" * 12 + "1" * 5 + "2" * 13,
        "7" * 20 + "." * 9 + "3",
        "." * 4 + "5" * 13 + "." * 3 + "4" * 10,
    )
    strand = Strand.alone(ids(3, 30), packed)
    logits = Tower(model)(strand)
    assert_rows_are_as_alone(model, strand, logits, 2e-6)

    neighbour = packed[0] == 1
    other = strand.ids.clone()
    other[0, neighbour] = (other[0, neighbour] + 1) % 97
    changed = Tower(model)(Strand(other, strand.position, strand.time, strand.document))
    assert torch.equal(changed[0, ~neighbour], logits[0, ~neighbour])
    assert torch.equal(changed[1:], logits[1:])
    assert (changed[0, neighbour] - logits[0, neighbour]).abs().max() > 1e-2


@every_recorded
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_recorded_tower_gives_its_models_own_logits_and_states_and_leaves_it_as_it_was(
    family: str, dtype: torch.dtype
) -> None:
    model = families.tiny(family, dtype=dtype)
    modules, strand = list(model.named_modules()), Strand.alone(ids(2, 13))
    tower = Tower(model)
    digest = tower.digest()
    tower(strand)
    tower.check(seed=1)
    assert tower.recorded
    assert tower.digest() == digest
    assert [(name, id(module)) for name, module in model.named_modules()] == [
        (name, id(module)) for name, module in modules
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in modules)

    truth = model(strand.ids, output_hidden_states=True, use_cache=False)
    h = tower.embed(strand)
    run = tower.start(strand, h)
    for start, stop in ((0, 1), (1, 1), (1, 3), (3, 4)):
        assert torch.equal(h, truth.hidden_states[start])
        h = tower.run(h, range(start, stop), run)
    assert torch.equal(tower.unembed(h), truth.logits)


@every_recorded
def test_a_recorded_tower_gives_its_models_own_gradients(family: str) -> None:
    model = families.tiny(family)
    strand, gradients = Strand.alone(ids(2, 13)), []
    for forward in (lambda: model(strand.ids).logits, lambda: Tower(model)(strand)):
        model.zero_grad()
        forward().log_softmax(-1)[..., 3].sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() <= gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradient, gradients[0].get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", RECORDED)
@every_kernel
def test_recorded_towers_read_packed_rows_and_gaps_as_each_document_alone(
    family: str, attention: Any
) -> None:
    kernel = None if family == "bloom" else attention  # it has one kernel only
    model = precise(families.tiny(family, attention=kernel))
    packed = layout(
        "0" * 12 + "1" * 5 + "2" * 13,
        "7" * 20 + "." * 9 + "3",
        "." * 4 + "5" * 13 + "." * 3 + "4" * 10,
        "00..0." * 5,
    )
    # Ids below are special: RoBERTa counts positions by one.
    strand = Strand.alone(3 + ids(4, 30) % 90, packed)
    assert_rows_are_as_alone(model, strand, Tower(model)(strand), 1e-5)


@pytest.mark.parametrize("family", [*RECORDED, "mpt"])
def test_recorded_towers_go_on_with_a_ragged_batch_as_each_row_alone(family: str) -> None:
    model = precise(families.tiny(family))
    tower, past, logits = Tower(model), Past(), []
    strand = Strand.alone(
        3 + ids(3, 22) % 90, layout("0" * 22, "." * 9 + "0" * 13, "." * 3 + "0" * 19)
    )
    for start, stop in ((0, 9), (9, 16), (16, 17), (17, 20)):
        logits.append(tower(part(strand, start, stop), past))
    assert_rows_are_as_alone(model, part(strand, 0, 20), torch.cat(logits, 1), 1e-5)
    past.select([2, 0])
    chosen = Strand(*(field[[2, 0]] for field in vars(strand).values()))
    assert_rows_are_as_alone(
        model,
        chosen,
        torch.cat([tower(part(chosen, 0, 20)), tower(part(chosen, 20, 22), past)], 1),
        1e-5,
    )


def test_a_tower_that_counts_by_slots_reads_rows_from_the_first_slot_on() -> None:
    model = families.tiny("bigbird_pegasus")
    tower, past = Tower(model), Past()
    strand = Strand.alone(ids(2, 12), layout("0" * 12, "0" * 9 + "..."))
    assert_rows_are_as_alone(model, strand, tower(strand), 1e-5)
    logits = torch.cat(
        [tower(part(strand, start, stop), past) for start, stop in ((0, 7), (7, 8), (8, 12))], 1
    )
    assert_rows_are_as_alone(model, strand, logits, 1e-5)
    with pytest.raises(ZipperError, match=r"needs its past"):
        tower.embed(part(strand, 7, 8))
    with pytest.raises(ZipperError, match=r"no padding on the left"):
        tower(Strand.alone(ids(1, 6), layout("..0000")))


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("row", ["000111", "00..00"])
def test_rows_that_a_tower_cannot_read_are_an_error(family: str, row: str) -> None:
    tower = Tower(families.tiny(family))
    assert tower.rows == FEWER[family]
    with pytest.raises(ZipperError, match="no packed rows and no padding inside"):
        tower(Strand.alone(ids(1, 6), layout(row)))


def test_the_blocks_of_the_text_model_are_found_beside_as_many_of_an_image_encoder() -> None:
    model = families.tiny("gemma3")
    assert (
        model.config.vision_config.num_hidden_layers == model.config.text_config.num_hidden_layers
    )
    assert all(
        "Vision" not in type(block).__name__ and "Siglip" not in type(block).__name__
        for block in Tower(model).blocks
    )


def test_documents_stay_apart_whatever_their_positions() -> None:
    tower, tokens, document = Tower(tiny_tower("llama")), ids(1, 8), layout("00001111")
    position = torch.arange(8)[None]  # as if the second document had begun elsewhere
    logits = tower(Strand(tokens, position, position, document))
    other = torch.where(document == 0, (tokens + 1) % 97, tokens)
    assert torch.equal(tower(Strand(other, position, position, document))[0, 4:], logits[0, 4:])


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_is_really_there(family: str) -> None:
    wide = tiny_tower(family, window=64)(ids(1, 20)).logits
    narrow = tiny_tower(family, window=8)(ids(1, 20)).logits
    assert (wide - narrow)[:, 8:].abs().max() > 1e-2


@every_family
@pytest.mark.parametrize("compact", [False, True], ids=["gaps", "compact"])
def test_a_ragged_batch_goes_on_as_each_row_alone(family: str, compact: bool) -> None:
    """Rows end at different times, wait as padding, and go on: what generation does."""
    model = tiny_tower(family)
    tower, past = Tower(model), Past()
    strand = Strand.alone(
        ids(3, 26), layout("0" * 12 + "." * 4 + "0" * 10, "." * 9 + "0" * 17, "00....." + "0" * 19)
    )
    logits = []
    for start, stop in ((0, 9), (9, 16), (16, 17), (17, 26)):
        logits.append(tower(part(strand, start, stop), past))
        if compact:
            past.compact()
    assert_rows_are_as_alone(model, strand, torch.cat(logits, 1), 1e-5)
    if compact:
        assert past.document is not None
        lengths = (strand.document >= 0).sum(1)
        assert past.length == lengths.max()
        for document, length in zip(past.document, lengths, strict=True):
            assert document.tolist() == [-1] * (past.length - length) + [0] * length


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3"])
def test_a_past_can_be_reordered(family: str) -> None:
    model = tiny_tower(family)
    tower, tokens, past = Tower(model), ids(3, 18), Past()
    strand = Strand.alone(tokens, layout("0" * 18, "." * 3 + "0" * 15, "." * 10 + "0" * 8))
    tower(part(strand, 0, 12), past)
    past.select([2, 0, 0])
    assert past.length == 12
    chosen = Strand(
        *(f[[2, 0, 0]] for f in (strand.ids, strand.position, strand.time, strand.document))
    )
    logits = tower(part(chosen, 12, 18), past)
    assert_rows_are_as_alone(
        model, chosen, torch.cat([tower(part(chosen, 0, 12)), logits], 1), 1e-5
    )


def test_a_past_says_what_does_not_fit() -> None:
    tower, past = Tower(tiny_tower("llama")), Past()
    past.compact()
    past.select([0])
    tower(Strand.alone(ids(2, 5)), past)
    with pytest.raises(ZipperError, match=r"strand has 3 rows, the past 2"):
        tower(Strand.alone(ids(3, 1)), past)


def test_kernels_that_cannot_pack_refuse_to() -> None:
    tower = Tower(tiny_tower("llama"))
    tower.config._attn_implementation = "flash_attention_2"
    strand = Strand.alone(ids(1, 4), layout("0011"))
    with pytest.raises(ZipperError, match="set_attn_implementation"):
        tower.start(strand, tower.embed(strand))


def test_a_strand_alone_counts_within_each_document() -> None:
    strand = Strand.alone(ids(2, 8), layout("..0001.1", "2.2..200"))
    assert strand.position.tolist() == [[0, 0, 0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 0, 2, 0, 1]]
    assert torch.equal(strand.time, strand.position)
    assert Strand.alone(ids(1, 3)).document.tolist() == [[0, 0, 0]]


@every_family
@every_kernel
def test_check_accepts_the_families_and_leaves_no_trace(family: str, attention: Any) -> None:
    tower = Tower(tiny_tower(family, attention=attention))
    tower.train()
    tower.blocks[1].eval()
    modes = [module.training for module in tower.modules()]
    before, state = tower.digest(), torch.get_rng_state()
    tower.check()
    tower.check(seed=1)
    assert [module.training for module in tower.modules()] == modes
    assert tower.digest() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        (
            "granite",
            {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.5},
        ),
        ("cohere", {"logit_scale": 0.3}),
        ("gemma2", {"sliding_window": 8, "head_dim": 8}),
    ],
)
def test_scales_around_the_blocks_are_found_by_their_attributes(
    model_type: str, settings: dict[str, Any]
) -> None:
    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "bos_token_id": 0,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **(common | heads | settings))
    Tower(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).check()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}
BERT = BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32)


@pytest.mark.parametrize(
    ("cls", "config", "reason"),
    [
        (BertForMaskedLM, BERT, "no causal language model"),
        (
            MambaForCausalLM,
            MambaConfig(**SMALL),
            "keeps more than keys and values|keeps no keys and values",
        ),
        (
            T5ForConditionalGeneration,
            T5Config(vocab_size=97, d_model=32, d_ff=32),
            "no causal language model",
        ),
        (LlamaModel, tiny_tower("llama").config, "no causal language model"),
    ],
)
def test_what_is_no_causal_transformer_is_refused(cls: Any, config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedTower, match=f"{cls.__name__}.*({reason})"):
        Tower(cls(config))


def test_an_encoder_that_poses_as_a_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedTower, match="BertLMHeadModel"):
        Tower(BertLMHeadModel(BERT))


def test_one_flag_makes_the_encoder_a_decoder() -> None:
    decoder = BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32, is_decoder=True)
    Tower(BertLMHeadModel(decoder).eval()).check()


class Doubled(LlamaForCausalLM):
    """Does something to its logits after the head."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        output.logits = 2 * output.logits
        return output


class Shifted(LlamaModel):
    """Does something between the embedding and the first block."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return super().forward(inputs_embeds=self.embed_tokens(input_ids) + 1e-3, **kwargs)


class Tempering(LlamaForCausalLM):
    """Gives its blocks something that other models do not give."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, temperature=1.1, **kwargs
        )


class Tempered(LlamaDecoderLayer):
    """Takes it, and can do without."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        return super().forward(
            hidden_states * temperature,
            attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )


class Demanding(LlamaDecoderLayer):
    """Cannot do without."""

    def forward(self, hidden_states: Tensor, temperature: float, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states * temperature, **kwargs)


class Blind(LlamaDecoderLayer):
    """Takes no mask by name."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, **kwargs)


class Forgetful(LlamaDecoderLayer):
    """Takes a cache and does not write it."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        return super().forward(
            hidden_states, attention_mask, position_embeddings=position_embeddings
        )


class Between(LlamaModel):
    """Does something between its blocks."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **given: Any) -> Any:  # type: ignore[override]
        h = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(h, torch.arange(h.shape[1])[None])
        cache = next(
            (value for value in given.values() if isinstance(value, Cache)),
            DynamicCache(config=self.config),
        )
        for layer in self.layers:
            h = layer(h, None, None, cache, position_embeddings=rotary) * 1.01
        return BaseModelOutputWithPast(self.norm(h), cache)


class Twice(LlamaModel):
    """Runs its blocks once more."""

    def forward(self, input_ids: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        h = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(h, torch.arange(h.shape[1])[None])
        for layer in [*self.layers, *self.layers]:
            h = layer(h, position_embeddings=rotary)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class Peeking(LlamaDecoderLayer):
    """Adds to every token but the last four the one after it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        after = hidden_states.roll(-1, 1)
        after[:, -4:] = 0
        return super().forward(hidden_states, *args, **kwargs) + after


class Shelved(LlamaDecoderLayer):
    """Takes its cache under a name that no release of transformers has."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        shelf: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs
        return super().forward(
            hidden_states,
            attention_mask,
            position_ids,
            shelf,
            position_embeddings=position_embeddings,
        )


class Shelving(LlamaModel):
    """Gives its blocks a cache under their name, which is not its own."""

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        memories: Any = None,
    ) -> Any:  # type: ignore[override]
        h = self.embed_tokens(input_ids)
        read = 0 if memories is None else memories.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(read, read + h.shape[1], device=h.device)[None]
        mask = create_masks_for_generate(self.config, h, attention_mask, memories, position_ids)
        rotary = self.rotary_emb(h, position_ids)
        for layer in self.layers:
            h = layer(
                h,
                attention_mask=mask,
                position_ids=position_ids,
                shelf=memories,
                position_embeddings=rotary,
            )
        return self.norm(h)


class Remembering(LlamaForCausalLM):
    """Has a third name for it."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        souvenirs: Any = None,
        use_cache: Any = None,
    ) -> Any:
        return CausalLMOutput(
            logits=self.lm_head(self.model(input_ids, attention_mask, position_ids, souvenirs))
        )


def test_a_cache_is_found_whatever_model_and_blocks_call_it() -> None:
    model, plain = turned_into(Remembering, ""), tiny_tower("llama")
    model.model.__class__ = Shelving
    for layer in model.model.layers:
        layer.__class__ = Shelved
    tower, tokens = Tower(model), ids(2, 13)
    tower.check()
    assert (tower.cache_argument, tower.recorded) == ("souvenirs", False)
    assert torch.equal(tower(Strand.alone(tokens)), plain(tokens).logits)
    past, whole = tower.new_past(), Strand.alone(tokens)
    steps = [tower(part(whole, start, stop), past) for start, stop in ((0, 9), (9, 13))]
    assert torch.allclose(torch.cat(steps, 1), plain(tokens).logits, atol=1e-5)
    assert past.cache.get_seq_length() == 13


def turned_into(cls: type[Any], path: str) -> Any:
    """A tiny llama with one of its modules broken."""
    model = tiny_tower("llama")
    (model.get_submodule(path) if path else model).__class__ = cls
    return model


@pytest.mark.parametrize(
    ("cls", "path"),
    [(Doubled, ""), (Tempering, ""), (Shifted, "model"), (Blind, "model.layers.2")],
)
def test_what_stands_around_the_blocks_is_run_by_the_models_own_code(
    cls: type[Any], path: str
) -> None:
    model = turned_into(cls, path)
    if cls is Tempering:
        model.model.layers[2].__class__ = Tempered
    tower, tokens = Tower(model), ids(2, 13)
    assert tower.recorded and not Tower(tiny_tower("llama")).recorded
    assert torch.equal(tower(Strand.alone(tokens)), model(tokens).logits)
    tower.check()


@pytest.mark.parametrize(
    ("cls", "path", "reason"),
    [
        (Forgetful, "model.layers.3", "in steps its own forward fails"),
        (Demanding, "model.layers.2", "own forward fails: TypeError: .*temperature"),
        (Between, "model", "something between its blocks"),
        (Twice, "model", "does not run its blocks once each"),
        (Peeking, "model.layers.2", "a token sees what comes after it"),
    ],
)
def test_a_model_that_the_driver_cannot_repeat_is_refused(
    cls: type[Any], path: str, reason: str
) -> None:
    with pytest.raises(UnsupportedTower, match=reason):
        Tower(turned_into(cls, path)).check()


def test_a_nan_is_no_agreement() -> None:
    model = tiny_tower("llama")
    model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(UnsupportedTower, match="differ by nan"):
        Tower(model)


@every_family
def test_a_tower_knows_its_sizes_and_its_ends(family: str) -> None:
    tower = Tower(tiny_tower(family, width=48, layers=3, vocabulary=65))
    assert (tower.width, tower.layers, tower.vocabulary, tower.begin, tower.end) == (
        48,
        3,
        65,
        0,
        1,
    )
    assert tower(Strand.alone(torch.zeros(1, 2, dtype=torch.long))).shape == (1, 2, 65)
    tower.config.bos_token_id, tower.config.eos_token_id = None, [7, 8]
    assert (tower.begin, tower.end) == (7, 7)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_digest_outlives_saving_and_loading(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tower = Tower(tiny_tower(family, dtype=dtype))
    tower.model.save_pretrained(tmp_path)
    loaded = Tower.load(tmp_path)
    assert loaded.model.dtype == dtype
    assert loaded.digest() == tower.digest()
    assert loaded.pin() == tower.pin()
    assert torch.equal(loaded(Strand.alone(ids(1, 9))), tower(Strand.alone(ids(1, 9))))


def test_a_digest_sees_every_parameter_and_buffer() -> None:
    tower = Tower(tiny_tower("gemma3"))
    before, seen = tower.digest(), set()
    held = [*tower.model.parameters(), *tower.model.buffers()]
    for tensor in held:
        flat = tensor.detach().view(-1)
        value = flat[-1].clone()
        flat[-1] = value + 1
        seen.add(tower.digest())
        flat[-1] = value
    assert len(seen | {before}) == len(held) + 1
    assert tower.digest() == before


def test_a_digest_sees_names_types_and_shapes() -> None:
    tower, seen = Tower(tiny_tower("llama")), set()
    for zeros in (torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2)):
        tower.model.register_buffer("memo", zeros)
        seen |= {tower.digest(), tower.pin()}
    del tower.model.memo
    tower.model.register_buffer("note", torch.zeros(4))
    assert len(seen | {tower.digest(), tower.pin()}) == 8


def test_a_pin_sees_what_a_checkpoint_holds() -> None:
    tower = Tower(tiny_tower("gemma3"))
    before = tower.pin()
    for buffer in tower.model.buffers():
        buffer += 1  # rotary frequencies differ in their last bits from machine to machine
    assert tower.pin() == before
    tower.model.get_input_embeddings().weight[0, 0] += 1
    assert tower.pin() != before
    assert Tower(tiny_tower("gemma3", seed=1)).pin() != before


def test_loading_says_what_is_missing_and_does_not_wait_for_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to try again")
    )
    (tmp_path / "empty").mkdir()
    for source, reason in [
        (tmp_path / "nowhere", "does not exist"),
        (str(tmp_path / "nowhere"), "does not exist"),
        ("./nowhere", "does not exist"),
        (tmp_path / "empty", "has no config.json"),
        ("nobody/nothing", "nobody/nothing is no folder and not wholly in the hub's cache"),
    ]:
        with pytest.raises(ZipperError, match=reason):
            Tower.load(source)
    for wrong in ("{}", "{", '{"model_type": "nothing"}', '{"model_type": "bert"}'):
        (tmp_path / "empty" / "config.json").write_text(wrong)
        with pytest.raises(ZipperError, match="from the folder"):
            Tower.load(tmp_path / "empty")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_tower("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ZipperError, match="from the folder"):
        Tower.load(tmp_path)
    path.write_bytes(whole)
    # Copies: older safetensors map the file that is then written over.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ZipperError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight \(1 in all\)"
    ):
        Tower.load(tmp_path)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ZipperError, match="from the folder"):
        Tower.load(tmp_path)


def test_loading_takes_a_dtype(tmp_path: Path) -> None:
    model = tiny_tower("llama")
    model.save_pretrained(tmp_path)
    assert Tower.load(str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert Tower.load(model).model is model
    with pytest.raises(ZipperError, match=r"is torch\.float32, not torch\.bfloat16"):
        Tower.load(model, dtype=torch.bfloat16)
