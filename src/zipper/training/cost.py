"""Plan: what a step of training costs in floating-point operations, memory and time, before it is
taken.

It reads shapes, what trains and how many tokens batches hold; of the model it runs nothing. The one
thing that it measures is how fast this machine multiplies matrices. It knows nothing of recipes,
optimizers' settings or files.

The formulas. A matrix of p numbers costs 2p per token forwards, 2p more backwards if it trains, and
2p more if its input has a
gradient: 6, 4 or 2 in all, as it trains, is frozen above something that trains, or sees nothing
that trains. Attention of width h costs 4h per pair of a token and one that it reads, and twice that
backwards. Norms, activations, softmax, embeddings, padding, the optimizer and what is computed
twice to save memory are left out, as is usual for a model's FLOPs (PaLM, arXiv:2204.02311, app. B);
experts count as if all were used, sliding windows as if they were wide.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zipper import loss, pages
from zipper.config import LinkKey, Stop
from zipper.errors import ZipperError
from zipper.inspection import parts
from zipper.link import Link
from zipper.model import Zipper
from zipper.strand import Batch, collate, visible
from zipper.tasks import Task
from zipper.tower import Tower

Row = Mapping[str, Sequence[int]]
#: A zip, or one decoder that is every one of its towers.
Model = Any

#: Rows whose lengths are looked at.
SAMPLE = 1000
#: Share of the matmul rate that whole steps reach. Not measured: reckoned from throughputs and
#: rates of different sessions, about a half at 30M parameters on two cores, a quarter at 3M. A run
#: records its own (`matmul_share`).
EFFICIENCY = 0.5
#: Numbers that autograd keeps of a block per token, as a multiple of the widths in and out of its
#: matrices, where they train and where they are frozen: then what they read need not be kept.
#: Measured on blocks of Llama and GPT-2 (tests/test_plan.py).
KEPT_TRAINED, KEPT_FROZEN = 1.2, 0.75


@dataclass
class Load:
    """What batches hold, padding left out. By tower: tokens, targets (tokens with a loss), own
    (pairs of a token and one of its tower that it reads, itself included). seen: by (source,
    target) the pairs of a token of `target` and one of `source` that it sees.
    """

    samples: float = 0.0
    tokens: dict[str, float] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "Load":
        """What these batches hold; rows may be packed."""
        found = cls()

        def add(counts: dict[Any, float], key: Any, number: Tensor) -> None:
            counts[key] = counts.get(key, 0.0) + float(number)

        for batch in batches:
            last = torch.stack([strand.document.max(1).values for strand in batch.strands.values()])
            found.samples += float((last.max(0).values + 1).sum())
            for name, strand in batch.strands.items():
                valid = strand.document >= 0
                add(found.tokens, name, valid.sum())
                add(found.targets, name, (batch.weights[name] > 0).sum())
                add(found.own, name, (strand.position + 1)[valid].sum())
                for source, other in batch.strands.items():
                    if source != name:
                        add(found.seen, (source, name), visible(strand, other).sum())
        return found

    def as_one(self) -> "Load":
        """The same tokens as one stream, in which every token reads all before it."""
        (name, *_) = self.tokens
        pairs = sum(self.own.values()) + sum(self.seen.values())
        tokens, targets = sum(self.tokens.values()), sum(self.targets.values())
        return Load(self.samples, {name: tokens}, {name: targets}, {name: pairs})

    def __mul__(self, times: float) -> "Load":
        """The load of so many times these batches."""
        tokens, targets, own = (
            {key: n * times for key, n in x.items()} for x in (self.tokens, self.targets, self.own)
        )
        return Load(
            self.samples * times,
            tokens,
            targets,
            own,
            {pair: n * times for pair, n in self.seen.items()},
        )


class Work(NamedTuple):
    """Floating-point operations."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass
