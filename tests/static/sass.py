"""Reads what nvdisasm prints of a cubin: the instructions of each kernel, its loops, and what its main loop issues."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

#: Multiply-adds, the work of a product, each in an issue slot of its own; the tensor cores' do hundreds of them.
TENSOR = ("HMMA", "HGMMA", "DMMA")
PRODUCTS = (*TENSOR, "FFMA", "FFMA2", "DFMA")

#: What feeds a product's loop: reads of global memory, and writes of shared memory.
_FEEDS = {"LDG": {"read"}, "LD": {"read"}, "STS": {"fill"}, "LDGSTS": {"read", "fill"}}

#: A loop with fewer of the others, without operands in shared memory or with roots and powers is no product.
LEAST_PRODUCTS = 48


@dataclass(frozen=True)
class Instruction:
    """``opcode`` with its suffixes, as ``LDG.E.128``; ``target`` is the label that a branch may go to."""

    opcode: str
    conditional: bool
    target: str | None
    operands: str = ""

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Of a load or store, a lane's."""
        for suffix in self.opcode.split(".")[1:]:
            if suffix in ("U8", "S8", "U16", "S16", "64", "128", "256"):
                return int(suffix.lstrip("US"))
        return 32


@dataclass(frozen=True)
class Issued:
    """What some instructions are, by kind: of a main loop once round, or of a whole kernel."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def bases(self) -> Counter[str]:
        return Counter(i.base for i in self.instructions)

    @property
    def product(self) -> str | None:
        """The kind of multiply-add: that of the tensor cores where there are any, else the most frequent."""
        found = [p for p in PRODUCTS if self.bases[p]]
        tensor = [p for p in found if p in TENSOR]
        return max(tensor or found, key=self.bases.__getitem__, default=None)

    @property
    def products(self) -> int:
        return self.bases[self.product] if self.product else 0

    @property
    def is_product(self) -> bool:
        shared = self.per_shared_load < float("inf")
        return self.product in TENSOR or (self.products >= LEAST_PRODUCTS and shared and not self.bases["MUFU"])

    @property
    def share(self) -> float:
        """Of the multiply-adds in what is issued."""
        return self.products / len(self.instructions)

    @property
    def per_shared_load(self) -> float:
        loads = self.bases["LDS"] + self.bases["LDSM"]
        return self.products / loads if loads else float("inf")

    def widths(self, *bases: str) -> Counter[int]:
        """How many accesses there are of each width, in bits a lane."""
        return Counter(i.bits for i in self.instructions if i.base in bases)

    @property
    def conversions(self) -> int:
        """Between floating-point formats: F2F, F2FP, the HADD2.F32 that widens halves, the test in rounding to tf32."""
        return sum(
            i.base in ("F2F", "F2FP")
            or i.opcode.startswith("HADD2.F32")
            or (i.base == "FSETP" and "|, +INF" in i.operands)
            for i in self.instructions
        )

    @property
    def barriers(self) -> int:
        return self.bases["BAR"]

    @property
    def waits(self) -> int:
        """Barriers, and waits for asynchronous copies."""
        return self.barriers + self.bases["DEPBAR"]

    @property
    def local(self) -> int:
        """Accesses to local memory."""
        return self.bases["LDL"] + self.bases["STL"]


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, and where its labels stand."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @cached_property
    def whole(self) -> Issued:
        return Issued(tuple(self.instructions))

    def _goes(self, i: int) -> int | None:
        """Where a branch may go; a call of a label (not a function) never comes back."""
        instruction = self.instructions[i]
        local = instruction.base in ("BRA", "CALL") and not (instruction.target or "$").startswith("$")
        return self.labels.get(instruction.target or "") if local else None

    def _next(self, i: int) -> Iterator[int]:
        instruction = self.instructions[i]
        if (target := self._goes(i)) is not None:
            yield target
        ends = instruction.base in ("BRA", "EXIT", "RET", "BRX") and not instruction.conditional
        if not ends and i + 1 < len(self.instructions):
            yield i + 1

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The instructions of each loop: what lies on the ways round from a label that a later branch goes back to."""
        after = [list(self._next(i)) for i in range(len(self.instructions))]
        before: list[list[int]] = [[] for _ in after]
        for i, following in enumerate(after):
            for j in following:
                before[j].append(i)
        ends: dict[int, list[int]] = {}
        for i in range(len(after)):
            if (target := self._goes(i)) is not None and target <= i:
                ends.setdefault(target, []).append(i)
        loops = (
            _reach([head], after.__getitem__, head) & _reach(branches, before.__getitem__, head)
            for head, branches in ends.items()
        )
        return [frozenset(loop.union(*map(self._called, loop))) for loop in loops]

    def _called(self, i: int) -> set[int]:
        """The instructions of the function that a call calls."""
        target = self.instructions[i].target or ""
        if self.instructions[i].base != "CALL" or not target.startswith("$") or target not in self.labels:
            return set()
        return _reach([self.labels[target]], lambda j: list(self._next(j)), -1)

    @cached_property
    def main_loop(self) -> Issued | None:
        """The innermost loop with most of the multiply-adds; None where there is no product."""
        return self._issued(self._main_loop) if self._main_loop else None

    @cached_property
    def _main_loop(self) -> frozenset[int]:
        loops = {loop: issued for loop in self.loops if (issued := self._issued(loop)).is_product}
        if not loops:
            return frozenset()
        best = max(loops, key=lambda loop: (loops[loop].products, -len(loop)))
        for inner in sorted(loops, key=len, reverse=True):
            if inner < best and 2 * loops[inner].products >= loops[best].products:
                best = inner
        return best

    @cached_property
    def shortest_round(self) -> Issued | None:
        """The shortest way round the main loop that multiplies all, reads global memory and fills shared memory.

        What a loop passes over in most rounds, or does in a smaller loop of its own, is not in it. None if there is
        no such way.
        """
        return self._round(frozenset({"read", "fill"}))

    @cached_property
    def bare_round(self) -> Issued | None:
        """The same without the two, of a loop whose operands may all lie in shared memory before it."""
        return self._round(frozenset())

    def _round(self, wanted: frozenset[str]) -> Issued | None:
        loop = self._main_loop
        first = min((i for i in loop if self.instructions[i].base in PRODUCTS), default=-1)
        done: frozenset[str] = frozenset()
        before: dict[tuple[int, frozenset[str]], tuple[int, frozenset[str]]] = {}  # places, and what was done before
        left = deque([(first, done)] if loop else [])
        while left:
            place = left.popleft()
            done = place[1] | (_FEEDS.get(self.instructions[place[0]].base, set()) & wanted)
            for i in self._next(place[0]):
                if i == first and done == wanted:
                    way = [place[0]]
                    while place in before:
                        place = before[place]
                        way.append(place[0])
                    found = self._issued(way)
                    return found if found.products == self._issued(loop).products else None
                if i in loop and i != first and (i, done) not in before:
                    before[i, done] = place
                    left.append((i, done))
        return None

    def _issued(self, indices: Iterable[int]) -> Issued:
        return Issued(tuple(self.instructions[i] for i in sorted(indices)))


