"""The Dockerfile, read by its own rules, and its commands one by one where there is no daemon."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def steps() -> list[tuple[str, str]]:
    """The instructions, with what follows each."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def named(word: str) -> list[str]:
    return [rest for step, rest in steps() if step == word]


def test_it_keeps_the_rules_of_images() -> None:
    words = [word for word, _ in steps()]
    assert set(words) <= set("FROM ENV WORKDIR RUN COPY USER EXPOSE HEALTHCHECK STOPSIGNAL ENTRYPOINT".split())  # fmt: skip
    (base,) = named("FROM")
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert re.fullmatch(r"python:\d\.\d+-slim-\w+", base), "a base that stays what it is"
    assert base.removeprefix("python:").startswith(least.removeprefix(">="))
    assert words.index("USER") < words.index("ENTRYPOINT"), "it does not run as root"
    assert words[-1] == "ENTRYPOINT" and json.loads(named("ENTRYPOINT")[0])[:4] == ["python", "-m", "zipper", "serve"]  # fmt: skip
    assert "/health" in named("HEALTHCHECK")[0] and named("EXPOSE") == ["8000"]
    assert not re.search(r"(?i)(key|token|password|secret)\s*=\s*\w", "\n".join(r for w, r in steps() if w in ("ENV", "RUN")))  # fmt: skip
    torch = re.search(r"torch==([\d.]+)", named("RUN")[0])
    assert torch and f"torch=={torch[1]}\n" in (ROOT / "constraints.txt").read_text()


def test_what_it_copies_is_there_and_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [place for rest in named("COPY") for place in rest.split()[:-1]]
    assert copied and all((ROOT / place).exists() for place in copied)
    assert set(copied) == let_in


@pytest.mark.slow
def test_its_commands_run_one_by_one_and_the_server_answers(tmp_path: Path) -> None:
    """In an empty environment, with the packages that pip finds; the index of torch is left out
    where it cannot be reached."""
    home, place = tmp_path / "home", tmp_path / "app"
    venv.create(home, with_pip=True)
    place.mkdir()
    settings = dict(item.split("=", 1) for rest in named("ENV") for item in shlex.split(rest))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**settings, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for word, rest in steps():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place / target)
                else:
                    shutil.copy(ROOT / source, place / target)
        elif word == "RUN" and not rest.startswith("useradd"):
            command = re.sub(r" --index-url \S+", "", rest)
            subprocess.run(command, shell=True, check=True, cwd=place, env=environment)
    size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    print(json.dumps({"installed_mb": size // 1_000_000}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry = json.loads(named("ENTRYPOINT")[0])
    command = [str(home / "bin" / "python"), *entry[1:], "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 120
        check = json.loads(named("HEALTHCHECK")[0].partition("CMD ")[2])[2]
        while True:
            asked = [sys.executable, "-c", check.replace("8000", str(port))]
            if subprocess.run(asked, capture_output=True).returncode == 0:
                break
            assert time.monotonic() < until and server.poll() is None
            time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "zipper"
    finally:
        server.terminate()
        server.wait(30)
