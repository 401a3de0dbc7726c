"""`zipper bench serve`: a server under load, beside the same model served otherwise and the engine
alone.

Requests are mixed: a recording to text, a text to sound as a stream, any order by `/v1/run`. Arms:
this server; the same pipeline behind FastAPI, one request at a time; stock transformers there, that
is the bare text tower's own `generate` with as many tokens, which is less work than the zip's; and
the engine without a server, which is given the same requests at once. Each server is a process of
its own, clients are in this one and share its processors. The load is closed (so many clients,
each of which asks again when it is answered) for what an arm can do, and open (requests come when
they come, Poisson) for how long they take.
"""

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from zipper.environment import need
from zipper.errors import ZipperError
from zipper.generation import Request
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.serving import app, process, sounds
from zipper.strand import Segment
from zipper_lab.bench import Turn, head, in_turn, machine, ratio
from zipper_lab.corpora.commands import sentences, synthesize

need("serve")

ARMS = ("zipper", "engine", "one at a time", "stock")
ROWS = 8
LEVELS = (0.5, 1.0, 2.0, 10.0)  # of what zipper can do
WAIT_S = 60.0


class Job(NamedTuple):
    """A request as it is sent, and what it is: "transcribe", "speak" or "run"."""

    kind: str
    content: bytes


class Outcome(NamedTuple):
    """What came of one. first_s: until the first byte of the answer's body; 0 where there was
    none."""

    kind: str
    status: int
    first_s: float
    seconds: float
    body: bytes


