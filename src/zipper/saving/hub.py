"""The hub: zips and towers that are named by a repository id instead of a folder.

A zip comes as the folder in the hub's cache and goes up in one commit, so that a reader sees the
old one or the new one. This file knows which files a zip has, not what is in them; it decides what
is a folder and what a hub id for the whole project. The hub's client is imported only where one is
named.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from zipper.errors import ZipperError
from zipper.saving import checkpoint, files

FILES = (
    checkpoint.MANIFEST,
    checkpoint.CONFIG,
    checkpoint.TENSORS,
    checkpoint.PINS,
    "modalities/*/*",
    "towers/*/*.json",
    "towers/*/*.safetensors",
    checkpoint.CARD,
)


@dataclass(frozen=True)
class Local:
    """A zip on this machine. root: where its files may really lie, symlinks followed: the folder
    itself, or the hub's whole cache, in which snapshots are links to blobs that repositories may
    share. repo, commit: "" for a folder.
    """

    folder: Path
    root: Path
    repo: str = ""
    commit: str = ""


def names_a_path(source: str) -> bool:
    """Whether a source is meant as a folder, not as a hub id: ./x, ../x, ~/x, /x, a/b/c, or x in a
    folder there is."""
    parent = Path(source).parent
    return (
        source.startswith((".", "~", "/"))
        or source.count("/") > 1
        or (parent != Path() and os.path.isdir(parent))
    )


def as_folder(source: str | Path) -> Path | None:
    """The folder that a source means, absolute; None where it is a hub id."""
    place = files.place(source)
    local = os.path.isdir(place) or isinstance(source, Path) or names_a_path(source)
    return Path(os.path.abspath(place)) if local else None


def absolute(source: str | Path) -> str:
    """A folder as an absolute path, links followed; a hub id as it is."""
    place = as_folder(source)
    return str(source) if place is None else str(place.resolve())


def fetch(source: str | Path, revision: str | None = None) -> Local:
    """The zip in a folder, or that of a hub repository at a branch, tag or commit (None = main),
    downloaded where it is not cached.

    With HF_HUB_OFFLINE=1, or no network, the cache alone is looked in. Its files are not checked.
    Raises ZipperError where there is no such repository or revision, where it may not be read or
    reached, or where it holds no zip.
    """
    if as_folder(source) is not None:
        place = files.place(source)
        if revision is not None:
            raise ZipperError(
                f"{source} is a folder; only a hub repository has the revision {revision!r}. "
                "Leave revision out."
            )
        return Local(place, _root(place))
    with _in_words(str(source), revision):
        from huggingface_hub import snapshot_download

        place = Path(snapshot_download(str(source), revision=revision, allow_patterns=[*FILES]))
    if not (place / checkpoint.MANIFEST).is_file():
        raise ZipperError(
            f"The hub repository {source} holds no zip: it has no {checkpoint.MANIFEST}. A bare "
            "model is a tower."
        )
    return Local(place, _root(place), str(source), place.name)


def record(source: str | Path) -> dict[str, Any]:
    """What was noted of the making of a zip, in a folder or on the hub; its files are checked."""
    local = fetch(source)
    return checkpoint.load(local.folder, local.root)[1]


def commit(repo: str, revision: str | None = None) -> str:
    """The commit hash of a model on the hub at a branch, tag or commit; offline, the one in the
    cache.

    transformers used to keep it in `config._commit_hash`, and no longer does. Raises ZipperError as
    `fetch` does.
    """
    with _in_words(repo, revision):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, "config.json", revision=revision)).parent.name


def file(repo: str, name: str) -> Path:
    """One file of a hub repository, in the hub's cache. Raises ZipperError as `fetch` does."""
    with _in_words(repo, None):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name))


def tower(repo: str, commit: str) -> Path:
    """The folder in the hub's cache of a tower that was loaded before at a commit; nothing is
    downloaded. Raises what the hub's client raises where it is not there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, "config.json", revision=commit, local_files_only=True)).parent


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a zip",
) -> str:
    """Upload a saved zip as one commit; returns the commit's URL.

    repo: made if there is none; private is of use only then. revision: a branch, made from main if
    there is none. token: default is that of `hf auth login` or HF_TOKEN. Files of an earlier zip
    that this one lacks are removed, others are left alone. README.md goes up as it is in the
    folder, except that `from_pretrained(".")` names the repository.

    Raises ZipperError for a folder that holds no whole zip or one that others could not load, and
    where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder).expanduser()
    for name, tower in checkpoint.load(folder, _root(folder))[0]["towers"].items():
        if not tower["source"].startswith("towers/") and names_a_path(tower["source"]):
            raise ZipperError(
                f"The frozen tower {name!r} of {folder} is pinned to {tower['source']}, a folder "
                f"that others do not have. Save the zip with include=[{name!r}] (--include "
                f"{name}), or say of which hub id it is (--tower {name}=ID)."
            )
    files = {checkpoint.MANIFEST, *checkpoint.read_json(folder / checkpoint.MANIFEST)["files"]}
    card = folder / checkpoint.CARD
    try:
        about = card.read_text(encoding="utf-8") if card.is_file() else ""
    except UnicodeDecodeError as error:
        raise ZipperError(
            f"{card} is no UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    api = HfApi(token=token)
    with _in_words(repo, revision):
        # None: as the owner's settings say.
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = [
            name
            for name in api.list_repo_files(repo, revision=revision)
            if any(fnmatch(name, p) for p in FILES)
        ]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, folder / name) for name in sorted(files)
        ]
        changes += [
            CommitOperationDelete(name) for name in there if name not in (*files, card.name)
        ]
        if about:
            text = about.replace('from_pretrained(".")', f"from_pretrained({json.dumps(repo)})")
            changes.append(CommitOperationAdd(card.name, text.encode()))
        # Not upload_folder: it may cut an upload into several commits.
        return api.create_commit(
            repo, changes, commit_message=message, revision=revision
        ).commit_url


def _root(folder: Path) -> Path:
    """What lies in <cache>/models--*/snapshots/<commit> may be anywhere in <cache>."""
    folder = folder.resolve()
    cached = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parents[2] if cached else folder


@contextmanager
def _in_words(repo: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as a ZipperError that says what to do."""
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.HFValidationError as error:
        raise ZipperError(
            f"{repo!r} is neither a folder nor a hub id such as me/my-zip."
        ) from error
    except errors.GatedRepoError as error:
        raise ZipperError(
            f"The hub repository {repo} is gated. Accept its terms on its page on the hub, then "
            f"{login}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        what = (
            f"The hub has no repository {repo}, or none that you may use, and there is no such "
            "folder"
        )
        raise ZipperError(f"{what}. Check the name, or {login}.") from error
    except errors.RevisionNotFoundError as error:
        raise ZipperError(
            f"The hub repository {repo} has no revision {revision!r}. Give a branch, a tag or a "
            "commit hash."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        where = f"{repo} at {revision}" if revision else repo
        raise ZipperError(
            f"{where} is no folder and not wholly in the hub's cache, and {state}. Go online, or "
            "give a folder."
        ) from error
    except errors.EntryNotFoundError as error:
        raise ZipperError(f"The hub repository {repo} holds no model: {error}") from error
    except errors.HfHubHTTPError as error:
        advice = f". To be let in, {login}" if error.response.status_code in (401, 403) else ""
        raise ZipperError(
            f"The hub refused {repo}: {' '.join(str(error).split())}{advice}."
        ) from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # type: ignore[attr-defined]  # httpx2's or, before, httpx's
        raise ZipperError(f"The hub cannot be reached for {repo}: {error}") from error
