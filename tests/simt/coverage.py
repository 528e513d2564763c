"""What the tests cover of csrc/cuda, each instantiation of a template by itself, from gcov's counts."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Function:
    """One function, or one instantiation of a template: line -> whether it ran; line -> branches taken."""

    file: str
    name: str
    lines: dict[int, bool] = field(default_factory=dict)
    branches: dict[int, list[bool]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return sorted(line for line, ran in self.lines.items() if not ran)


def read(objects: Path, root: Path) -> list[Function]:
    """The functions of the sources below ``root``; port.cuh is left out: its bodies here are not the GPU's."""
    found: dict[tuple[str, str], Function] = {}
    command = ["gcov", "--json-format", "--stdout", "--branch-probabilities", *map(str, objects.rglob("*.cu.gcda"))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for unit in map(json.loads, filter(None, out.splitlines())):
        for source in unit["files"]:
            path = Path(source["file"])
            if root not in path.parents or path.name == "port.cuh":
                continue
            names = {function["name"]: function["demangled_name"] for function in source["functions"]}
            for line in source["lines"]:
                name = line.get("function_name")
                if name is None:
                    continue
                function = found.setdefault((path.name, name), Function(path.name, names[name]))
                number = line["line_number"]
                function.lines[number] = function.lines.get(number, False) or line["count"] > 0
                taken = [branch["count"] > 0 for branch in line["branches"] if not branch["throw"]]
                before = function.branches.get(number, [False] * len(taken))
                if len(before) == len(taken):  # the same code in another unit
                    function.branches[number] = [a or b for a, b in zip(before, taken, strict=True)]
    return [function for function in found.values() if function.lines]


def shares(functions: list[Function]) -> tuple[float, float]:
    """Per cent of lines and of branches, each instantiation counted by itself."""
    lines = [ran for function in functions for ran in function.lines.values()]
    branches = [taken for function in functions for line in function.branches.values() for taken in line]
    return 100 * sum(lines) / len(lines), 100 * sum(branches) / len(branches) if branches else 100


def page(functions: list[Function]) -> str:
    """``build/coverage.md``."""
    files: dict[str, list[Function]] = defaultdict(list)
    for function in functions:
        files[function.file].append(function)
    rows, partial = [], []
    for file, mine in sorted(files.items()):
        lines, branches = shares(mine)
        whole = sum(not function.missing for function in mine)
        rows.append(f"| {file} | {whole} of {len(mine)} | {lines:.1f} % | {branches:.1f} % |")
        for function in sorted(mine, key=lambda f: f.name):
            if function.missing:
                name = function.name.replace("(anonymous namespace)::", "").replace("zfcuda::", "").replace("|", "¦")
                partial.append(f"| {file} | `{name}` | {', '.join(map(str, function.missing))} |")
    lines, branches = shares(functions)
    return f"""# What the tests cover of the CUDA kernels

Counted by gcov while the tests run the kernels on the emulator (docs/emulator.md), each instantiation of a template by
itself; written by `make coverage`. All: **{lines:.1f} %** of lines,
**{branches:.1f} %** of branches.

| file | functions that ran whole | lines | branches |
| --- | --- | --- | --- |
{chr(10).join(rows)}

## Lines that did not run

| file | function | lines |
| --- | --- | --- |
{chr(10).join(partial)}
"""
