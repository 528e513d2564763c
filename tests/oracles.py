"""What the operators' tests share: samples, layouts, the tolerance rule, registration, examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zfcuda import core

#: Every dtype that the operators take.
DTYPES = pytest.mark.parametrize("dtype", list(core.DTYPES), ids=str)

HALVES = (torch.float16, torch.bfloat16)

#: For what concerns torch and not the kernels (and what would take the emulator minutes).
NATIVE = pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)

# ---------------------------------------------------------------- samples


@dataclass
class Sample:
    """One call of an operator: its tensors, and its other arguments by name (which may hold tensors too)."""

    tensors: Sequence[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True

    def on(self, device: torch.device, dtype: torch.dtype, layout: str = "contiguous") -> Sample:
        """A copy with fresh leaves: activations and weights of that device, dtype and layout."""

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to(device, dtype if value.is_floating_point() else value.dtype)
            return (LAYOUTS[layout](value) if value.dim() == 4 else value).detach()

        tensors = [place(t) for t in self.tensors]
        for t in tensors:
            if self.differentiable and t is not None and t.is_floating_point():
                t.requires_grad_()
        options = {name: place(value) for name, value in self.options.items()}
        return Sample(tensors, options, self.differentiable)

    def call(self, function: Callable[..., Any]) -> Any:
        return function(*self.tensors, **self.options)

    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors if t is not None and t.requires_grad]


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_zeros(t.size(0), t.size(1) + 1, t.size(2) + 2, 2 * t.size(3))
    view = wide[:, 1:, 1:-1, ::2]
    return view.copy_(t)


#: The same values in other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced channels_last": lambda t: _sliced(t).contiguous(memory_format=torch.channels_last)[:, :],
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def whole_numbers(*size: int, seed: int = 0, top: int = 3) -> Tensor:
    """Small integers, float64: sums of their products are exact in every dtype, and zeros and ties abound."""
    return torch.randint(-top, top + 1, size, generator=torch.Generator().manual_seed(seed)).double()


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- values


def evaluate(
    function: Callable[..., Any], sample: Sample, exact: bool = False, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Outputs of a call, and where it has them its gradients by every floating tensor for a fixed cotangent.

    The cotangent is whole numbers (``exact``), or numbers that ``dtype`` has.
    """
    outputs = sample.call(function)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not sample.differentiable:
        return outputs
    values = (whole_numbers if exact else normal)(*outputs[0].shape, seed=99)
    cotangent = torch.empty_like(outputs[0]).copy_(values.to(dtype))
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs[0], sample.leaves(), cotangent)]


def assert_within(actual: Tensor, torchs: Tensor, exact: Tensor, terms: int) -> None:
    """The house's rule: at most twice torch's error, and a floor for where torch's happens to be none.

    The floor is two ulp of the largest result, times the root of the number of terms of a sum; of halves, whose sums
    are floats, one rounding of the largest result on top of that.
    """
    assert actual.shape == exact.shape
    actual, torchs, exact = actual.cpu(), torchs.cpu(), exact.cpu()
    if not actual.is_floating_point():
        assert torch.equal(actual, exact)
        return
    torch.testing.assert_close(actual.isnan(), exact.isnan())
    if not exact.numel():
        return
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite].nan_to_num(), exact[~finite].nan_to_num())

    def error(value: Tensor) -> float:
        return float((value.double() - exact)[finite].abs().max()) if finite.any() else 0.0

    largest = float(exact[finite].abs().max()) if finite.any() else 0.0
    half = actual.dtype in HALVES
    floor = 2 * torch.finfo(torch.float32 if half else actual.dtype).eps * terms**0.5 * largest
    if half:
        floor += torch.finfo(actual.dtype).eps / 2 * largest
    assert error(actual) <= 2 * error(torchs) + floor


def check_values(
    operator: Callable[..., Any],
    oracle: Callable[..., Any],
    rival: Callable[..., Any],
    sample: Sample,
    device: torch.device,
    dtype: torch.dtype,
    layout: str = "contiguous",
) -> None:
    """Values and gradients of ``operator`` against the oracle in float64, next to torch's own in ``dtype``.

    Both get the numbers that ``dtype`` has. What torch cannot compute in halves it computes in float32, for it to be
    rounded once.
    """
    cpu = torch.device("cpu")
    given = sample.on(cpu, dtype)
    wide = given.on(cpu, torch.float64)
    exact = evaluate(oracle, wide, dtype=dtype)
    try:
        torchs = evaluate(rival, given, dtype=dtype)
    except RuntimeError:
        assert dtype in HALVES
        torchs = evaluate(rival, given.on(cpu, torch.float32), dtype=dtype)
        torchs = [t.to(dtype) if t.is_floating_point() else t for t in torchs]
    if dtype not in HALVES:  # where an oracle may round
        for one, other in zip(exact, evaluate(rival, wide, dtype=dtype), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, equal_nan=True)
    placed = sample.on(device, dtype, layout)
    terms = max(t.numel() for t in sample.tensors if t is not None)
    for a, t, e in zip(evaluate(operator, placed, dtype=dtype), torchs, exact, strict=True):
        assert a.dtype == (dtype if a.is_floating_point() else e.dtype) and a.device == placed.tensors[0].device
        assert_within(a, t, e, terms)


