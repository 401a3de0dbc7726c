"""Inspection: what a saved model is made of, for `zipper show` and for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zipper.baseline import Baseline
from zipper.link import Link
from zipper.modality.speech import SpeechUnits
from zipper.model import Zipper, visible
from zipper.pipeline import Pipeline
from zipper.tower import Strand


def describe(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Towers, junctions, links with their gates, parameters and bytes on disk, as plain data."""
    model = pipeline.model
    return {
        "towers": {name: _tower(model, pipeline, name) for name in model.towers},
        "junctions": [dict(junction) for junction in model.config.junctions],
        "links": {
            name: {"attention": _gate(link.gate), "feedforward": _gate(link.feedforward_gate) if link.feedforward else None}
            for name, link in model.links.items()
        },
        "new_parameters": sum(p.numel() for p in model.new_parameters().values()),
        "trained_parameters": sum(p.numel() for name, p in model.named_parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_on_disk": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "folder": str(folder),
    }


@torch.inference_mode()
def attention(model: Zipper, strands: Mapping[str, Strand], source: str, target: str) -> Float[Tensor, "target source"]:
    """How much each token of `target` looks at each token of `source` in the first row of a batch: mean over heads and junctions.
    Rows are 0 where nothing is visible."""
    read, reading = strands[source], strands[target]
    mask = visible(reading, read)
    found = []
    for n, hidden in enumerate(model.taps(strands)):
        name = f"{n}:{source}>{target}"
        if name in model.links:
            link = model.links[name]
            assert isinstance(link, Link)
            found.append(link.attention(hidden[target], link.read(hidden[source], read.position), mask, reading.position)[0])
    return torch.stack(found).mean(0)


def table(found: dict[str, Any]) -> str:
    """`describe` as text."""
    lines = [f"{found['folder']}: {found['parameters']:,} parameters, {found['bytes_on_disk'] / 1e6:.1f} MB on disk", "", "towers"]
    for name, tower in found["towers"].items():
        state = "trained" if tower["trained"] else "frozen"
        lines.append(
            f"  {name:10} {tower['family']}, {tower['blocks']} blocks of width {tower['width']}, {tower['vocabulary']} ids, "
            f"{tower['parameters']:,} parameters, {state}, input projection {tower['input_projection']}, "
            f"hash {tower['digest'][:12]}"
        )
        if tower["voices"]:
            lines.append(f"  {'':10} voices: {', '.join(tower['voices'])}")
    lines += ["", f"junctions ({found['new_parameters']:,} new parameters)"]
    for n, junction in enumerate(found["junctions"]):
        after = ", ".join(f"{name} after block {layer}" for name, layer in junction.items())
        lines.append(f"  {n}: {after}")
        for link, gate in found["links"].items():
            if link.startswith(f"{n}:"):
                ffw = "" if gate["feedforward"] is None else f", feed-forward {gate['feedforward']:+.3f}"
                lines.append(
                    f"     {link.partition(':')[2].replace('>', ' -> '):24} gates: attention {gate['attention']:+.3f}{ffw}"
                )
    return "\n".join(lines)


def _tower(model: Zipper | Baseline, pipeline: Pipeline, name: str) -> dict[str, Any]:
    tower, modality = model.config.towers[name], pipeline.modalities[name]
    return {
        "family": model.tower(name).config.model_type,
        "blocks": tower.layers,
        "width": tower.width,
        "vocabulary": tower.vocabulary,
        "parameters": sum(p.numel() for p in model.tower(name).parameters()),
        "trained": tower.train,
        "input_projection": tower.input_projection,
        "source": tower.source,
        "digest": tower.digest,
        "modality": type(modality).__name__,
        "voices": list(modality.config.voices) if isinstance(modality, SpeechUnits) else [],
    }


def _gate(gate: Any) -> float:
    return round(float(gate.detach().float().tanh()), 4)
