"""Which decoders can be towers: every name of transformers' causal-LM mapping and what it leaves
out, each tried on a tiny random model of it.

This file knows how to make any configuration small: by the names of its settings, and for some
families by settings of their own. What a tower can do it asks the tower, and then compares logits
by itself.
"""

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from zipper.errors import ZipperError
from zipper.strand import Strand
from zipper.tower import Tower
from zipper.towers.mapping import classes
from zipper.towers.proof import Rows

LAYERS = 4
VOCABULARY = 97
PADDING = 2  # its id, where a family needs one; ids below it begin and end
# Small values of settings, whatever the family. Scales are off 1, so that none can be forgotten
# unseen.
SMALL: dict[str, Any] = {}
for _value, _names in (
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_encoder_layers num_blocks",
    ),
    (LAYERS, "num_decoder_layers"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads",
    ),
    (
        4,
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "mamba_n_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads "
        "linear_num_key_heads linear_num_value_heads",
    ),
    (2, "linear_num_heads index_n_heads indexer_n_heads indexer_kv_heads n_mamba_heads"),
    (
        32,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size embed_dim "
        "input_embedding_size lru_width",
    ),
    (
        32,
        "output_embedding_size word_embed_proj_dim attention_hidden_size dim_model "
        "moe_intermediate_size",
    ),
    (
        32,
        "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "dense_intermediate_size",
    ),
    (
        32,
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size hidden_size_global",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff n_inner d_inner "
        "feed_forward_size",
    ),
    (64, "intermediate_size_mlp ffn_hidden_size mamba_d_ssm"),
    (
        8,
        "head_dim v_head_dim d_head dim_head swa_head_dim swa_v_head_dim attention_head_size "
        "index_head_dim kv_channels",
    ),
    (
        8,
        "linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim "
        "qk_nope_head_dim qk_rope_head_dim",
    ),
    (
        8,
        "indexer_head_dim mamba_head_dim mamba_num_heads mamba_d_state state_size "
        "ssm_state_size hidden_size_per_layer_input",
    ),
    (
        8,
        "sliding_window sliding_window_size attention_chunk_size window_size local_attention "
        "attention_window_size",
    ),
    (8, "chunk_size mamba_chunk_size pronunciation_embed_dim shape_embed_dim"),
    (
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num "
        "rotary_dim indexer_compress_ratio",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k time_step_rank "
        "mamba_dt_rank attn_layer_period",
    ),
    (
        1,
        "n_group num_expert_group topk_group n_shared_experts num_shared_experts "
        "first_k_dense_replace num_dense_layers",
    ),
    (1, "attn_layer_offset n_groups eos_token_id"),
    (
        16,
        "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank gated_norm_rank laurel_rank mamba_d_head",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
        "context_length max_target_positions",
    ),
    (256, "original_max_position_embeddings index_topk indexer_budget"),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    ),
    (VOCABULARY, "pronunciation_vocab_size shape_vocab_size"),
    (0, "bos_token_id"),
    (PADDING, "pad_token_id"),
    (3.0, "embedding_multiplier"),
    (5.0, "logits_scaling"),
    (0.5, "residual_multiplier"),
    (0.3, "logit_scale"),
    (0.7, "lm_head_multiplier"),
):
    SMALL |= dict.fromkeys(_names.split(), _value)
# Settings whose default may be None though a number is needed, or None means another number.
NEEDED = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_group",
    "topk_group",
    "n_shared_experts",
)
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # per block
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_CONVOLVED = {"layer_types": ["conv", "full_attention"] * 2}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 256,
    "indexer_compress_ratio": 4,
}
_TWO_HEADED = {"attention_head_dim": 16, "attention_hidden_size": 64}
# What only this family needs to be built, or to be built as it really is.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": _CONVOLVED,
    "lfm2_moe": _CONVOLVED,
    "mamba2": {"head_dim": 16},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _TWO_HEADED,
    "zamba2": _TWO_HEADED,
    "zaya": {"num_experts_per_tok": 1},
}


@final
@dataclass(frozen=True)
class Family:
    """What was found of one name of the mapping.

    way: by attributes, by a recorded dry pass, or refused for this reason. rows: the most that it
    reads (`Tower.rows`).
    difference: the largest |difference| from the model's own logits, without padding and with
    padding on the left.
    """

    name: str
    model: str
    way: Literal["attributes", "recorded", "refused"]
    rows: Rows | None = None
    difference: float | None = None
    reason: str = ""


def names() -> list[str]:
    """The decoders of the installed transformers, by model type (`mapping.classes`)."""
    return sorted(classes())


def survey(chosen: Iterable[str] | None = None) -> list[Family]:
    """Every one of these names tried; all names without an argument. Raises ZipperError for a name
    not in the mapping."""
    return [tried(name) for name in (names() if chosen is None else chosen)]


def tried(name: str) -> Family:
    """One family: built small, taken as a tower, checked, and compared with its own logits once
    more."""
    if name not in classes():
        raise ZipperError(
            f"{name!r} is no causal language model of transformers {transformers.__version__}. "
            "See: zipper towers"
        )
    kind = classes()[name]
    try:
        model = tiny(name)
    # transformers, its validators and what is not installed: whatever it is, it is said.
    except Exception as error:
        return Family(
            name, kind, "refused", reason=f"No tiny model of it can be built: {_line(error)}"
        )
    try:
        tower = Tower(model)
        tower.check()
    except ZipperError as error:
        return Family(name, kind, "refused", reason=_line(error))
    return Family(
        name, kind, "recorded" if tower.recorded else "attributes", tower.rows, difference(tower)
    )