def check_exact(
    operator: Callable[..., Any],
    rival: Callable[..., Any],
    sample: Sample,
    backend: Any,
    halves: Sequence[torch.dtype] = HALVES,
) -> None:
    """Bit-equal (but for the sign of zero) to torch in float64, for samples whose arithmetic is exact.

    In halves to what torch has in float64, rounded: so one rounding is all that an operator does.
    """
    cpu = torch.device("cpu")
    expected = evaluate(rival, sample.on(cpu, torch.float64), exact=True)
    layouts = "contiguous", "channels_last"
    for layout, dtype in [*((layout, torch.float32) for layout in layouts), *zip(layouts, halves, strict=False)]:
        placed = sample.on(backend.device, dtype, layout)
        for a, e in zip(evaluate(operator, placed, exact=True), expected, strict=True):
            rounded = e.to(dtype) if a.is_floating_point() else e
            torch.testing.assert_close(a.cpu().double(), rounded.double(), rtol=0, atol=0, equal_nan=True)


def channels_innermost(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- registration


class _Calls(TorchDispatchMode):
    """Records every call of a registered operator of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zfcuda":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registration(operator: Callable[..., Any], sample: Sample) -> None:
    """opcheck of each registered operator that the call and its gradient make; the public one with gradients."""
    with _Calls() as recorded:
        evaluate(operator, sample)
    calls = recorded.calls
    assert calls
    for number, (func, args) in enumerate(calls):
        differentiable = sample.differentiable and number == 0

        def fresh(value: Any, grad: bool = differentiable) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().requires_grad_(grad and value.is_floating_point())

        torch.library.opcheck(func, tuple(map(fresh, args)))


def check_compiled(operator: Callable[..., Any], sample: Sample) -> None:
    """A compiled call is one graph, and equals the eager one in values, gradients and strides."""
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for c, e in zip(evaluate(compiled, sample), evaluate(operator, sample), strict=True):
        assert torch.equal(c, e) and c.stride() == e.stride()


# ---------------------------------------------------------------- out=


def check_out_convention(operator: Callable[..., Any], sample: Sample) -> None:
    """The same bits in the caller's tensors, whose version counters rise; what does not fit is refused."""

    def listed(results: Any) -> list[Tensor]:
        return list(results) if isinstance(results, tuple) else [results]

    def call(out: Sequence[Tensor]) -> list[Tensor]:
        given = tuple(out) if len(out) > 1 else out[0]
        return listed(operator(*sample.tensors, **sample.options, out=given))

    expected = listed(sample.call(operator))
    assert expected[0].requires_grad
    expected = [e.detach() for e in expected]
    fresh = [torch.full_like(e, 77) for e in expected]
    with pytest.raises(RuntimeError, match="not differentiable"):
        call(fresh)
    with torch.no_grad():
        versions = [t._version for t in fresh]
        written = call(fresh)
        assert all(w is f and torch.equal(f, e) for w, f, e in zip(written, fresh, expected, strict=True))
        assert all(t._version > version for t, version in zip(fresh, versions, strict=True))
        for number, right in enumerate(expected):
            other = torch.contiguous_format if channels_innermost(right) else torch.channels_last
            wrong = {
                "has dtype": right.to(torch.int16),
                "has shape": right[:, :1],
                "is on meta": right.to("meta"),
                "has strides": right.contiguous(memory_format=other),
            }
            for message, value in wrong.items():
                name = rf"out\[{number}\]" if len(expected) > 1 else "out"
                with pytest.raises(RuntimeError, match=f"{name} {message}"):
                    call([*fresh[:number], value, *fresh[number + 1 :]])
        first, *others = sample.tensors
        assert first is not None
        buffer = first.new_empty(max(first.numel(), expected[0].numel()))
        aliases = (buffer.as_strided(t.shape, t.stride()) for t in (first, expected[0]))
        sample = Sample([next(aliases).copy_(first), *others], sample.options)
        with pytest.raises(RuntimeError, match="shares memory"):
            call([next(aliases), *fresh[1:]])


# ---------------------------------------------------------------- examples


def for_all(backend: Any, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int = 100) -> None:
    """``check`` on examples of ``strategy``: fewer on the emulator, whose every thread is a function call."""

    @hypothesis.settings(max_examples=examples // 8 if backend.name == "simt" else examples)
    @hypothesis.given(strategy)
    def run(case: Any) -> None:
        check(case)

    run()


def agree_or_both_refuse(
    operator: Callable[..., Any], rival: Callable[..., Any], sample: Sample, backend: Any, names: Sequence[str]
) -> None:
    """Where torch accepts the arguments the results are equal; where it refuses, so do we, naming an argument."""
    try:
        sample.on(torch.device("cpu"), torch.float64).call(rival)
    except (RuntimeError, ValueError):
        try:
            sample.on(backend.device, torch.float32).call(operator)
        except RuntimeError as error:
            assert any(name in str(error) for name in names), error
        else:
            raise AssertionError(f"torch refuses {sample.options}, zfcuda.ops does not") from None
    else:
        check_exact(operator, rival, sample, backend)
