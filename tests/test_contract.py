"""What every operator promises, on every backend present: one test a property, for all that operators.py declares."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operators import OPERATORS, Declared, table
from oracles import HALVES, LAYOUTS, NATIVE, check_registration, check_values, evaluate, normal
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from zfcuda import core, ops
from zfcuda.ops import _register

ALL = pytest.mark.parametrize("declared", OPERATORS, ids=lambda d: d.name)


def having(select: Callable[[Declared], object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("declared", [d for d in OPERATORS if select(d)], ids=lambda d: d.name)


SAMPLES = pytest.mark.parametrize(
    ("declared", "number"),
    [pytest.param(d, n, id=f"{d.name}-{n}") for d in OPERATORS for n in range(len(d.samples()))],
)
#: One dtype that is computed in itself, and those that are not.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
DIFFERENTIABLE = having(lambda d: d.differentiable)
OTHERS = having(lambda d: not d.differentiable)


def same(one, other) -> None:
    """Equal bits, dtypes and strides."""
    for a, b in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (one, other)), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device


def loss(function):
    return lambda *tensors: function(*tensors).pow(2).sum()


# ---------------------------------------------------------------- strides and batches


@having(lambda d: d.oracle)
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, declared, layout, dtype):
    for sample in declared.samples()[:2]:
        functions = declared.call, declared.oracle_of(dtype), declared.rival
        check_values(*functions, sample, backend.device, dtype, layout)


@DIFFERENTIABLE
@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_the_strides_of_their_tensors(backend, declared, layout, dtype):
    """Which DDP asks of a weight's, and the dtype; and the results follow the first tensor."""
    sample = declared.sample(backend.device, dtype, layout)
    result = sample.call(declared.call)
    results = result if isinstance(result, tuple) else (result,)
    assert all(r.is_contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last)) for r in results)
    gradients = torch.autograd.grad(results[0].sum(), sample.leaves())  # an expanded cotangent
    assert [(g.stride(), g.dtype) for g in gradients] == [(t.stride(), dtype) for t in sample.leaves()]


@having(lambda d: d.unbatched)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_image_is_a_batch_of_one(backend, declared, layout):
    for sample in declared.samples():
        placed = sample.on(backend.device, torch.float32, layout)
        if placed.tensors[0].size(0):
            expected = declared.images(placed, lambda t: t[:1]).call(declared.call)
            image = declared.images(placed, lambda t: t[0])
            image.options = {n: _of_one_image(n, v) for n, v in image.options.items()}
            expected = [e[0] for e in (expected if isinstance(expected, tuple) else (expected,))]
            same(image.call(declared.call), expected)
            if "out" in inspect.signature(declared.call).parameters:
                out = tuple(torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=e.device) for e in expected)
                with torch.no_grad():
                    image.options["out"] = out if len(out) > 1 else out[0]
                    assert image.call(declared.call) is image.options["out"]
                same(out, expected)


def _of_one_image(name, value):
    """A whole size without the batch."""
    return value[1:] if name.endswith("output_size") and value is not None and len(value) == 4 else value


@having(lambda d: d.unbatched and len(d.batched) > 1)
def test_one_image_and_a_batch_do_not_mix(backend, declared):
    sample = declared.sample(backend.device, torch.float32)
    if sum(t is not None and t.dim() == 4 for t in sample.tensors[:2]) < 2:
        pytest.skip("takes one tensor of images here")
    for n in range(2):
        tensors = [t[:1].detach() if m < 2 else t for m, t in enumerate(sample.tensors)]
        tensors[n] = tensors[n][0]
        with pytest.raises(RuntimeError, match="has shape"):
            declared.call(*tensors, **sample.options)


@ALL
def test_there_is_a_sample_without_images(declared):
    assert any(t.size(0) == 0 for s in declared.samples() for t in s.tensors if t is not None)


@ALL
@DTYPES
def test_lazily_negated(backend, declared, dtype):
    """A view whose numbers have another sign than its memory."""
    sample = declared.sample(backend.device, dtype)
    function, tensors = declared.of(sample)
    same(function(torch._neg_view(tensors[0]), *tensors[1:]), function(-tensors[0], *tensors[1:]))


@NATIVE
@ALL
@DTYPES
def test_the_same_bits_with_any_number_of_threads(backend, declared, threads, dtype):
    sample = declared.images(declared.samples()[0], lambda t: torch.cat([t] * 16))
    runs = []
    for count in (1, 2, 2):
        threads(count)
        runs.append(evaluate(declared.call, sample.on(backend.device, dtype)))
    same(runs[1], runs[0])
    same(runs[2], runs[0])


