"""Fitting: people's files to the values that a kind of modality is fitted to."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from zipper.data.layouts import walk
from zipper.data.manifests import manifest
from zipper.errors import ZipperError
from zipper.modality import Kind, Modality, is_ids

MANIFEST = ".jsonl"


def of_model(kind: Any, source: str, settings: Mapping[str, Any] = {}) -> Modality:
    """A modality of a kind by a model that exists, a hub id or a folder (`Kind.of_model`).

    settings: arguments of `kind.of_model`. Raises a ZipperError for settings that the kind does not
    have, and where there is no such model.
    """
    return _made(kind, getattr(kind, "of_model", Kind.of_model), source, settings)


def fit(
    kind: Any, data: Sequence[Path], field: str | None = None, settings: Mapping[str, Any] = {}
) -> Modality:
    """A modality of a kind for the data in files, folders of them, and manifests.

    field: of manifests; by default the name of the kind. settings: arguments of `kind.fitted`.
    Raises a ZipperError for settings that the kind does not have, and where there are no data.
    """
    if not hasattr(kind, "fitted"):
        raise ZipperError(
            f"There is nothing to fit in the kind {kind.name!r}: its class has no `fitted`. Make "
            "one in Python and save it (zipper.modality.save)."
        )
    named = bool(getattr(kind, "suffix", ""))  # else a string is content, never the name of a file
    values = [*chain.from_iterable(values_of(path, field or kind.name, named) for path in data)]
    if not values:
        raise ZipperError(f"There are no data in {', '.join(map(str, data))}. Give some.")
    return _made(kind, kind.fitted, values, settings)


def values_of(path: Path, field: str, named: bool = True) -> list[Any]:
    """What a kind is fitted to: a file itself, the files below a folder, or what a field of a
    manifest holds; a folder with a manifest.jsonl is that. named: by the names of files, as they
    are seen from the manifest. Raises a ZipperError for a row without the field, and for a manifest
    of another ending."""
    if (path / f"manifest{MANIFEST}").is_file():
        path /= f"manifest{MANIFEST}"
    if path.is_dir():
        below = list[Path]()
        for folder, names in walk(path, Counter()):
            below += [file for name in names if (file := folder / name).is_file()]
        return sorted(below)
    if path.suffix.lower() in (".json", ".ndjson"):
        raise ZipperError(
            f"{path} would be read as a file of its kind. Let the name of a manifest, an object a "
            f"line, end in {MANIFEST}."
        )
    if path.suffix.lower() != MANIFEST:
        return [path]
    found = []
    for number, row in enumerate(manifest(path), 1):
        if field not in row:
            raise ZipperError(
                f"{path}, row {number} has the fields {sorted(row)}, {field!r} was wanted. Say "
                "which one is meant (--field)."
            )
        if not is_ids(row[field]):
            found.append(_whole(row[field], path.parent) if named else row[field])
    return found


def _made(kind: Any, make: Any, given: Any, settings: Mapping[str, Any]) -> Modality:
    """What a kind makes of what is given first and of its settings."""
    _, *names = inspect.signature(make).parameters
    if strange := sorted(settings.keys() - {*names}):
        raise ZipperError(
            f"{strange[0]!r} is no setting of {kind.name!r}; its settings are {', '.join(names)}."
        )
    try:
        made: Modality = make(given, **settings)
    except ZipperError:
        raise
    # A setting of another type than the kind wants, or out of all bounds.
    except (TypeError, ValueError, OverflowError) as error:
        raise ZipperError(
            f"{kind.name!r} cannot be made with {dict(settings)}: {error}."
        ) from error
    return made


def _whole(value: Any, folder: Path) -> Any:
    """A value whose path does not depend on where its manifest lies."""
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return {**value, "path": str(folder / value["path"])}
    return folder / value if isinstance(value, str) else value