class Cost:
    """work: operations by part ("text blocks", "text attention", "text head", "text input",
    "text>speech links", "text>speech attention"). blocks: by tower (blocks that run, those of them
    that build a graph). kept: numbers that autograd keeps for the backward pass, without those of
    the logits. again: the most that one block keeps while it is run again in the backward pass.
    logits: numbers in the logits that live at once.
    """

    work: dict[str, Work] = field(default_factory=dict)
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: float = 0.0
    again: float = 0.0
    logits: float = 0.0

    @property
    def flops(self) -> float:
        """All operations, forward and backward."""
        return sum(work.both for work in self.work.values())

    def add(self, part: str, forward: float, backward: float) -> None:
        """Count more work for a part."""
        before = self.work.get(part, Work(0.0, 0.0))
        self.work[part] = Work(before.forward + forward, before.backward + backward)

    def products(
        self, part: str, module: nn.Module, tokens: float, graph: bool, wanted: bool = True
    ) -> bool:
        """Count the matrices of a module, in order, for so many tokens. graph: whether its input
        has a gradient. wanted: whether a loss depends on it. Returns whether its output has a
        gradient.
        """
        for weight in module.parameters():
            if weight.ndim > 1:
                size = weight.numel() * tokens
                self.add(part, 2 * size, 2 * size * (weight.requires_grad + graph) * wanted)
                if wanted and (graph or weight.requires_grad):
                    self.kept += (
                        sum(weight.shape)
                        * tokens
                        * (KEPT_TRAINED if weight.requires_grad else KEPT_FROZEN)
                    )
            graph = graph or weight.requires_grad
        return graph

    def attention(self, part: str, width: int, pairs: float, graph: bool) -> None:
        """Count scores and weighted sums of heads that are so wide together."""
        self.add(f"{part} attention", 4 * width * pairs, 8 * width * pairs * graph)

    def link(
        self,
        part: str,
        link: Link,
        tokens: tuple[float, float],
        pairs: float,
        graph: tuple[bool, bool],
        wanted: bool,
    ) -> bool:
        """Count a link. tokens, graph: of its source and its target. Returns whether what it adds
        has a gradient."""
        read, asked = graph[0] or _trains(link.source_norm), graph[1] or _trains(link.norm)
        for piece in filter(None, (link.whiten, link.projection)):
            read = self.products(f"{part} links", piece, tokens[0], read, wanted)
        keys = [
            self.products(f"{part} links", piece, tokens[0], read, wanted)
            for piece in (link.key, link.value)
        ]
        asked = self.products(f"{part} links", link.query, tokens[1], asked, wanted)
        added = asked or any(keys)
        self.attention(part, link.query.out_features, pairs, added and wanted)
        for piece in filter(None, (link.out, link.feedforward)):
            added = self.products(f"{part} links", piece, tokens[1], added, wanted)
        return added


def cost(model: Model, load: Load, recompute: bool = False) -> Cost:
    """What one forward and backward of training on a load costs: every tower runs as far as
    `hidden` runs it, logits only where there is a loss. recompute: blocks keep what they were
    given, and nothing else, until they are run again. It goes through the lock-step loop as the
    model does, with numbers of tokens in place of states.
    """
    if not isinstance(model, Zipper):  # one stream: every token reads all before it
        load = load.as_one()
    found = Cost()
    towers = {name: _tower(model, name) for name in load.tokens}
    fused = isinstance(model, Zipper) and len(towers) > 1
    halts = model.config.route.halts if fused else ()
    graph = {name: _trains(tower.model.get_input_embeddings()) for name, tower in towers.items()}
    needed = _needed(load, towers, halts)
    done = dict.fromkeys(towers, 0)

    def run(name: str, until: int) -> None:
        for block in range(done[name], until):
            wanted, before = block < needed[name], found.kept
            graph[name] = found.products(
                f"{name} blocks", towers[name].blocks[block], load.tokens[name], graph[name], wanted
            )
            found.attention(
                name, _heads_width(towers[name]), load.own[name], graph[name] and wanted
            )
            if recompute and found.kept > before:
                found.again = max(found.again, found.kept - before)
                found.kept = before + load.tokens[name] * towers[name].width
            ran, built = found.blocks.get(name, (0, 0))
            found.blocks[name] = (ran + 1, built + (graph[name] and wanted))
        done[name] = until

    for name in towers:
        entrances = model.config.inputs[name] if fused else {}
        for part in (part for part, company in entrances.items() if {*company} & {*towers}):
            graph[name] = found.products(
                f"{name} input",
                model.inputs[part],
                load.tokens[name],
                graph[name],
                needed[name] >= 0,
            )
    shown: dict[LinkKey, bool] = {}
    ends = {}
    for name, tower in towers.items():
        speaks = bool(load.targets.get(name))
        silent = model.config.route.last_shown(name, towers) if fused else -1
        ends[name] = tower.layers if speaks else silent
    for halt in halts:
        stops = [stop for stop in halt if stop.tower in towers and stop.layer <= ends[stop.tower]]
        for stop in stops:
            run(stop.tower, stop.layer)
            shown.update(dict.fromkeys(stop.shows, graph[stop.tower]))
        after = dict(graph)
        for stop in stops:
            for key in stop.reads if stop.layer < ends[stop.tower] else ():
                source, target, pairs = key.source, key.target, load.seen.get(key[1:])
                if pairs:
                    part, wanted = f"{source}>{target}", stop.layer < needed[target]
                    tokens = load.tokens[source], load.tokens[target]
                    graphs = shown[key], graph[target]
                    added = found.link(part, model.link(*key), tokens, pairs, graphs, wanted)
                    after[target] = after[target] or added
        graph |= after
    for name, targets in load.targets.items():
        if targets:
            run(name, towers[name].layers)
            weight = towers[name].model.get_output_embeddings().weight
            size = weight.numel() * targets
            found.add(f"{name} head", 2 * size, 2 * size * (weight.requires_grad + graph[name]))
            found.logits += min(len(weight) * targets, loss.MOST)
    return found