@ALL
def test_deterministic_algorithms(backend, declared):
    sample = declared.sample(backend.device, torch.float32)
    expected = evaluate(declared.call, sample)
    torch.use_deterministic_algorithms(True)
    try:
        same(evaluate(declared.call, sample), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- derivatives


@NATIVE
@DIFFERENTIABLE
def test_gradcheck(backend, declared):
    """First and second derivatives of every sample that has any, against differences."""
    for sample in declared.samples():
        function, tensors = declared.of(sample.on(backend.device, torch.float64))
        if sum(t.numel() for t in tensors) <= 400:
            # Away from ties, where a maximum has no derivative.
            tensors = [(t + 0.01 * normal(*t.shape, seed=7).to(t.device)).requires_grad_() for t in tensors]
            assert torch.autograd.gradcheck(function, tensors)
            assert torch.autograd.gradgradcheck(function, tensors)


@DIFFERENTIABLE
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_second_derivatives_are_torchs(backend, declared, dtype):
    """Of halves too, as torch has them in float64, but for the roundings of the steps to them."""

    def second(call, sample):
        result = sample.call(call)
        result = result[0] if isinstance(result, tuple) else result
        loss = (result / 8).pow(3).sum()  # / 8, so that float16 can hold what comes
        gradients = torch.autograd.grad(loss, sample.leaves(), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), sample.leaves())

    given = declared.sample(torch.device("cpu"), dtype)
    expected = second(declared.rival, given.on(torch.device("cpu"), torch.float64))
    tolerance = 1e-9 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for a, e in zip(second(declared.call, given.on(backend.device, dtype)), expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


@ALL
def test_tensors_without_a_derivative_refuse_one(backend, declared):
    """A gradient of what has none is an error, never zero."""
    sample = declared.samples()[0].on(backend.device, torch.float32)
    function, tensors = declared.of(sample)
    if declared.differentiable:
        assert len(declared.differentiable) == len(tensors)
        return
    with pytest.raises(RuntimeError, match=f"{declared.name} is not differentiable"):
        function(*(t.requires_grad_() for t in tensors)).sum().backward()
    with pytest.raises(RuntimeError, match=f"{declared.name} is not differentiable"):
        grad(loss(function))(*(t.detach() for t in tensors))


@NATIVE
@DIFFERENTIABLE
def test_what_is_needed_later_may_not_be_written(backend, declared):
    """In-place writes are seen by the versions of tensors: the backward pass refuses."""
    function, tensors = declared.of(declared.sample(backend.device))
    leaves = [t.requires_grad_() for t in tensors]

    def kept():
        output = function(*leaves)
        return output, [t for t in output.grad_fn.saved_tensors if t is not None]

    output, saved = kept()
    assert saved and {t._version for t in (output, *saved, *leaves)} == {0}
    output.sum().backward()
    assert {t._version for t in leaves} == {0}
    for n in range(len(saved)):
        output, saved = kept()
        with torch.no_grad():
            saved[n].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        with torch.no_grad():
            saved[n].sub_(1)  # for switches must stay inside their windows


# ---------------------------------------------------------------- torch.func


@NATIVE
@DIFFERENTIABLE
def test_func_grad_and_jacrev(backend, declared):
    function, tensors = declared.of(declared.sample(backend.device))
    every = tuple(range(len(tensors)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(function)(*leaves), leaves)
    for a, e in zip(grad(loss(function), every)(*tensors), expected, strict=True):
        torch.testing.assert_close(a, e)
    function, (first, *rest) = declared.of(declared.images(declared.sample(backend.device), lambda t: t[:1]))
    jacobian = torch.autograd.functional.jacobian(function, (first, *rest))
    for a, e in zip(jacrev(function, every)(first, *rest), jacobian, strict=True):
        torch.testing.assert_close(a, e)
    hessian = torch.autograd.functional.hessian(lambda t: loss(function)(t, *rest), first)
    torch.testing.assert_close(jacrev(jacrev(loss(function)))(first, *rest), hessian)


@ALL
@pytest.mark.parametrize("which", ["first", "second", "all", "innermost"])
def test_vmap(backend, declared, which):
    """Over any of the tensors, in any dimension: as a loop."""
    function, tensors = declared.of(declared.sample(backend.device, torch.float32))
    dims = [0 if which == "all" or n == (which == "second") else None for n in range(len(tensors))]
    if which == "innermost":
        dims = [tensors[0].dim()] + [None] * (len(tensors) - 1)
    if dims == [None] * len(tensors):
        pytest.skip("takes one tensor")
    stacked = [t if d is None else torch.stack([t, 2 * t, -t], d) for t, d in zip(tensors, dims, strict=True)]
    slices = [[t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)] for i in range(3)]
    torch.testing.assert_close(vmap(function, tuple(dims))(*stacked), torch.stack([function(*s) for s in slices]))


@NATIVE
@DIFFERENTIABLE
def test_vmap_and_grad_in_either_order(backend, declared):
    function, tensors = declared.of(declared.sample(backend.device))
    stacked = [torch.stack([t, -t]) for t in tensors]
    expected = torch.stack([grad(loss(function))(*(t[i] for t in stacked)) for i in range(2)])
    torch.testing.assert_close(vmap(grad(loss(function)))(*stacked), expected)
    torch.testing.assert_close(grad(lambda *t: vmap(function)(*t).pow(2).sum())(*stacked), expected)


def _tangents_by_reverse_mode(function, tensors, tangents):
    """The transpose of the gradient, for each tensor by itself and for all together."""
    alone = [
        torch.autograd.functional.jvp(lambda t, n=n: function(*tensors[:n], t, *tensors[n + 1 :]), t, v)[1]
        for n, (t, v) in enumerate(zip(tensors, tangents, strict=True))
    ]
    return [*alone, sum(alone)]


@NATIVE
@SAMPLES
def test_forward_mode(backend, declared, number):
    """By torch.func and by dual tensors, of one tensor and of all: what reverse mode says."""
    if not declared.differentiable:
        pytest.skip("has no derivatives")
    function, tensors = declared.of(declared.samples()[number].on(backend.device, torch.float64))
    tangents = [normal(*t.shape, seed=n).to(t.device) for n, t in enumerate(tensors)]
    expected = _tangents_by_reverse_mode(function, tensors, tangents)
    every = range(len(tensors))
    for moved, e in zip([*([n] for n in every), list(every)], expected, strict=True):
        some = lambda *t, moved=moved: function(*(t[moved.index(n)] if n in moved else tensors[n] for n in every))  # noqa: E731
        primals, directions = tuple(tensors[n] for n in moved), tuple(tangents[n] for n in moved)
        torch.testing.assert_close(jvp(some, primals, directions)[1], e)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(some(*map(forward_ad.make_dual, primals, directions))).tangent
        torch.testing.assert_close(tangent, e)


@NATIVE
@DIFFERENTIABLE
def test_forward_mode_in_any_nesting(backend, declared):
    """Jacobians; second derivatives by the first tensor, and by it and the second, forward over reverse and so on."""
    samples = [s for s in declared.samples() if s.tensors[0].numel() > 16]
    smallest = min(samples, key=lambda s: s.tensors[0].numel()).on(backend.device, torch.float64)
    function, tensors = declared.of(smallest)
    every = tuple(range(len(tensors)))
    for a, e in zip(jacfwd(function, every)(*tensors), jacrev(function, every)(*tensors), strict=True):
        torch.testing.assert_close(a, e)
    first, *rest = tensors
    cubes = lambda *t: function(*t).pow(3).sum()  # noqa: E731
    hessians = torch.autograd.functional.hessian(cubes, tuple(tensors))
    for outer, inner in ((jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacfwd)):
        for n in every[:2]:
            torch.testing.assert_close(outer(inner(cubes, n))(first, *rest), hessians[n][0])
    stacked = torch.stack([first, -first])
    along = jvp(lambda t: vmap(lambda u: function(u, *rest))(t), (stacked,), (stacked,))[1]
    expected = torch.stack([jvp(lambda t: function(t, *rest), (t,), (t,))[1] for t in stacked])
    torch.testing.assert_close(along, expected)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: jvp(lambda u: function(u, *rest), (t,), (t,))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(first), expected[0])


