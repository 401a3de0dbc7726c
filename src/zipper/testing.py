"""What tests and examples stand on: towers so small that a forward takes milliseconds.

Nothing here is trained or downloaded; nothing else in zipper may import this file.
"""

from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zipper.towers.families import drawn

# family -> model type of transformers, and what makes the tiny one take the paths that the large
# ones take.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "opt-350m": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),  # projects in and out, norms after
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 10.0}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_tower(
    family: str,
    seed: int = 0,
    width: int = 32,
    layers: int = 4,
    vocabulary: int = 97,
    window: int = 8,
    positions: int = 256,
    dtype: torch.dtype = torch.float32,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> PreTrainedModel:
    """A random causal LM of one of FAMILIES in eval mode, the same for the same arguments; id 0
    begins, id 1 ends.

    width: of its hidden states, a multiple of 8. window: tokens that sliding-window layers see
    (mistral: all layers,
    gemma3: all but every third). positions: longest row. Every parameter is moved off its initial
    value, so that no norm is the identity and no bias 0.
    """
    model_type, special = _FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if model_type == "gpt2":
        settings |= {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": positions}
    else:
        settings |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
        settings |= {"max_position_embeddings": positions, "intermediate_size": 2 * width}
    if model_type == "opt":
        settings |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width}
    elif model_type not in ("gpt2", "gpt_neox"):
        settings |= {"num_key_value_heads": 2}
    if model_type in ("mistral", "gemma3_text"):
        settings |= {"sliding_window": window}
    if model_type == "gemma3_text":
        kinds = ("sliding_attention", "sliding_attention", "full_attention")
        settings |= {"layer_types": [kinds[layer % 3] for layer in range(layers)]}
    config = AutoConfig.for_model(model_type, **(settings | special))
    return drawn(
        lambda: AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        ),
        seed,
    )
