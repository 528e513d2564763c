"""What was replaced in a model, what was left, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Left", "Replaced", "Report", "public_name"]


@dataclass(frozen=True)
class Replaced:
    """A module or a call that runs on this library's operators now; ``joined`` are those that became a part of it."""

    name: str
    was: str
    now: str
    joined: tuple[str, ...] = ()

    def within(self, path: str) -> Replaced:
        """The same, where names are those within the module of that path."""
        return replace(self, name=_within(path, self.name), joined=tuple(_within(path, n) for n in self.joined))


@dataclass(frozen=True)
class Left:
    """A module or a call that stays as it was."""

    name: str
    what: str
    reason: str

    def within(self, path: str) -> Left:
        """The same, where names are those within the module of that path."""
        return replace(self, name=_within(path, self.name))


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`zfcuda.optimize` did to a model, in the order of its modules; printed, a table.

    Names are those of ``model.named_modules()``; the call of a function is named after the module whose forward()
    holds it: ``block.relu()``.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __repr__(self) -> str:
        """A line for all that was replaced, and one for all that was left for the same reason."""
        rows = [
            (r.name, f"{r.was} → {r.now}", f"with {', '.join(r.joined)}" if r.joined else "") for r in self.replaced
        ]
        alike: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            alike.setdefault((left.what, left.reason), []).append(left.name)
        rows += [(_few(names), f"{what} left", reason) for (what, reason), names in alike.items()]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *_aligned(rows)])


def public_name(thing: Any) -> str:
    """Where users find a function or a class of this library: ``zfcuda.ops.conv2d_relu``."""
    package = ".".join(thing.__module__.split(".")[:2])
    return f"{package}.{thing.__name__}"


def _within(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _few(names: list[str]) -> str:
    more = f", … ({len(names)})" if len(names) > 3 else ""
    return ", ".join(name or "the model" for name in names[:3]) + more


def _aligned(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(rows)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows]