@NATIVE
@OTHERS
def test_forward_mode_is_refused(backend, declared):
    """Never a silent zero, whichever way a tangent comes in."""
    function, tensors = declared.of(declared.sample(backend.device, torch.float32))
    first, *rest = tensors

    def dual():
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(first, first), *rest)

    ways = [
        dual,
        lambda: jvp(lambda t: function(t, *rest), (first,), (first,)),
        lambda: jacfwd(function)(*tensors),
        lambda: jvp(lambda t: vmap(lambda u: function(u, *rest))(t), (first[None],), (first[None],)),
    ]
    for way in ways:
        with pytest.raises(RuntimeError, match=f"{declared.name} has no forward-mode derivative"):
            way()
    torch.compiler.reset()
    compiled = torch.compile(lambda t: jvp(lambda u: function(u, *rest), (t,), (t,)), backend="aot_eager")
    with pytest.raises(Exception, match=f"{declared.name} has no forward-mode derivative"):
        compiled(first)


@NATIVE
@ALL
def test_tangents_of_other_tensors(backend, declared):
    """… change nothing."""
    function, tensors = declared.of(declared.sample(backend.device, torch.float32))
    expected = function(*tensors)
    with forward_ad.dual_level():
        same(function(*tensors), expected)


# ---------------------------------------------------------------- tracing


