"""Zips on the hub, against a stand-in of its HTTP API on this machine: what goes up comes down, at
any commit, with or without a network; what is not there, not allowed or of no use to others is
refused.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
from tiny import World

from zipper.cli import main
from zipper.errors import ZipperError
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint, hub
from zipper.strand import Segment, collate
from zipper.tower import Tower

TOKEN = "hf_of_nobody"


@dataclass
class Repo:
    """Commits by their hash, each {path: content}; branches are names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


class StandIn(ThreadingHTTPServer):
    """The calls that huggingface_hub makes, answered as the hub does; large files by LFS, small
    ones inside the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []


class Refusal(Exception):
    """Status and the word for it in X-Error-Code."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {'/'.join(path)}")
        status, headers = 200, {}
        try:
            if (
                self.command in ("POST", "PUT")
                and "lfs-store" not in path
                and self.headers["Authorization"] != f"Bearer {TOKEN}"
            ):
                raise Refusal(401, "")
            found = self._call(path, given)
        except Refusal as refusal:
            status, headers["X-Error-Code"] = refusal.args
            found = {"error": headers["X-Error-Code"]}
        if isinstance(found, tuple):
            found, more = found
            headers |= more
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(found.pop("status", status) if isinstance(found, dict) else status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _call(self, path: list[str], given: bytes) -> Any:
        hub = self.server
        match path:
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                name = (
                    f"{json.loads(given).get('organization') or 'me'}/{json.loads(given)['name']}"
                )
                new = name not in hub.repos
                hub.repos.setdefault(name, Repo()).commits or hub.repos[name].commit(
                    "main", {".gitattributes": b"*.safetensors lfs"}
                )
                return {"url": f"{hub.url}/{name}", "status": 200 if new else 409}
            case ["api", "models", owner, name, *rest]:
                return self._api(f"{owner}/{name}", rest or ["revision", "main"], given)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                wanted = [(o["oid"], o["size"]) for o in json.loads(given)["objects"]]
                upload = {
                    oid: {"upload": {"href": f"{hub.url}/lfs-store/{oid}"}}
                    for oid, _ in wanted
                    if oid not in hub.objects
                }
                return {
                    "objects": [
                        {"oid": o, "size": s, **({"actions": upload[o]} if o in upload else {})}
                        for o, s in wanted
                    ]
                }
            case ["lfs-store", oid]:
                hub.objects[oid] = given
                return {}
            case [owner, name, "resolve", revision, *file]:
                repo, commit = self._at(f"{owner}/{name}", revision)
                if repo.gated:
                    raise Refusal(403, "GatedRepo")
                if "/".join(file) not in repo.commits[commit]:
                    raise Refusal(404, "EntryNotFound")
                content = repo.commits[commit]["/".join(file)]
                return content, {
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Repo-Commit": commit,
                }
        raise Refusal(404, "")

    def _api(self, name: str, rest: list[str], given: bytes) -> Any:
        repo, commit = self._at(name, rest[1] if rest[0] != "branch" else "main")
        match rest:
            case ["revision", _]:
                return {"id": name, "sha": commit}
            case ["tree", *_]:
                return [
                    {"type": "file", "path": p, "size": len(c), "oid": "0" * 40}
                    for p, c in repo.commits[commit].items()
                ]
            case ["branch", branch]:
                new = branch not in repo.branches
                repo.branches.setdefault(branch, commit)
                return {"status": 200 if new else 409}
            case ["preupload", _]:
                files = json.loads(given)["files"]
                mode = {True: "lfs", False: "regular"}
                return {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            case ["commit", branch]:
                files = dict(repo.commits[commit])
                for line in map(json.loads, given.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.server.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                made = repo.commit(branch, files)
                return {"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made}
        raise Refusal(404, "")

    def _at(self, name: str, revision: str) -> tuple[Repo, str]:
        if name not in self.server.repos:
            raise Refusal(404, "RepoNotFound")
        repo = self.server.repos[name]
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return repo, commit


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub with nothing in it, and an empty cache; this process talks to it as it would to the
    real one."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS only
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zip with its frozen tower inside, so that anyone can load it."""
    folder = tmp_path_factory.mktemp("whole") / "zip"
    Pipeline.from_pretrained(world.zip).save_pretrained(folder, include=["text"])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def uploaded(folder: Path, repo: str) -> dict[str, bytes]:
    """What a folder should be in a repository: its files, the card naming the repository."""
    files = contents(folder)
    return files | {
        "README.md": files["README.md"].replace(
            b'from_pretrained(".")', f'from_pretrained("{repo}")'.encode()
        )
    }


def logits(source: str | Path, revision: str | None = None) -> torch.Tensor:
    model = Pipeline.from_pretrained(source, revision=revision).model
    sample = [Segment("text", [5, 6, 7]), Segment("speech", [1, 2, 3, 4])]
    return model(collate([sample], model.ends()).strands)["speech"]


def changed(folder: Path, copy: Path) -> Path:
    """The same zip after a training step that did harm."""
    pipeline = Pipeline.from_pretrained(folder)
    with torch.no_grad():
        for parameter in pipeline.model.links.parameters():
            parameter += 0.1
    pipeline.save_pretrained(copy, include=["text"])
    return copy


# --- there and back


def test_what_is_pushed_comes_back_bit_for_bit_from_a_fresh_cache(
    standin: StandIn, whole: Path
) -> None:
    url = hub.push(whole, "me/my-zip", message="The first")
    found = hub.fetch("me/my-zip")
    assert contents(found.folder) == uploaded(whole, "me/my-zip") != contents(whole)
    assert url == f"{standin.url}/me/my-zip/commit/{found.commit}"
    assert (found.repo, found.folder.name) == ("me/my-zip", found.commit)
    assert torch.equal(logits("me/my-zip"), logits(whole))


def test_weights_go_by_lfs_and_all_in_one_commit(standin: StandIn, whole: Path) -> None:
    hub.push(whole, "me/my-zip")
    weights = {
        hashlib.sha256(c).hexdigest()
        for name, c in contents(whole).items()
        if name.endswith(".safetensors")
    }
    assert standin.objects.keys() == weights
    assert [call for call in standin.asked if "/commit/" in call] == [
        "POST api/models/me/my-zip/commit/main"
    ]


def test_every_file_lies_under_the_root_that_is_named(standin: StandIn, whole: Path) -> None:
    hub.push(whole, "me/my-zip")
    found = hub.fetch("me/my-zip")
    real = [path.resolve() for path in found.folder.rglob("*") if path.is_file()]
    assert any(path.parent.name == "blobs" for path in real)
    assert all(path.is_relative_to(found.root) for path in real)
    assert hub.fetch(found.folder) == hub.Local(found.folder, found.root)
    assert hub.fetch(str(whole)) == hub.Local(whole, whole.resolve())
    assert hub.record(found.folder) == hub.record("me/my-zip") == checkpoint.load(whole)[1]
    made = whole.with_name("swapped")
    tower = whole / "towers" / "text"
    asked = ["swap", str(found.folder), f"text={tower}", "-o", str(made)]
    assert main(asked) == 0 and (made / checkpoint.CONFIG).is_file()


def test_a_zip_in_the_cache_may_be_linked_to(standin: StandIn, whole: Path, tmp_path: Path) -> None:
    hub.push(whole, "me/my-zip")
    (tmp_path / "mine").symlink_to(hub.fetch("me/my-zip").folder)
    assert torch.equal(logits(tmp_path / "mine"), logits(whole))


def test_each_revision_is_its_own_zip(standin: StandIn, whole: Path, tmp_path: Path) -> None:
    first = hub.push(whole, "me/my-zip").rpartition("/")[2]
    second = hub.push(changed(whole, tmp_path / "second"), "me/my-zip").rpartition("/")[2]
    hub.push(whole, "me/my-zip", revision="trial")
    assert first != second
    assert not torch.equal(logits(whole), logits(tmp_path / "second"))
    assert torch.equal(logits("me/my-zip"), logits(tmp_path / "second"))
    assert torch.equal(logits("me/my-zip", revision=first), logits(whole))
    assert torch.equal(logits("me/my-zip", revision="trial"), logits(whole))
    with pytest.raises(
        ZipperError,
        match=r"me/my-zip has no revision 'gone'. Give a branch, a tag or a commit hash",
    ):
        Pipeline.from_pretrained("me/my-zip", revision="gone")
    with pytest.raises(ZipperError, match=r"only a hub repository has the revision 'main'"):
        hub.fetch(whole, revision="main")


@pytest.mark.slow
def test_a_process_without_network_loads_it_from_the_cache(
    standin: StandIn, whole: Path, tmp_path: Path
) -> None:
    hub.push(whole, "me/my-zip")
    hub.fetch("me/my-zip")
    program = """if True:
        from zipper import Pipeline, Segment
        from zipper.strand import collate
        model = Pipeline.from_pretrained("me/my-zip").model
        sample = [Segment("text", [5, 6, 7]), Segment("speech", [1, 2, 3, 4])]
        print(model(collate([sample], model.ends()).strands)["speech"].tolist())
        Pipeline.from_pretrained("me/other")"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert torch.equal(torch.tensor(json.loads(done.stdout)), logits(whole))
    assert (
        "me/other is no folder and not wholly in the hub's cache, and HF_HUB_OFFLINE is set. Go "
        "online" in done.stderr
    )


def test_a_push_over_an_older_zip_leaves_none_of_it_and_everything_else(
    standin: StandIn, world: World, whole: Path
) -> None:
    hub.push(whole, "me/my-zip")
    repo = standin.repos["me/my-zip"]
    repo.commit(
        "main",
        {
            **repo.commits[repo.branches["main"]],
            "LICENSE": b"mine",
            "modalities/video/old.json": b"{}",
        },
    )
    hub.push(whole, "me/my-zip")
    now = repo.commits[repo.branches["main"]]
    assert now == {
        **uploaded(whole, "me/my-zip"),
        "LICENSE": b"mine",
        ".gitattributes": b"*.safetensors lfs",
    }


def test_the_card_goes_up_as_it_was_edited_and_names_the_repository(
    standin: StandIn, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "zip"))
    (folder / "README.md").write_text('# Ours\npipe = Pipeline.from_pretrained(".")\n')
    hub.push(folder, "me/my-zip")
    assert (
        hub.fetch("me/my-zip").folder / "README.md"
    ).read_text() == '# Ours\npipe = Pipeline.from_pretrained("me/my-zip")\n'
    assert (folder / "README.md").read_text() == '# Ours\npipe = Pipeline.from_pretrained(".")\n'


def test_a_branch_is_pushed_to_again_and_keeps_nothing_of_the_zip_before(
    standin: StandIn, whole: Path
) -> None:
    hub.push(whole, "me/my-zip", revision="trial")
    repo = standin.repos["me/my-zip"]
    now = repo.commits[repo.branches["trial"]]
    repo.commit("trial", {**now, "modalities/video/old.json": b"{}"})
    hub.push(whole, "me/my-zip", revision="trial")
    assert repo.commits[repo.branches["trial"]] == now
    assert repo.commits[repo.branches["main"]].keys() == {".gitattributes"}


def test_a_repository_is_private_and_a_commit_named_as_was_asked(
    standin: StandIn, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def noted(real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            asked.update(options)
            return real(*given, **options)

        return call

    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(HfApi, name, noted(getattr(HfApi, name)))
    hub.push(whole, "me/mine", private=True, message="The first")
    assert (asked["private"], asked["commit_message"]) == (True, "The first")
    hub.push(whole, "me/ours")
    assert asked["private"] is None


def test_a_token_that_is_given_goes_before_that_of_the_user(
    standin: StandIn, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "/me/my-zip/commit/" in hub.push(whole, "me/my-zip", token=TOKEN)


def test_a_repository_without_an_owner_is_the_users_and_the_card_says_so(
    standin: StandIn, whole: Path
) -> None:
    hub.push(whole, "my-zip")
    assert contents(hub.fetch("me/my-zip").folder) == uploaded(whole, "me/my-zip")


def test_a_folder_without_a_card_leaves_that_of_the_repository(
    standin: StandIn, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "zip"))
    hub.push(folder, "me/my-zip")
    (folder / "README.md").unlink()
    hub.push(folder, "me/my-zip")
    assert contents(hub.fetch("me/my-zip").folder) == uploaded(whole, "me/my-zip")


def test_a_card_that_is_no_text_is_refused_before_a_repository_is_made(
    standin: StandIn, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "zip"))
    (folder / "README.md").write_bytes("Ein Chor f\u00fcr Z\u00fcrich".encode("latin-1"))
    with pytest.raises(
        ZipperError, match=r"README.md is no UTF-8 .*at byte 10\). Save it as UTF-8"
    ):
        hub.push(folder, "me/my-zip")
    assert "me/my-zip" not in standin.repos


def test_a_zip_in_the_cache_and_one_at_home_are_pushed_as_they_are_named(
    standin: StandIn, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    hub.push(f"~/{whole.name}", "me/first")
    hub.push(hub.fetch("me/first").folder, "me/second")
    assert torch.equal(logits("me/second"), logits(whole))


def test_the_command_line_pushes_and_says_where_it_is(
    standin: StandIn, world: World, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["push", str(whole), "me/my-zip", "--revision", "trial", "--message", "From the shell"]
        )
        == 0
    )
    assert (
        capsys.readouterr().out
        == f"{standin.url}/me/my-zip/commit/{hub.fetch('me/my-zip', revision='trial').commit}\n"
    )
    assert main(["push", str(world.zip), "me/other"]) == 2
    assert "zipper push: The frozen tower 'text' of" in capsys.readouterr().err


def test_a_pipeline_or_a_model_pushes_itself(standin: StandIn, whole: Path) -> None:
    pipeline = Pipeline.from_pretrained(whole)
    url = pipeline.push_to_hub("me/pipeline", include=["text"])
    assert url.startswith(f"{standin.url}/me/pipeline/commit/")
    assert torch.equal(logits("me/pipeline"), logits(whole))
    pipeline.model.push_to_hub("me/model", include=["text"])
    again = Zipper.from_pretrained("me/model").state_dict()
    assert all(
        torch.equal(again[name], tensor) for name, tensor in pipeline.model.state_dict().items()
    )


@pytest.mark.slow
def test_a_run_is_moved_with_its_towers_resumed_shown_verified_evaluated_and_pushed(
    standin: StandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All by the command line's own words, from a folder that is not the project's."""
    torch.manual_seed(0)
    tiny.world(tmp_path / "project")
    recipe = """
import dataclasses, json
from pathlib import Path
from tiny import World
HERE = Path(__file__).parent
def config():
    return dataclasses.replace(World(HERE).config(HERE / "run"), steps=4, save_every=2, eval_every=2, log_every=2)
"""
    (tmp_path / "project" / "recipe.py").write_text(recipe)

    def zipper(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    zipper("train", tmp_path / "project" / "recipe.py")
    # It was killed before this one.
    shutil.rmtree(tmp_path / "project" / "run" / "checkpoints" / "step-0000004")
    project = (tmp_path / "project").rename(tmp_path / "moved")
    model = project / "run" / "model"
    zipper("train", project / "recipe.py", "--resume")
    assert json.loads(zipper("show", project / "run", "--json"))["steps"] == 4
    assert json.loads(zipper("show", model, "--json"))["towers"]["text"]
    assert all(check["held"] for check in json.loads(zipper("verify", model, "--json")))
    assert json.loads(
        zipper("evaluate", "--model", model, "--test", "2", "--task", "asr", "--json")
    )["asr"]
    manifest = str(project / "dev.jsonl")
    pruned = zipper(
        "prune",
        model,
        "--below",
        "9",
        "--data",
        manifest,
        "--rows",
        "4",
        "-o",
        tmp_path / "pruned",
        "--json",
    )
    assert json.loads(pruned)["rows"] == 4
    assert main(["push", str(model), "me/run"]) == 2
    assert "--include text" in capsys.readouterr().err
    url = zipper("push", model, "me/run", "--include", "text").strip()
    assert url.startswith(f"{standin.url}/me/run/commit/")
    shutil.rmtree(project)
    there = Pipeline.from_pretrained("me/run")
    assert there.zip.config.towers["text"].source.endswith("towers/text")
    assert checkpoint.load(hub.fetch("me/run").folder, hub.fetch("me/run").root)[1]["step"] > 0


def test_a_push_may_say_of_which_hub_id_a_base_is(
    standin: StandIn, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    HfApi(endpoint=standin.url, token=TOKEN).create_repo("me/base", exist_ok=True)
    base = world.folder / "text" / "tower"
    operations = [CommitOperationAdd(path.name, path) for path in base.iterdir() if path.is_file()]
    HfApi(endpoint=standin.url, token=TOKEN).create_commit(
        "me/base", operations, commit_message="base"
    )
    assert main(["push", str(world.zip), "me/light", "--tower", "text=me/base"]) == 0
    pin = checkpoint.read_json(hub.fetch("me/light").folder / "zipper.json")["config"]["towers"][
        "text"
    ]
    assert (pin["source"], pin["relative"]) == ("me/base", "") and len(pin["revision"]) == 40
    assert torch.equal(logits("me/light"), logits(world.zip))
    assert capsys.readouterr().out


# --- what is refused


def test_a_zip_whose_base_lies_in_a_folder_is_not_pushed(standin: StandIn, world: World) -> None:
    with pytest.raises(
        ZipperError,
        match=r"'text' of .* is pinned to /.*others do not have. Save the zip with "
        r"include=\['text'\]",
    ):
        hub.push(world.zip, "me/my-zip")
    assert not standin.asked


def test_a_damaged_zip_is_not_pushed(standin: StandIn, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "zip"))
    (folder / "modalities.json").write_text("{}")
    with pytest.raises(ZipperError, match=r"modalities.json is damaged"):
        hub.push(folder, "me/my-zip")
    with pytest.raises(ZipperError, match=r"has no manifest.json"):
        hub.push(tmp_path, "me/my-zip")
    assert not standin.asked


def test_what_is_not_there_or_not_allowed_is_said_in_a_sentence(
    standin: StandIn, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ZipperError, match=r"hub has no repository me/nothing, or none that you may use"
    ):
        hub.fetch("me/nothing")
    with pytest.raises(ZipperError, match=r"'a zip\?' is neither a folder nor a hub id"):
        hub.fetch("a zip?")
    hub.push(whole, "me/my-zip")
    standin.repos["me/my-zip"].gated = True
    with pytest.raises(ZipperError, match=r"me/my-zip is gated. Accept its terms"):
        hub.fetch("me/my-zip")
    standin.repos["me/model"] = Repo()
    standin.repos["me/model"].commit(
        "main", {"README.md": b"", "config.json": b"{}", "model.safetensors": b"0"}
    )
    with pytest.raises(ZipperError, match=r"me/model holds no zip: it has no manifest.json"):
        hub.fetch("me/model")
    assert not any(
        "model.safetensors" in call
        for call in standin.asked
        if "resolve" in call and "me/model/" in call
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ZipperError, match=r"me/my-zip.*hf auth login"):
        hub.push(whole, "me/my-zip")


def test_no_network_is_said_in_a_sentence(
    standin: StandIn, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        ZipperError,
        match=r"me/my-zip is no folder and not wholly in the hub's cache, and the hub cannot be "
        r"reached",
    ):
        hub.fetch("me/my-zip")
    with pytest.raises(ZipperError, match=r"The hub cannot be reached for me/my-zip"):
        hub.push(whole, "me/my-zip")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ZipperError, match=r"The hub cannot be reached for me/my-zip: .*HF_HUB_OFFLINE"
    ):
        hub.push(whole, "me/my-zip")


# --- towers on the hub


def test_a_zip_finds_its_base_at_the_commit_it_was_built_on(
    standin: StandIn, world: World, tmp_path: Path
) -> None:
    api = HfApi(endpoint=standin.url, token=TOKEN)
    api.create_repo("me/tower")

    def publish(name: str) -> str:
        files = contents(world.folder / name / "tower")
        changes = [CommitOperationAdd(file, content) for file, content in files.items()]
        return api.create_commit("me/tower", changes, commit_message=name).oid

    first = publish("text")
    model = Zipper.from_towers(
        {"text": "me/tower", "speech": world.folder / "speech" / "tower"}, train=["speech"]
    )
    assert (model.config.towers["text"].source, model.config.towers["text"].revision) == (
        "me/tower",
        first,
    )
    model.push_to_hub("me/zip")
    second = publish("speech")
    assert hub.commit("me/tower") == second != first
    again = Zipper.from_pretrained("me/zip")
    assert again.config.towers["text"].revision == first
    assert all(
        torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items()
    )
    with pytest.raises(
        ZipperError, match="'text' from memory is not the one this zip was trained on"
    ):
        Zipper.from_pretrained("me/zip", towers={"text": Tower.load("me/tower", revision=second)})
    with pytest.raises(
        ZipperError, match=r"hub has no repository me/nothing, or none that you may use"
    ):
        hub.commit("me/nothing")


def test_another_base_is_not_looked_for_at_the_commit_of_the_first(
    standin: StandIn, world: World, tmp_path: Path
) -> None:
    api, files = HfApi(endpoint=standin.url, token=TOKEN), contents(world.folder / "text" / "tower")
    for number, name in enumerate(("me/tower", "me/copy")):
        api.create_repo(name)
        more = {"README.md": b"a copy"} if number else {}
        changes = [CommitOperationAdd(file, content) for file, content in (files | more).items()]
        api.create_commit(name, changes, commit_message="a tower")
    speech = world.folder / "speech" / "tower"
    model = Zipper.from_towers({"text": "me/tower", "speech": speech}, train=["speech"])
    model.save_pretrained(tmp_path / "zip")
    again = Zipper.from_pretrained(tmp_path / "zip", towers={"text": "me/copy"})
    pin = again.config.towers["text"]
    assert (pin.source, pin.revision) == ("me/copy", hub.commit("me/copy"))
    assert pin.revision != model.config.towers["text"].revision


def test_a_tower_that_is_not_in_the_cache_is_not_asked_for(standin: StandIn) -> None:
    api = HfApi(endpoint=standin.url, token=TOKEN)
    api.create_repo("me/tower")
    change = CommitOperationAdd("config.json", b"{}")
    commit = api.create_commit("me/tower", [change], commit_message="a tower").oid
    asked = [*standin.asked]
    with pytest.raises(errors.LocalEntryNotFoundError):
        hub.tower("me/tower", commit)
    assert standin.asked == asked
    hub.commit("me/tower")
    assert hub.tower("me/tower", commit).name == commit


def test_a_path_is_a_folder_whatever_it_is_called_and_a_link_what_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.as_folder(Path("me/zip")) == tmp_path / "me" / "zip"
    assert hub.as_folder("me/zip") is None
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert hub.absolute("link") == str(tmp_path / "real")


@pytest.mark.parametrize("source", ["./zip", "../zip", "~/zip", "/zip", "a/b/c", "runs/zip"])
def test_a_path_is_no_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.names_a_path(source)
    with pytest.raises(ZipperError, match="does not exist"):
        checkpoint.check(hub.fetch(source).folder)


@pytest.mark.parametrize("source", ["gpt2", "me/my-zip"])
def test_a_hub_id_is_no_path(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not hub.names_a_path(source)