def _needed(
    load: Load, towers: Mapping[str, Tower], halts: Sequence[Sequence[Stop]]
) -> dict[str, int]:
    """How many blocks of each tower a loss depends on: all where it has targets, else those before
    it is last read; -1 where it is read by nobody."""
    found = {name: tower.layers if load.targets.get(name) else -1 for name, tower in towers.items()}
    for stop in chain(*halts):
        if stop.tower in towers and any(load.seen.get(key[1:]) for key in stop.shows):
            found[stop.tower] = max(found[stop.tower], stop.layer)
    return found


def memory(model: Model, cost: Cost, mixed_precision: str = "no") -> dict[str, float]:
    """Bytes of a training step in one process: weights as they are, gradients and AdamW's two
    moments of what trains, what autograd keeps (`Cost.kept` and `again`, 4 bytes a number, 2 in
    bf16), logits in float32 twice, for the softmax and its gradient; in bf16 also the copies that
    autocast makes of weights. Not in it: what lives only inside an operation, the allocator's
    waste.
    """
    half = mixed_precision == "bf16"
    held = [*model.parameters(), *model.buffers()]
    trained = [*chain(*parts(model).values())]
    found = {
        "weights": float(sum(t.numel() * t.element_size() for t in held)),
        "copies": float(
            sum(
                2 * p.numel()
                for p in model.parameters()
                if half and p.ndim > 1 and p.element_size() > 2
            )
        ),
        "gradients": float(sum(p.numel() * p.element_size() for p in trained)),
        # Of AdamW, and a counter of steps for each.
        "optimizer": float(sum(2 * p.numel() * p.element_size() + 4 for p in trained)),
        "activations": (cost.kept + cost.again) * (2 if half else 4),
        "logits": cost.logits * 8,
    }
    return found | {"total": sum(found.values())}


def matmul_rate(
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.2,
) -> float:
    """Operations per second of (rows x width) @ (width x columns) on this machine: the best of
    rounds, for others may be using it too. Takes about `seconds`, also where that many rows would
    take longer: then fewer are multiplied.
    """
    device_type = torch.device(device).type
    noise = torch.Generator(device).manual_seed(0)  # a run's own draws stay as they are
    right = torch.randn(width, columns, device=device, generator=noise).to(dtype)

    def timed(left: Tensor) -> float:
        start = time.perf_counter()
        left @ right
        if device_type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        some = min(rows, 16)
        left = torch.randn(some, width, device=device, generator=noise).to(dtype)
        timed(left)  # the first one also sets up threads and libraries
        while some < rows and timed(left) < seconds / 20:
            some = min(rows, 2 * some)
            left = torch.randn(some, width, device=device, generator=noise).to(dtype)
        rounds, until = [timed(left)], time.perf_counter() + seconds
        while len(rounds) < 3 or time.perf_counter() < until:
            rounds.append(timed(left))
    return 2.0 * some * width * columns / min(rounds)