@NATIVE
@SAMPLES
def test_registration(backend, declared, number):
    """opcheck of every registered operator that the call and its gradients make."""
    for dtype in [torch.float32] if number else [torch.float32, *HALVES]:
        check_registration(declared.call, declared.samples()[number].on(backend.device, dtype))


@NATIVE
@ALL
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.float32), ("contiguous", torch.bfloat16)],
    ids=str,
)
def test_compiles_to_one_graph(backend, declared, layout, dtype):
    """For batches of two sizes: values, gradients and strides of the eager call."""
    for sample in declared.samples() if dtype == torch.float32 else declared.samples()[:1]:
        torch.compiler.reset()
        compiled = torch.compile(declared.call, fullgraph=True, dynamic=True, backend="aot_eager")
        for twice in (sample, declared.images(sample, lambda t: torch.cat([t, t]))):
            placed = twice.on(backend.device, dtype, layout)
            same(evaluate(compiled, placed), evaluate(declared.call, placed))


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@NATIVE
@ALL
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exports(backend, declared, strict):
    function, tensors = declared.of(declared.sample(backend.device, torch.float32))
    program = torch.export.export(_Module(function), tuple(tensors), strict=strict)
    assert any(f"zfcuda.{declared.name}" in str(node.target) for node in program.graph.nodes)
    same(program.module()(*tensors), function(*tensors))


@NATIVE
@ALL
def test_traces_by_make_fx_and_symbolically(backend, declared):
    function, tensors = declared.of(declared.sample(backend.device, torch.float32))
    # A function that holds tensors of its own, not traced ones, has no fake form.
    for mode in ("real", "fake", "symbolic") if not _holds_tensors(declared, backend) else ("real",):
        graph = make_fx(function, tracing_mode=mode)(*tensors)
        assert any(f"zfcuda.{declared.name}" in str(node.target) for node in graph.graph.nodes)
        same(graph(*tensors), function(*tensors))
    of_as_many = {1: lambda a: function(a), 2: lambda a, b: function(a, b), 3: lambda a, b, c: function(a, b, c)}
    traced = torch.fx.symbolic_trace(of_as_many[len(tensors)])
    assert any(node.target is declared.call for node in traced.graph.nodes)
    same(traced(*tensors), function(*tensors))


@ALL
@DTYPES
def test_fake_and_meta_agree_with_the_call(declared, dtype):
    """Sizes, dtypes and strides without data."""
    for layout in ("contiguous", "channels_last"):
        sample = declared.sample(torch.device("cpu"), dtype, layout)
        expected = sample.call(declared.call)
        with FakeTensorMode() as mode:
            fake = copy.copy(sample)
            fake.tensors = [t if t is None else mode.from_tensor(t) for t in sample.tensors]
            fake.options = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
            faked = fake.call(declared.call)
        for made in (faked, sample.on(torch.device("meta"), dtype, layout).call(declared.call)):
            for m, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (made, expected)), strict=True):
                assert (m.shape, m.dtype, m.stride()) == (e.shape, e.dtype, e.stride())