def tiny(
    name: str, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """A tiny random model of a name of the mapping; attention None takes the kernel that
    transformers would take."""
    cls = getattr(transformers, classes()[name])
    config = cls.config_class(**_small(cls.config_class()) | SPECIAL.get(name, {}))
    return drawn(lambda: cls._from_config(config, dtype=dtype, attn_implementation=attention), seed)


def drawn(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A random model in eval mode, every parameter moved off its initial value: no norm is the
    identity and no bias 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def difference(tower: Tower) -> float:
    """The largest |difference| from the model's own logits on ids drawn afresh."""
    ids = torch.randint(
        PADDING + 1, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(1)
    )
    found = (tower(Strand.alone(ids)) - _own(tower, ids)).abs().max()
    valid = torch.ones_like(ids)
    valid[0, :5], ids[0, :5] = 0, PADDING
    document = valid - 1
    ranked, slots = Strand.alone(ids, document), torch.arange(21).expand_as(ids)
    # Models count by the positions they are given, by their padding id, or by slots: one of these
    # is what the tower did.
    counted = {"position_ids": ranked.position}
    ways: list[tuple[Strand, dict[str, Tensor]]] = [
        (ranked, counted),
        (ranked, {}),
        (Strand(ids, slots, slots, document), {}),
    ]
    padded = []
    for strand, given in ways:
        try:
            padded.append(
                (tower(strand) - _own(tower, ids, attention_mask=valid, **given))[valid > 0]
                .abs()
                .max()
            )
        except ZipperError:
            continue
    return float(torch.maximum(found, torch.stack(padded).min()))


def _own(tower: Tower, ids: Tensor, **given: Tensor) -> Tensor:
    model: Any = tower.model
    takes = inspect.signature(model.forward).parameters
    logits: Tensor = model(
        ids,
        **{name: value for name, value in {**given, "use_cache": False}.items() if name in takes},
    ).logits
    return logits


def text(families: Sequence[Family]) -> str:
    """One line per family, for a terminal."""
    lines = [
        f"{f.name:24} {f.way:11} {f.reason or f'reads {f.rows} rows, difference {f.difference}'}"
        for f in families
    ]
    return "\n".join([*lines, counted(families)])


def counted(families: Sequence[Family]) -> str:
    """How many go which way, in one sentence."""
    ways = Counter(family.way for family in families)
    return (
        f"Of {len(families)} names {len(families) - ways['refused']} can be towers, "
        f"{ways['attributes']} by their attributes "
        f"and {ways['recorded']} by a recorded dry pass; {ways['refused']} are refused."
    )


def markdown(families: Sequence[Family]) -> str:
    """docs/towers.md."""
    torch_version = torch.__version__.partition("+")[0]
    return "\n".join(
        [
            "# Towers",
            "",
            f"Made by `make docs` with transformers {transformers.__version__} and torch "
            f"{torch_version}; do not edit.",
            "",
            "Every name of transformers' causal-LM mapping, and ImageGPT, which it leaves out, "
            "tried on a tiny random model:",
            f"`zipper towers`, or `zipper towers NAME`. {counted(families)}",
            "",
            "A tower is accepted where its logits are the model's own in every bit: without "
            "padding, with padding on the left, and",
            "both also read in steps with a cache. Padding on the right is never in the way.",
            "",
            "* `packed`: it reads several documents in a row and padding inside a document, as "
            "each document alone up to rounding.",
            "* `padded`: it reads one document per row, with padding on either side.",
            "* `unpadded`: it counts positions by slots, so a document begins in the first slot.",
            "",
            "What a row of another kind meets is an error, never another number.",
            "",
            "| name | class | way | rows |",
            "|---|---|---|---|",
            *(
                f"| {f.name} | {f.model} | {f.way} | {f.rows} |"
                for f in families
                if f.way != "refused"
            ),
            "",
            "## Refused",
            "",
            "| name | reason |",
            "|---|---|",
            *(
                f"| {f.name} | {f.reason.replace('|', '/')} |"
                for f in families
                if f.way == "refused"
            ),
            "",
        ]
    )


def _line(error: Exception) -> str:
    """The first sentences of a message, on one line."""
    return textwrap.shorten(str(error), 200)


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    """Settings that make a configuration tiny, whatever its family."""
    given: dict[str, Any] = {}
    settings = default.to_dict()
    for name, value in settings.items():
        if name in default.sub_configs:
            inner = getattr(default, name)
            if isinstance(inner, PreTrainedConfig):
                given[name] = _small(inner)
        elif name in KINDS and value:
            kinds = list(dict.fromkeys(value))
            given[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
        elif name == "is_decoder":
            given[name] = True
        elif (
            name == "num_key_value_heads"
            and value is not None
            and value == settings.get("num_attention_heads")
        ):
            given[name] = SMALL["num_attention_heads"]  # some can only have as many
        elif name in SMALL and (
            name in NEEDED or name.endswith("os_token_id") or isinstance(value, (int, float))
        ):
            given[name] = SMALL[name]
    return given
