"""Bank conflicts: the counter knows known patterns, and no kernel has conflicts that are not explained."""

from __future__ import annotations

import math
import re

import pytest
import torch

from simt.banks import EXPLAINED, ROOT, Access, explanation, of_operators, recorded
from simt.harness import Emulated, Out


@pytest.fixture(scope="module")
def kernels() -> Emulated:
    return Emulated("banks")


def passes(found: list[Access], kind: str) -> list[tuple[int, int]]:
    return [(access.passes, access.least) for access in found if access.kind == kind]


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 16, 32, 33])
def test_words(kernels, stride):
    with recorded(kernels.library) as found:
        kernels("strided", 1, stride, Out(torch.empty(32)))
    expected = [(math.gcd(stride, 32), 1)]
    assert passes(found, "read") == passes(found, "write") == expected
    assert {access.kernel for access in found} == {"strided_kernel<1>"}


@pytest.mark.parametrize(("stride", "expected"), [(2, 2), (4, 4), (34, 2), (36, 4), (32, 32)])
def test_pairs_are_served_by_half_warps(kernels, stride, expected):
    with recorded(kernels.library) as found:
        kernels("strided", 2, stride, Out(torch.empty(64)))
    assert passes(found, "read") == passes(found, "write") == [(expected, 2)]


@pytest.mark.parametrize(("stride", "expected"), [(4, 4), (8, 8), (20, 4), (36, 4), (32, 32)])
def test_quads_are_served_by_quarter_warps(kernels, stride, expected):
    with recorded(kernels.library) as found:
        kernels("strided", 4, stride, Out(torch.empty(128)))
    assert passes(found, "read") == passes(found, "write") == [(expected, 4)]


def test_one_word_for_all_is_one_pass(kernels):
    with recorded(kernels.library) as found:
        kernels("broadcast", Out(torch.empty(32)))
    assert all(access.ratio == 1 for access in found)
    assert sorted(access.instructions for access in found if access.kind == "read") == [1, 3]


@pytest.mark.parametrize(("pitch", "expected"), [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_fragments(kernels, pitch, expected):
    with recorded(kernels.library) as found:
        kernels("fragment", pitch, torch.zeros(512, dtype=torch.int8), Out(torch.empty(128, dtype=torch.int32)))
    assert passes(found, "read") == passes(found, "write") == [(expected, 4)]


@pytest.fixture(scope="module")
def accesses(request) -> list[Access]:
    if request.config.option.simt_coverage is not None:
        pytest.skip("the emulator that counts coverage sees no accesses")
    return of_operators(request.getfixturevalue("emulator"))


def test_every_kernel_with_shared_memory_was_seen(accesses):
    source = "".join(path.read_text() for path in (ROOT / "csrc/cuda").iterdir() if path.is_file())
    kernels = re.findall(r"__global__[^;{]*?(\w+_kernel)\((.*?)\n}\n", source, re.DOTALL)
    sharing = {name for name, body in kernels if re.search(r"ZF_(DYNAMIC_)?SHARED", body)}
    assert sharing
    assert sharing <= {access.kernel.partition("<")[0] for access in accesses}


def test_conflicts_are_explained(accesses):
    bad = []
    for access in accesses:
        why = explanation(access)
        if access.passes > access.least and (why is None or access.ratio > why.ratio):
            limit = f", more than {why.ratio} ({why.why})" if why else ""
            bad.append(
                f"{access.ratio:.2f} passes{limit}: {access.kernel} {access.kind}s at {access.where}: {access.line}"
            )
    assert not bad, "\n".join(sorted(set(bad)))


def test_every_explanation_is_needed(accesses):
    needed = {explanation(access) for access in accesses}
    assert [e for e in EXPLAINED if e not in needed] == []