def _reach(start: list[int], following: Callable[[int], list[int]], stop: int) -> set[int]:
    """All that can be reached from ``start`` without going on from ``stop``, but for the start itself."""
    found, left = {*start, stop}, list(start)
    while left:
        for j in following(left.pop()):
            if j not in found:
                found.add(j)
                left.append(j)
    return found


_SECTION = re.compile(r"^\.text\.(?P<symbol>\w+):$")
_LABEL = re.compile(r"^\.?(?P<label>L\w+|\$[\w$]+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+\{?\s*(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*)")
_TARGET = re.compile(r"`\(\.?(L\w+|\$[\w$]+)\)")


def parse(listing: str) -> dict[str, Code]:
    """The kernels in what ``nvdisasm -c`` prints, by symbol."""
    kernels: dict[str, Code] = {}
    code = Code([], {})
    for line in map(str.strip, listing.splitlines()):
        if section := _SECTION.match(line):
            code = kernels[section["symbol"]] = Code([], {})
        elif label := _LABEL.match(line):
            code.labels[label["label"]] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found["rest"])
            # BRA P0, `(…) and BRA.U UP0, `(…) depend on an operand.
            conditional = bool(found["predicate"] or (target and "," in found["rest"][: target.start()]))
            code.instructions.append(
                Instruction(found["opcode"], conditional, target[1] if target else None, found["rest"])
            )
    return kernels