def post(path: str, kind: str, body: bytes, **headers: str) -> bytes:
    """A request of HTTP."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "connection: close"]
    lines += [f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask_json(path: str, wanted: Mapping[str, Any]) -> bytes:
    """A request with JSON."""
    return post(path, "application/json", json.dumps(wanted).encode())


def ask_form(path: str, file: bytes, **fields: str) -> bytes:
    """A request with a form and a file in it."""
    mark = "zipper"
    parts = [
        f'--{mark}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    named = f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = b"".join([*parts, named.encode(), file, f"\r\n--{mark}--\r\n".encode()])
    return post(path, f"multipart/form-data; boundary={mark}", body)


async def ask(port: int, job: Job, leave_after_s: float | None = None) -> Outcome:
    """Sends a request and reads its answer. leave_after_s: hang up then, with what there is
    (status 0 where that is nothing)."""
    began = time.perf_counter()
    found, first = bytearray(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(WAIT_S if leave_after_s is None else leave_after_s):
            writer.write(job.content)
            await writer.drain()
            while part := await reader.read(1 << 16):
                found += part
                if not first and len(found) > found.find(b"\r\n\r\n") + 4 > 3:
                    first = time.perf_counter() - began
    except TimeoutError:
        if leave_after_s is None:
            raise
    except ConnectionError:
        pass  # it was refused while it was sent; what was said before that is there
    finally:
        writer.close()
    header, _, body = bytes(found).partition(b"\r\n\r\n")
    status = int(header.split(b" ", 2)[1]) if header else 0
    if b"transfer-encoding: chunked" in header.lower():
        body = _unchunked(body)
    return Outcome(job.kind, status, first, time.perf_counter() - began, body)


def _unchunked(body: bytes) -> bytes:
    parts, at = [], 0
    while (end := body.find(b"\r\n", at)) > 0 and (size := int(body[at:end], 16)):
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(parts)


def jobs(count: int) -> list[Job]:
    """Mixed requests on sentences of the built-in corpus that no training has seen."""
    found = []
    for number, utterance in enumerate(sentences("test", count)):
        kind = ("transcribe", "speak", "run")[number % 3]
        if kind == "transcribe":
            recording = sounds.content(synthesize(utterance), "wav")
            content = ask_form("/v1/audio/transcriptions", recording)
        elif kind == "speak":
            wanted = {"input": utterance.text, "response_format": "pcm"}
            content = ask_json("/v1/audio/speech", wanted)
        else:
            given = [{"tower": "text", "content": utterance.text}]
            content = ask_json("/v1/run", {"given": given, "outputs": ["speech"]})
        found.append(Job(kind, content))
    return found


@contextmanager
def running(arm: str, model: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own; its port and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", __name__, arm, str(port), model]
    with subprocess.Popen(command) as server:
        try:
            asyncio.run(_answering(port, server))
            yield port, server.pid
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


async def _answering(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > until:
                raise ZipperError(f"A server ended with {server.poll()}; see above.") from error
            await asyncio.sleep(0.1)


# --- load


async def closed(port: int, work: Sequence[Job], clients: int, seconds: float) -> list[Outcome]:
    """So many clients, each of which asks again when it is answered."""
    found: list[Outcome] = []
    until, turn = time.perf_counter() + seconds, iter(range(1 << 30))

    async def client() -> None:
        while time.perf_counter() < until:
            found.append(await ask(port, work[next(turn) % len(work)]))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def opened(
    port: int, work: Sequence[Job], rate: float, seconds: float, seed: int = 0
) -> list[Outcome]:
    """Requests that come when they come, `rate` a second on average, whoever is still waiting."""
    dice, at, number = random.Random(seed), 0.0, 0
    tasks, began = list[asyncio.Task[Outcome]](), time.perf_counter()
    while (at := at + dice.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, work[number % len(work)])))
        number += 1
    return await asyncio.gather(*tasks)


def told(found: Sequence[Outcome], seconds: float) -> dict[str, float]:
    """Goodput (answers a second), and times in milliseconds of those that were answered; and of
    refusals."""
    good = [one for one in found if one.status == 200]
    refused = [one.seconds for one in found if one.status == 429]
    streams = [one.first_s for one in good if one.kind == "speak"]
    said = {
        "goodput": len(good) / seconds,
        "answered": len(good),
        "refused": len(refused),
        "failed": len(found) - len(good) - len(refused),
    }
    for name, values in (
        ("", [one.seconds for one in good]),
        ("first sound ", streams),
        ("refusal ", refused),
    ):
        for share in (50, 95, 99) if values else ():
            said[f"{name}p{share}_ms"] = 1000 * float(np.quantile(values, share / 100))
    return said


def _turn(port: int, work: Sequence[Job], clients: int, seconds: float) -> Turn:
    began = time.perf_counter()
    found = asyncio.run(closed(port, work, clients, seconds))
    said = told(found, time.perf_counter() - began)
    alone = [asyncio.run(ask(port, job)) for job in work if job.kind == "speak"][:5]
    return said | {"first_alone_ms": 1000 * statistics.median(one.first_s for one in alone)}


def bench(
    rounds: int,
    warm: int = 1,
    model: str = "",
    seconds: float = 6.0,
    clients: int = 8,
    arms: Sequence[str] = ARMS,
    levels: Sequence[float] = LEVELS,
    hardware: str = "",
) -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it. seconds: of one turn.

    Raises a ZipperError for an arm that is none, or a server that ends.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ZipperError(f"There is no arm {unknown[0]!r}. Take some of {', '.join(ARMS)}.")
    work = jobs(24)
    with ExitStack() as stack:
        turns: dict[str, Callable[[], Turn]] = {}
        for arm in arms:
            if arm == "engine":
                turns[arm] = _engine(model, work)
            else:
                port, _ = stack.enter_context(running(arm, model))
                turns[arm] = partial(_turn, port, work, clients, seconds)
        found = in_turn(turns, rounds, warm)
        load = []
        if "zipper" in arms:
            ours = turns["zipper"].args[0]  # type: ignore[attr-defined]
            can = statistics.median(turn["goodput"] for turn in found["zipper"])
            for level in levels:
                began = time.perf_counter()
                came = asyncio.run(opened(ours, work, level * can, seconds))
                said = told(came, time.perf_counter() - began)  # until the last is answered
                load.append({"level": level, "offered": level * can, **said})
    goodput = {arm: [turn["goodput"] for turn in turns] for arm, turns in found.items()}
    others = [arm for arm in arms if arm != "zipper"] if "zipper" in arms else []
    return {
        **machine(hardware),
        "rounds": rounds,
        "settings": {
            "model": model or "shipped",
            "clients": clients,
            "rows": ROWS,
            "seconds": seconds,
            "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        },
        "arms": {
            arm: {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            for arm, turns in found.items()
        },
        "ratios": [
            {"above": "zipper", "below": arm, **ratio(goodput["zipper"], goodput[arm])._asdict()}
            for arm in others
        ],
        "load": load,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The results, for people."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name]:.1f}" if name in row else ""

    columns: tuple[str, ...] = ("goodput", "p50_ms", "p95_ms", "p99_ms", "first_alone_ms")
    lines = head("A server under load", "zipper bench serve", found)
    lines += ["| arm | answers a second | p50, ms | p95 | p99 | first sound alone, ms |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(cell(arm, column) for column in columns)} |"
        for name, arm in found["arms"].items()
    ]
    lines += ["", "| answers a second | ratio | 95 % |", "|---|---|---|"]
    lines += [
        f"| {r['above']} / {r['below']} | {r['median']:.2f} | {r['low']:.2f} to {r['high']:.2f} |"
        for r in found["ratios"]
    ]
    columns = (
        *("offered", "goodput", "refused", "failed", "p50_ms", "p95_ms", "p99_ms"),
        *("first sound p50_ms", "first sound p99_ms", "refusal p99_ms"),
    )
    lines += ["", f"| of its best | {' | '.join(name.replace('_', ' ') for name in columns)} |"]
    lines += [f"|{'---|' * (len(columns) + 1)}"]
    lines += [
        f"| {row['level']:g} | {' | '.join(cell(row, column) for column in columns)} |"
        for row in found["load"]
    ]
    return "\n".join(lines) + "\n"


# --- arms


def _engine(model: str, work: Sequence[Job]) -> Callable[[], Turn]:
    """The engine alone: sounds to ids, all requests at once, ids to sounds, one after the other."""
    pipe = Pipeline.from_pretrained(model or None)
    given = [_offline(pipe, job) for job in work]

    def turn() -> Turn:
        began = time.perf_counter()
        asked: list[Request] = []
        for segments, outputs in given:
            request = pipe.asked(segments, outputs)
            assert request is not None
            asked.append(request)
        for answer in pipe.engine(ROWS).run(asked):
            (made,) = answer.segments()
            pipe.modalities[made.tower].decode(made.content)
        took = time.perf_counter() - began
        firsts = [
            _first_sound(pipe, segments) for segments, outputs in given if outputs == ["speech"]
        ]
        return {
            "goodput": len(given) / took,
            "first_alone_ms": 1000 * statistics.median(firsts[:5]),
        }

    return turn


def _first_sound(pipe: Pipeline, segments: Sequence[Segment]) -> float:
    began, engine = time.perf_counter(), pipe.engine(1)
    request = pipe.asked(segments, ["speech"])
    assert request is not None
    tokens = engine.stream(engine.submit(request))
    next(iter(pipe.units.stream(token.id for token in tokens)))
    return time.perf_counter() - began


def _offline(pipe: Pipeline, job: Job) -> tuple[list[Segment], list[str | Segment]]:
    """What a request asks for, in Python."""
    body = job.content.partition(b"\r\n\r\n")[2]
    if job.kind == "transcribe":
        recording = body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
        return [Segment("speech", recording)], ["text"]
    wanted = json.loads(body)
    text = wanted["input"] if job.kind == "speak" else wanted["given"][0]["content"]
    return [Segment("text", text)], ["speech"]


def _plain(run: Callable[[list[Segment], list[str | Segment]], Any]) -> Any:
    """An application of FastAPI as one writes it in an afternoon: one request at a time."""
    from fastapi import FastAPI, Form, UploadFile
    from starlette.responses import Response

    plain, lock = FastAPI(), threading.Lock()

    def transcribe(file: UploadFile, model: str = Form("")) -> Any:
        with lock:
            (said,) = run([Segment("speech", file.file.read())], ["text"])
        return {"text": said.content}

    def speak(wanted: dict[str, Any]) -> Any:
        with lock:
            (said,) = run([Segment("text", wanted["input"])], ["speech"])
        return Response(sounds.pcm(said.content))

    def anything(wanted: dict[str, Any]) -> Any:
        with lock:
            (said,) = run([Segment("text", wanted["given"][0]["content"])], ["speech"])
            return Response(sounds.content(said.content, "wav"))

    plain.add_api_route("/v1/audio/transcriptions", transcribe, methods=["POST"])
    plain.add_api_route("/v1/audio/speech", speak, methods=["POST"])
    plain.add_api_route("/v1/run", anything, methods=["POST"])
    return plain


def _stock(pipe: Pipeline) -> Callable[[list[Segment], list[str | Segment]], Any]:
    """As many tokens by the bare text tower's `generate`, then the same work on sound."""
    import torch

    tower: Any = pipe.zip.tower(next(iter(pipe.modalities)))
    known: dict[str, Any] = {}

    def run(given: list[Segment], outputs: list[str | Segment]) -> Any:
        request = pipe.asked(given, outputs)
        assert request is not None
        (read,) = request.segments
        key = repr(read)
        if key not in known:  # how many tokens it is; warm rounds find out, and are not counted
            ((known[key],),) = pipe.generate([request.segments], outputs, Sampling())[:1]
        made = known[key]
        tokens, prompt = len(made.content) + 1, torch.full((1, len(read.content) + 2), 3)
        with torch.inference_mode():
            tower.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return [replace(made, content=pipe.modalities[made.tower].decode(made.content))]

    return run


def main(arm: str, port: str, model: str = "") -> None:
    """A server, until it is told to stop."""
    pipe = Pipeline.from_pretrained(model or None)
    if arm == "zipper":
        process.server(app.serve(pipe, ROWS), port=int(port)).run()
        return
    import uvicorn

    plain = _plain(_stock(pipe) if arm == "stock" else pipe.run)
    uvicorn.run(plain, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
