"""A module with another forward(), and nothing else changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package import sys_importer

__all__ = ["original_forwards", "set_forward", "use_original_forward"]


class Rewritten:
    """Comes before a module's class in the method resolution order.

    Copies and pickles by the source of the forward(); and returns to the class's own forward() as soon as a module
    within is replaced, added or deleted, as the new one was made for those that were there.
    """

    _zfcuda_base: type
    _zfcuda_source: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return _blank, (self._zfcuda_base, self._zfcuda_source), *state

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module) or name in self.__dict__["_modules"]:
            use_original_forward(self)
            return setattr(self, name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__["_modules"]:
            use_original_forward(self)
            return delattr(self, name)
        super().__delattr__(name)

    def add_module(self, name: str, module: Any) -> None:
        use_original_forward(self)
        self.add_module(name, module)


class RewrittenSequential(Rewritten):
    """Parts of a Sequential are plain ones."""

    def __getitem__(self: Any, index: Any) -> Any:
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)  # type: ignore[misc]

    def insert(self: Any, index: int, module: Any) -> Any:
        use_original_forward(self)
        return self.insert(index, module)


def set_forward(module: torch.nn.Module, graph: fx.Graph) -> None:
    """Let ``module`` compute ``graph``; it stays of its class, with all that it holds and all its other methods."""
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        return
    code = graph.python_code("self")
    imports = _format_import_block(code.globals, sys_importer)
    module.__class__ = _subclass(_base(module), f"{imports}\n{code.src}", _forward_from_src(code.src, code.globals))


def use_original_forward(module: Any) -> None:
    """Undo `set_forward`."""
    module.__class__ = _base(module)


@contextmanager
def original_forwards(model: torch.nn.Module) -> Iterator[None]:
    """For a while, every module within has the forward() of its own class."""
    rewritten = {module: type(module) for module in model.modules() if isinstance(module, Rewritten)}
    for module in rewritten:
        use_original_forward(module)
    try:
        yield
    finally:
        for module, kind in rewritten.items():
            module.__class__ = kind


def _base(module: torch.nn.Module) -> type:
    return getattr(type(module), "_zfcuda_base", type(module))


def _blank(base: type, source: str) -> Any:
    """A module without attributes: unpickling and copying fill it."""
    cls = _subclass(base, source, _forward_from_src(source, {}))
    return cls.__new__(cls)


def _subclass(base: type, source: str, forward: Any) -> Any:
    mixin = RewrittenSequential if issubclass(base, torch.nn.Sequential) else Rewritten
    attributes: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_zfcuda_base": base,
        "_zfcuda_source": source,
        "forward": forward,
    }
    bases: tuple[Any, ...] = (mixin, base)
    return type(base.__name__, bases, attributes)
