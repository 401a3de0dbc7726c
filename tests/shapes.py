"""Shapes in the signatures of a package, checked at every call.

jaxtyping's hook wraps every function and dataclass, which costs some 50 microseconds a call. Most
have no array: these are left as they are, their types are mypy's business.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import jaxtyping


def check(packages: Sequence[str]) -> None:
    """Check what is imported from now on."""
    whole = jaxtyping.jaxtyped

    def chosen(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def decorate(it: Any) -> Any:
            return whole(it, typechecker=typechecker) if shaped(it) else it

        return decorate

    jaxtyping.jaxtyped = chosen  # what the hook writes above each function calls it
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def shaped(it: Any) -> bool:
    """Whether a function or a class has an array with a shape among its annotations."""
    if isinstance(it, staticmethod | classmethod):
        it = it.__func__
    if isinstance(it, property):
        it = it.fget
    return any(map(_array, inspect.get_annotations(it).values()))


def _array(annotation: Any) -> bool:
    if isinstance(annotation, str):  # not known yet: it may be one
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return get_origin(annotation) is not Literal and any(map(_array, get_args(annotation)))
