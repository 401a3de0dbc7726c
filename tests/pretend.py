"""A CUDA that is not there: tensors that say they are on it, compute on the CPU, and meet no tensor
of the CPU without an error.

What runs here puts every tensor where it belongs. A graph is what it is on a GPU: the kernels of
its capture, run again on the same memory; nothing may be asked of the device while it is captured.
Kernels, streams and backward passes are not pretended.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
#: They may move data between devices; a GPU that is capturing may not.
MOVES = {"aten::_to_copy", "aten::copy_"}
#: They take indices from the CPU, and copy them.
INDEXED = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}
#: They wait for the device.
ASKS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
}


class There(Tensor):
    """A tensor on the pretended device. held: where it really is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        assert not isinstance(held, There)
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        # A view of a parameter is no inference tensor, whatever the mode.
        with torch.inference_mode(False):
            made: There = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch's own takes no subclass."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        twin = There(self.held.clone())
        return nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin


class _Everywhere(TorchDispatchMode):
    """Also what names no tensor of the device, such as `torch.zeros(..., device=...)`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _here(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def _there(x: Any) -> Any:
    return There(x) if isinstance(x, Tensor) else x


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    ):
        with _Everywhere():  # in inference mode torch leaves it to us to take it apart
            return func.decompose(*args, **kwargs)
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    foreign = [x for x in tensors if not isinstance(x, There) and x.ndim]
    goes = (
        there if (device := kwargs.get("device")) is None else torch.device(device).type == "cuda"
    )
    if there and foreign and name not in MOVES | INDEXED:
        raise RuntimeError(f"{func} met a tensor of the CPU on the pretended device: {foreign[0]}")
    if Graph.capturing is not None and (there or goes):
        masks = name in INDEXED and any(
            x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor)
        )
        if name in ASKS or masks or foreign or (there and not goes):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given, named = tree_map(_here, args), tree_map(_here, kwargs)
    found = func(*given, **named)
    if name == "aten::_to_copy" and found is given[0]:
        found = found.clone()
    written = bool(
        func._schema.arguments
        and (alias := func._schema.arguments[0].alias_info)
        and alias.is_write
    )
    if Graph.capturing is not None and (there or goes):
        Graph.capturing.append((func, given, named, None if written else found))
    if written:
        return args[0]
    return tree_map(_there, found) if goes else found


class Graph:
    """What `torch.cuda.CUDAGraph` is."""

    capturing: ClassVar[list[tuple[Any, Any, Any, Any]] | None] = None

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Every kernel again, into the memory that it wrote to when it was captured."""
        for func, args, kwargs, said in self.kernels:
            views = any(r.alias_info is not None for r in func._schema.returns)
            if said is None:
                func(*args, **kwargs)
            elif not views:
                for old, new in zip(
                    tree_leaves(said), tree_leaves(func(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, Tensor):
                        old.copy_(new)


@contextmanager
def _capture(graph: Graph) -> Iterator[None]:
    Graph.capturing = []
    try:
        yield
        graph.kernels = Graph.capturing
    finally:
        Graph.capturing = None


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());
"""


@cache
def possible() -> bool:
    """Whether torch can be made to believe in the device: a CPU build of it asks which one is
    current, and wants an answer."""
    try:
        torch._C._ensureCUDADeviceGuardSet()  # enough for a build with CUDA
        if torch.version.cuda is None:
            home = Path(torch.__file__).parent
            with tempfile.TemporaryDirectory() as folder:
                source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
                source.write_text(GUARD)
                flags = [
                    "-std=c++20",
                    "-fPIC",
                    "-shared",
                    f"-I{home / 'include'}",
                    f"-L{home / 'lib'}",
                ]
                command = [
                    os.environ.get("CXX", "c++"),
                    *flags,
                    str(source),
                    "-o",
                    str(library),
                    "-lc10",
                ]
                subprocess.run(command, check=True, capture_output=True)
                ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def cuda() -> Iterator[torch.device]:
    """Inside, "cuda:0" is the pretended device, and torch makes and moves tensors there."""
    assert possible(), "there is no C++ compiler"
    nothing: Callable[..., None] = lambda *given: None  # noqa: E731
    stream = mock.Mock(spec=["wait_stream"])
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
    }
    fakes |= {
        "Event": lambda enable_timing: mock.Mock(elapsed_time=lambda end: 1.0),
        "get_device_name": lambda device: "H100",
    }
    fakes |= {"graph": _capture, "CUDAGraph": Graph, "synchronize": nothing, "_lazy_init": nothing}
    before = (
        torch._C._only_lift_cpu_tensors(),
        torch.__future__.get_overwrite_module_params_on_conversion(),
    )
    # `torch.tensor(..., device=...)` makes it here and moves it.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.multiple(torch.cuda, **fakes), _Everywhere():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before[0])
        torch.__future__.set_overwrite_module_params_on_conversion(before[1])
