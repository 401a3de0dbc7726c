"""Which classes of transformers are causal LMs: its mapping, and what that leaves out.

Nothing here knows what a tower does with one.
"""

from functools import cache
from typing import Any

#: Decoders whose class transformers' causal-LM mapping does not name, by model type. ImageGPT is
#: called a causal image model there (Chen et al. 2020), and is one of colours.
BESIDE = {"imagegpt": "ImageGPTForCausalImageModeling"}


@cache
def classes() -> dict[str, str]:
    """{model type: name of its class} of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **BESIDE}


@cache
def auto() -> Any:
    """transformers' AutoModelForCausalLM, which knows the decoders of BESIDE from then on."""
    import transformers  # seconds

    loader = transformers.AutoModelForCausalLM
    for name in BESIDE.values():
        if kind := getattr(transformers, name, None):  # a release may rename it
            loader.register(kind.config_class, kind, exist_ok=True)
    return loader
