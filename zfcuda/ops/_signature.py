"""The arguments of an implementation, among them NamedTuples, and those of its schema: their fields."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

#: Torch 2.6 knows no Sequence but that of typing.
_KNOWN: dict[Any, Any] = {
    Sequence[int]: typing.Sequence[int],
    Sequence[int] | None: typing.Sequence[int] | None,
}


class Signature:
    """That of ``implementation``: names and types of its arguments.

    An argument that is a NamedTuple stands for its fields; ``Annotated[Window, "pool_"]`` for those of ``Window`` by
    names that begin with ``pool_``.
    """

    def __init__(self, implementation: Callable[..., Any]) -> None:
        signature = inspect.signature(implementation, eval_str=True)
        self.parameters = [*signature.parameters.values()]
        self.returns = signature.return_annotation
        self._groups = [_group(p) for p in self.parameters]
        self._fields: list[inspect.Parameter] = []
        #: Where the schema's arguments have those of the implementation.
        self._places: list[int | slice] = []
        for parameter, group in zip(self.parameters, self._groups, strict=True):
            first = len(self._fields)
            self._fields += _fields(parameter, group)
            self._places.append(slice(first, len(self._fields)) if group else first)
        #: Of the schema's arguments.
        self.names = [f.name for f in self._fields]

    def schema(self, returns: Any, mutates: Sequence[str]) -> str:
        """Torch's, for results of these types and arguments that are written."""
        prototype: Any = lambda: None  # noqa: E731
        fields = [f.replace(annotation=_KNOWN.get(f.annotation, f.annotation)) for f in self._fields]
        prototype.__signature__ = inspect.Signature(fields, return_annotation=returns)
        return torch.library.infer_schema(prototype, mutates_args=tuple(mutates))

    def grouped(self, args: Sequence[Any]) -> list[Any]:
        """The implementation's arguments from the schema's."""
        places = zip(self._groups, self._places, strict=True)
        return [group(*args[place]) if group else args[place] for group, place in places]

    def flat(self, args: Sequence[Any]) -> list[Any]:
        """The schema's arguments from the implementation's."""
        return [field for arg, g in zip(args, self._groups, strict=True) for field in (arg if g else (arg,))]


def _group(parameter: inspect.Parameter) -> Any:
    """The NamedTuple that an argument is, or None."""
    hint = parameter.annotation
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind if hasattr(kind, "_fields") else None


def _fields(parameter: inspect.Parameter, group: Any) -> list[inspect.Parameter]:
    if group is None:
        return [parameter]
    prefix = "".join(getattr(parameter.annotation, "__metadata__", ()))
    return [parameter.replace(name=prefix + n, annotation=kind) for n, kind in get_type_hints(group).items()]