@cache
def machine_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    """`matmul_rate`, measured once a process."""
    return matmul_rate(*shape, dtype, device)


def largest_product(model: Model, load: Load) -> tuple[int, int, int]:
    """Rows, width and columns of the product that most of a step is: the largest matrix of a block
    of the tower whose tokens meet most numbers."""

    def numbers(name: str) -> float:
        return load.tokens[name] * sum(p.numel() for p in _tower(model, name).blocks.parameters())

    name = max(load.tokens, key=numbers)
    matrices = [p.shape for p in _tower(model, name).blocks[0].parameters() if p.ndim == 2]
    width, columns = max(matrices, key=math.prod)
    return max(1, round(load.tokens[name])), width, columns


def plan(
    model: Model,
    rows: Sequence[Row],
    tasks: Mapping[str, float],
    batch: int,
    steps: int,
    mixed_precision: str = "no",
    accumulate: int = 1,
    recompute: bool = False,
    device: str = "cpu",
    efficiency: float = EFFICIENCY,
) -> dict[str, Any]:
    """What a run will cost, as plain data: see `text`.

    rows: encoded samples; the first SAMPLE are looked at. tasks: {"speech -> text": share}. batch:
    samples per step over all processes; memory is that of one process that does them all, in
    `accumulate` parts. The estimate of time leaves out evaluations and saves.
    """
    if not rows:
        raise ZipperError("There are no rows to plan with. Give a manifest that has some.")
    at_once = -(-batch // accumulate)
    shares = {name: share / sum(tasks.values()) for name, share in tasks.items()}
    loads, costs, longest = {}, {}, {}
    for name in tasks:
        task = Task.parse(name)
        some = [row for row in rows if task.fits(row)] or rows
        loads[name], last = _loads(model, task, some[:SAMPLE], batch, at_once)
        costs[name], longest[name] = cost(model, loads[name]), cost(model, last, recompute)
    worst = max(longest.values(), key=lambda c: c.kept + c.logits)
    step = _mean(costs, shares)
    shape = largest_product(model, max(loads.values(), key=lambda x: sum(x.tokens.values())))
    rate = machine_rate(
        shape, torch.bfloat16 if mixed_precision == "bf16" else torch.float32, device
    )
    seconds = step.both / (rate * efficiency)
    return {
        **_described(model),
        "tasks": {name: _of_task(shares[name], loads[name], costs[name]) for name in tasks},
        "step": {
            "samples": batch,
            "tokens": sum(shares[name] * sum(x.tokens.values()) for name, x in loads.items()),
            "forward": step.forward,
            "backward": step.backward,
            "flops": step.both,
        },
        "memory": memory(model, worst, mixed_precision),
        "time": {
            "matmul_shape": list(shape),
            "matmul_rate": rate,
            "efficiency": efficiency,
            "seconds_per_step": seconds,
            "steps": steps,
            "seconds": seconds * steps,
        },
    }


def _loads(
    model: Model, task: Task, rows: Sequence[Row], batch: int, at_once: int
) -> tuple[Load, Load]:
    """What a step holds where all of it is this task: `batch` samples like the rows, and as many as
    one process has at once, like the longest of them."""
    samples = sorted(map(task.segments, rows), key=lambda s: sum(len(x.content) for x in s))
    whole = Load.of(collate(samples[i : i + 16], model.ends()) for i in range(0, len(samples), 16))
    last = Load.of([collate(samples[-at_once:], model.ends())])
    return whole * (batch / whole.samples), last * (at_once / last.samples)


def _mean(costs: Mapping[str, Cost], shares: Mapping[str, float]) -> Work:
    """The work of a step of a mixture of tasks."""
    work = []
    for name, found in costs.items():
        work += [(shares[name] * w.forward, shares[name] * w.backward) for w in found.work.values()]
    return Work(sum(forward for forward, _ in work), sum(backward for _, backward in work))


def _described(model: Model) -> dict[str, Any]:
    """The part of `plan` that no row changes."""
    trained = {part: sum(p.numel() for p in some) for part, some in parts(model).items()}
    return {
        "towers": {
            name: {
                "family": model.tower(name).config.model_type,
                "blocks": tower.layers,
                "width": tower.width,
                "parameters": sum(p.numel() for p in model.tower(name).parameters()),
                "trained": tower.learns,
            }
            for name, tower in model.config.towers.items()
        },
        "junctions": [dict(junction) for junction in model.config.junctions],
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "new": sum(p.numel() for p in model.new_parameters().values()),
            "trained": sum(trained.values()),
            "by_part": trained,
        },
    }