@ALL
def test_the_profiler_sees_it_by_name(declared):
    sample = declared.sample(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for _ in range(2):
            sample.call(declared.call)
        with torch.profiler.profile() as profile:
            sample.call(declared.call)
    assert [e.count for e in profile.key_averages() if e.key == f"zfcuda::{declared.name}"] == [1]


# ---------------------------------------------------------------- autocast


@ALL
@pytest.mark.parametrize("active", HALVES, ids=str)
def test_autocast(declared, active):
    """Convolutions compute in the active dtype, as torch's do, the others in their tensors'; float64 stays."""
    device = torch.device("cpu")
    for dtype in core.DTYPES:
        expected = active if declared.casts and dtype != torch.float64 else dtype
        function, tensors = declared.of(declared.sample(device, dtype))
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            torch.compiler.reset()
            with torch.autocast("cpu", dtype=active):
                result = call(*tensors)
            assert result.dtype == expected
            torch.testing.assert_close(result, function(*(t.to(expected) for t in tensors)), rtol=0, atol=0)


@having(lambda d: d.casts and d.differentiable)
def test_gradients_come_back_through_autocast(declared):
    """In the dtype of their tensors, as those of the tensors converted by hand."""
    sample = declared.sample(torch.device("cpu"), torch.float32)
    function, tensors = declared.of(sample)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(*leaves)
    expected = torch.autograd.grad(function(*(t.bfloat16() for t in leaves)).sum(), leaves)
    same(torch.autograd.grad(result.sum(), leaves), expected)


# ---------------------------------------------------------------- eager calls without gradients


def _repeated(declared: Declared):
    """The memo's own way to repeat a call, or None where every call goes through the dispatcher."""
    cells = [c.cell_contents for c in declared.call.__closure__ or ()]
    return next((c for c in cells if getattr(c, "__name__", "") == "recall"), None)


REPEATED = having(_repeated)
FROM_2_10 = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="calls are repeated from torch 2.10 on"
)


@FROM_2_10
def test_what_is_repeated():
    assert {d.name for d in OPERATORS if not _repeated(d)} == {"crop_windows"}  # which reads the values of a tensor


@contextlib.contextmanager
def _checked():
    """No call is repeated."""
    _register.GUARDS.append(lambda: True)
    try:
        yield
    finally:
        _register.GUARDS.pop()


@SAMPLES
@DTYPES
def test_a_repeated_call_gives_the_same_bits(declared, number, dtype):
    """The first call is checked, the second repeated, and a fresh one checked: in no_grad and in inference mode."""
    recall = _repeated(declared)
    for layout in ("contiguous", "channels_last"):
        sample = declared.samples()[number].on(torch.device("cpu"), dtype, layout)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                first = sample.call(declared.call)
                second = sample.call(declared.call)
                with _checked():
                    checked = sample.call(declared.call)
                same(second, first)
                same(second, checked)
        if recall and layout == "contiguous" and checked_numel(checked):
            with torch.no_grad():
                assert recall(*sample.tensors, **sample.options) is not None


def checked_numel(result) -> int:
    return sum(r.numel() for r in (result if isinstance(result, tuple) else (result,)))


@having(lambda d: d.tiny)
@FROM_2_10
def test_overhead_is_at_most_torchs(declared, threads):
    """The median over rounds of the ratio of two times that were taken together."""
    threads(1)

    def seconds(call):
        start = time.perf_counter()
        for _ in range(50):
            call()
        return time.perf_counter() - start

    ours, theirs = declared.tiny
    ratios = [seconds(ours) / seconds(theirs) for _ in range(200)]
    assert statistics.median(ratios) <= 1


@REPEATED
def test_not_repeated_where_torch_must_see_the_call(declared):
    """Each condition of a plain call, broken by itself."""
    recall = _repeated(declared)
    sample = declared.sample(torch.device("cpu"), torch.float32)
    call = lambda: recall(*sample.tensors, **sample.options)  # noqa: E731
    if declared.differentiable:
        assert call() is None  # gradients are wanted
    with torch.no_grad():
        sample.call(declared.call)
        assert call() is not None
        inside = [
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.device("cpu"),
            torch.autocast("cpu"),
            torch.profiler.profile(),
            forward_ad.dual_level(),
        ]
        for context in inside:
            with context:
                assert call() is None, context
        assert vmap(lambda t: torch.tensor(float(call() is None)) + 0 * t.sum())(torch.ones(2)).all()
        sample.tensors[0] = torch._neg_view(sample.tensors[0])
        assert call() is None
        sample.tensors[0] = sample.tensors[0].to("meta")
        assert call() is None


