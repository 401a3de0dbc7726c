"""Inspection: what a model is made of and what its parts do, for `zipper show`, for the rows of
metrics and for people.

It looks and changes nothing; it knows nothing of optimizers, steps or files of a run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.modality import Modality, whole
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.strand import Batch, Strand, visible
from zipper.tasks import Task

__getattr__ = names_of(__name__, ())


def describe(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Towers, junctions, links with their gates, parameters and bytes on disk, as plain data."""
    return {
        **made_of(pipeline),
        "bytes_on_disk": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "folder": str(folder),
    }


def made_of(pipeline: Pipeline) -> dict[str, Any]:
    """`describe` without the folder, for a pipeline in memory."""
    model = pipeline.held
    return {
        "towers": {name: _tower(model, pipeline, name) for name in model.towers},
        "junctions": [dict(junction) for junction in model.config.junctions],
        "links": _links(model) if isinstance(model, Zipper) else {},
        "new_parameters": sum(p.numel() for p in model.new_parameters().values()),
        "trained_parameters": sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.inference_mode()
def attention(
    model: Zipper, strands: Mapping[str, Strand], source: str, target: str
) -> Float[Tensor, "target source"]:
    """How much each token of `target` looks at each token of `source` in the first row of a batch:
    mean over heads and junctions. Rows are 0 where nothing is visible."""
    found = []
    for key, tap in model.taps(strands).items():
        if (key.source, key.target) == (source, target):
            link, device = model.link(*key), tap.target.device
            read, reading = strands[source].to(device), strands[target].to(device)
            mask = visible(reading, read)
            memory = link.read(tap.source.to(device), read.position)
            found.append(link.attention(tap.target, memory, mask, reading.position)[0])
    if not found:
        raise ZipperError(
            f"{target!r} reads {source!r} by no link of these tokens. Give towers that are linked."
        )
    return torch.stack(found).mean(0)


@dataclass(frozen=True)
class Activity:
    """How much one link adds. attention, feedforward: gates after the tanh. share: |added| /
    |state|, the mean over the tokens of the target that see something. seen: how many those were;
    where there were none the share says nothing.
    """

    attention: float
    feedforward: float | None
    share: float
    seen: int


@torch.inference_mode()
def activity(model: Zipper, samples: Iterable[Batch]) -> dict[str, Activity]:
    """What each link adds to the states of its target on these samples, as the model is; nothing is
    changed."""
    links = model.config.links
    total, seen = dict.fromkeys(links, 0.0), dict.fromkeys(links, 0)
    for strands in (batch.strands for batch in samples):
        for key, tap in model.taps(strands).items():
            link, device = model.link(*key), tap.target.device
            read, reading = strands[key.source].to(device), strands[key.target].to(device)
            mask, memory = visible(reading, read), link.read(tap.source.to(device), read.position)
            added = link(tap.target, memory, mask, reading.position)
            size = tap.target.float().norm(dim=-1).clamp(min=1e-30)
            share = (added.float().norm(dim=-1) / size)[mask.any(-1)]
            total[key], seen[key] = total[key] + float(share.sum()), seen[key] + share.numel()
    found = {}
    for key in links:
        link = model.link(*key)
        ffw = None if link.feedforward is None else float(link.feedforward_gate.float().tanh())
        share = total[key] / max(1, seen[key])
        found[str(key)] = Activity(float(link.gate.float().tanh()), ffw, share, seen[key])
    return found


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, by part: "tower NAME", "adapter NAME", "input NAME", "chooser
    NAME", "links SOURCE>TARGET", "gates"."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind, owner, _ = name.split(".", 2)
        if kind == "towers":
            part = f"{'adapter' if '.lora_' in name else 'tower'} {owner}"
        elif kind == "links":
            part = "gates" if name.endswith("gate") else f"links {owner.partition(':')[2]}"
        else:
            part = f"{'chooser' if kind == 'choosers' else 'input'} {owner}"
        if parameter.requires_grad:
            found.setdefault(part, []).append(parameter)
    return found


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each of `parts`, as it is now; 0 where a part has none. Their squares
    add up to the whole's."""
    from torch.distributed.tensor import DTensor  # half a second

    found = {}
    for part, parameters in parts(model).items():
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Sharded over processes.
        found[part] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return found


def samples(
    pipeline: Pipeline, tasks: Sequence[Task], rows: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Any]:
    """What a model, in eval mode, makes of encoded rows: {"TASK/ROW/given TOWER", ".../wanted
    TOWER", ".../made TOWER": raw data}. Greedy, so it repeats. Raises ZipperError for rows that
    lack what a task wants.
    """
    found: dict[str, Any] = {}
    for task in tasks:
        produced = pipeline.run_batch([task.prompt(row) for row in rows], task.outputs)
        for n, row in enumerate(rows):
            true = [
                replace(s, content=pipeline.modalities[s.tower].decode(list(s.content)))
                for s in task.segments(row)
            ]
            split = len(task.prompt(row))
            for what, segments in (
                ("given", true[:split]),
                ("wanted", true[split:]),
                ("made", produced[n]),
            ):
                found |= {
                    f"{task}/{n}/{what} {segment.tower}": segment.content for segment in segments
                }
    return found


def log_samples(
    trackers: Iterable[Any],
    found: Mapping[str, Any],
    step: int,
    modalities: Mapping[str, Modality],
) -> None:
    """Give `samples` to trackers of accelerate: what can be told in a line to every one of them,
    the rest to TensorBoard, as people look at it (`Kind.track`)."""
    kinds = {name: whole(modalities[name.rpartition(" ")[2]]) for name in found}
    lines = {f"sample/{name}": kinds[name].told(raw) for name, raw in found.items()}
    told = {name: line for name, line in lines.items() if isinstance(line, str)}
    for tracker in trackers:
        tracker.log(told, step=step)
        if tracker.name == "tensorboard":
            for name, raw in found.items():
                kinds[name].track(tracker.writer, f"sample/{name}", raw, step)


def text(found: dict[str, Any]) -> str:
    """`describe` as text."""
    lines = [
        f"{found['folder']}: {found['parameters']:,} parameters, "
        f"{found['bytes_on_disk'] / 1e6:.1f} MB on disk",
        "",
        "towers",
    ]
    for name, tower in found["towers"].items():
        state = "trained" if tower["trained"] else "frozen"
        lines.append(
            f"  {name:10} {tower['family']}, {tower['blocks']} blocks of width {tower['width']}, "
            f"{tower['vocabulary']} ids, {tower['parameters']:,} parameters, {state}, input "
            f"projection {tower['input_projection']}, hash {tower['digest'][:12]}"
        )
        if tower["about"]:
            said = ", ".join(f"{key} {value}" for key, value in tower["about"].items())
            lines.append(f"  {'':10} {tower['kind']}: {said}")
    lines += ["", f"junctions ({found['new_parameters']:,} new parameters)"]
    for n, junction in enumerate(found["junctions"]):
        after = ", ".join(f"{name} after block {layer}" for name, layer in junction.items())
        lines.append(f"  {n}: {after}")
        for name, link in found["links"].items():
            if name.startswith(f"{n}:"):
                source = name.partition(":")[2].partition(">")[0]
                lines.append(_link(name, link, junction.get(source)))
    return "\n".join(lines)


def _link(name: str, link: Mapping[str, Any], fused: int | None) -> str:
    """A line about a link: what it is shown of its source, if that is not fused there, and its
    gates."""
    source, _, target = name.partition(":")[2].partition(">")
    depth = f" after block {link['shown']}" if link["shown"] else "'s embeddings"
    depth = "" if link["shown"] == fused else depth
    pair = f"{source}{depth} -> {target}"
    feedforward = link["feedforward"]
    second = "" if feedforward is None else f", feed-forward {feedforward:+.3f}"
    return f"     {pair:24} gates: attention {link['attention']:+.3f}{second}"


def _links(model: Zipper) -> dict[str, dict[str, Any]]:
    """By name: behind how many blocks a link is shown its source and fused into its target, and its
    gates."""
    found = {}
    for key in model.config.links:
        link = model.link(*key)
        found[str(key)] = {
            "shown": model.config.shown(key),
            "fused": model.config.fused(key),
            "attention": _gate(link.gate),
            "feedforward": _gate(link.feedforward_gate) if link.feedforward else None,
        }
    return found


def _tower(model: Any, pipeline: Pipeline, name: str) -> dict[str, Any]:
    tower, modality = model.config.towers[name], pipeline.modalities[name]
    held: Any = model.towers[name]
    return {
        "family": held.family,
        "blocks": tower.layers,
        "width": tower.width,
        "vocabulary": tower.vocabulary,
        "parameters": sum(p.numel() for p in held.parameters()),
        "trained": tower.train,
        "input_projection": tower.input_projection,
        "source": tower.source,
        "digest": tower.digest,
        "modality": type(modality).__name__,
        "kind": modality.name,
        "about": dict(whole(modality).about()),
        "voices": list(whole(modality).prefixes),
    }


def _gate(gate: Any) -> float:
    return round(float(gate.detach().float().tanh()), 4)