def _of_task(share: float, load: Load, cost: Cost) -> dict[str, Any]:
    """The part of `plan` that is one task's."""
    return {
        "share": share,
        "tokens": load.tokens,
        "targets": load.targets,
        "blocks": {
            tower: {"run": run, "graph": graph} for tower, (run, graph) in cost.blocks.items()
        },
        "forward": sum(w.forward for w in cost.work.values()),
        "backward": sum(w.backward for w in cost.work.values()),
        "work": {part: work._asdict() for part, work in cost.work.items()},
    }


def text(found: Mapping[str, Any]) -> str:
    """`plan` as text."""
    sizes, step, pace = found["parameters"], found["step"], found["time"]
    lines = ["towers"]
    for name, tower in found["towers"].items():
        state = "trained" if tower["trained"] else "frozen"
        lines.append(
            f"  {name:10} {tower['family']}, {tower['blocks']} blocks of width {tower['width']}, "
            f"{tower['parameters']:,} parameters, {state}"
        )
    if found["junctions"]:
        blocks = ", ".join("/".join(map(str, junction.values())) for junction in found["junctions"])
        lines.append(f"junctions    after blocks {blocks} of {'/'.join(found['junctions'][0])}")
    lines += [
        "",
        f"parameters   {sizes['total']:,}, {sizes['new']:,} of them new, {sizes['trained']:,} "
        "trained:",
    ]
    lines += [f"  {part:24} {count:>15,}" for part, count in sizes["by_part"].items()]
    for name, task in found["tasks"].items():
        tokens = ", ".join(f"{count:,.0f} {tower}" for tower, count in task["tokens"].items())
        lines += [
            "",
            f"{name} ({task['share']:.0%} of samples): if all of a step is this, {tokens} tokens",
        ]
        for tower, blocks in task["blocks"].items():
            graph = "no graph" if not blocks["graph"] else f"a graph in {blocks['graph']}"
            lines.append(f"  {tower:10} {blocks['run']} blocks run, {graph}")
        lines.append(f"  {'GFLOP a step':24} {'forward':>12} {'backward':>12}")
        for part, work in [*task["work"].items(), ("all", task)]:
            lines.append(
                f"  {part:24} {work['forward'] / 1e9:12,.2f} {work['backward'] / 1e9:12,.2f}"
            )
    held = ", ".join(
        f"{part} {_bytes(size)}"
        for part, size in found["memory"].items()
        if part != "total" and size
    )
    lines += [
        "",
        f"a step       {step['samples']} samples, {step['tokens']:,.0f} tokens, "
        f"{step['flops'] / 1e9:,.1f} GFLOP",
        f"memory       {_bytes(found['memory']['total'])} in one process with the longest rows: "
        f"{held}",
        f"time         {pace['seconds_per_step']:.3g} s a step, "
        f"{pages.duration(pace['seconds'])} for {pace['steps']:,} steps, without evaluations:",
        f"             {pace['efficiency']:.0%} of the {pace['matmul_rate'] / 1e9:,.1f} GFLOP/s "
        f"that products of {' x '.join(map(str, pace['matmul_shape']))} reach here",
    ]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _tower(model: Model, name: str) -> Tower:
    tower = model.towers[name]
    assert isinstance(tower, Tower)
    return tower


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _heads_width(tower: Tower) -> int:
    """Width of all heads of a block together; some models have wider heads than their states
    say."""
    head = getattr(tower.config, "head_dim", None)
    return head * tower.config.num_attention_heads if head else tower.width