@REPEATED
def test_repeated_for_equal_arguments_only(declared):
    """Arguments that compare equal but are of another type are checked again."""
    with torch.no_grad():
        sample = declared.sample(torch.device("cpu"), torch.float32)
        sample.call(declared.call)
        recall = _repeated(declared)
        numbers = [n for n, v in sample.options.items() if isinstance(v, int) and not isinstance(v, bool)]
        for name in numbers:
            for other in (float(sample.options[name]), bool(sample.options[name])):
                assert recall(*sample.tensors, **(sample.options | {name: other})) is None
        longer = declared.images(sample, lambda t: torch.cat([t] * 7))
        assert longer.call(recall) is None
        longer.call(declared.call)
        assert longer.call(recall) is not None
        for dtype in set(core.DTYPES) - {torch.float32}:
            assert longer.on(torch.device("cpu"), dtype).call(recall) is None


def _with_out(declared: Declared):
    """A call of the first sample with ``out``, without gradients, and its tensors to write."""
    sample = declared.sample(torch.device("cpu"), torch.float32)
    results = sample.call(declared.call)
    outs = [torch.empty_like(r.detach()) for r in (results if isinstance(results, tuple) else (results,))]
    sample.options["out"] = tuple(outs) if len(outs) > 1 else outs[0]
    return torch.no_grad()(lambda: sample.call(declared.call)), outs, sample


WRITES = having(lambda d: "out" in inspect.signature(d.call).parameters)


@WRITES
@FROM_2_10
def test_a_repeated_call_writes_out(declared, monkeypatch):
    """Without a check: the same bits, counted as a write, unless autograd or another tensor's memory is in the way."""
    call, outs, sample = _with_out(declared)
    assert call() is sample.options["out"] or all(map(torch.equal, call(), outs))
    expected = [o.clone() for o in outs]
    for out in outs:
        out.fill_(77)
    versions = [o._version for o in outs]
    with monkeypatch.context() as patch:
        patch.setattr(core, "run", lambda *_: pytest.fail("checked again"))
        call()
    same(outs, expected)
    assert all(o._version == v + 1 for o, v in zip(outs, versions, strict=True))
    with pytest.raises(RuntimeError, match="not differentiable"), torch.enable_grad():
        sample.call(declared.call)
    shared = sample.tensors[0].new_empty(max(sample.tensors[0].numel(), outs[0].numel()))
    sample.tensors[0], outs[0] = (shared.as_strided(t.shape, t.stride()) for t in (sample.tensors[0], outs[0]))
    sample.options["out"] = tuple(outs) if len(outs) > 1 else outs[0]
    with pytest.raises(RuntimeError, match="shares memory"):
        call()


@WRITES
def test_an_impossible_out_is_refused_after_calls_that_were_right(declared):
    """None for results, one in a list: their arguments are those of calls that the memo knows."""
    call, outs, sample = _with_out(declared)
    call()
    right = sample.options.pop("out")
    call()
    for wrong in ([], (), [right] if len(outs) == 1 else outs[:1]):
        sample.options["out"] = wrong
        with pytest.raises(TypeError, match="out is a"):
            call()


@WRITES
@FROM_2_10
def test_out_is_written_in_less_than_half_the_time_of_a_checked_call(declared, threads):
    threads(1)
    call, _, _ = _with_out(declared)

    def seconds():
        start = time.perf_counter()
        for _ in range(20):
            call()
        return time.perf_counter() - start

    ratios = []
    for _ in range(100):
        repeated = seconds()
        with _checked():
            ratios.append(repeated / seconds())
    assert statistics.median(ratios) <= 0.5


@ALL
def test_several_threads_at_once(declared):
    samples = [declared.sample(torch.device("cpu"), torch.float32) for _ in range(16)]
    with torch.no_grad(), concurrent.futures.ThreadPoolExecutor(8) as pool:
        expected = samples[0].call(declared.call)

    def repeat(sample):
        with torch.no_grad():
            return [sample.call(declared.call) for _ in range(50)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for results in pool.map(repeat, samples):
            for result in results:
                same(result, expected)


# ---------------------------------------------------------------- documents


def test_the_table_of_properties_is_up_to_date():
    """``make operators`` writes it."""
    assert (Path(__file__).parents[1] / "docs/operators.md").read_text() == table()


def test_every_operator_is_declared():
    others = {"WindowDeconv2d", "indices_to_switches", "switches_to_indices", "renormalize_filters_"}
    assert {d.name for d in OPERATORS} == set(ops.__all__) - others


def _holds_tensors(declared: Declared, backend) -> bool:
    """Whether the sample has tensors besides those that are traced."""
    sample = declared.sample(backend.device)
    others = [t for t in (*sample.tensors, *sample.options.values()) if isinstance(t, Tensor)]
    return len(others) > len(declared.of(sample)[1])
