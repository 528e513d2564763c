"""How an operator meets torch: :class:`Operator` registers it once, :func:`entry` makes the function that users call.

A call takes one of two ways. The registered operator is the rule: torch's dispatcher brings it gradients, tracing,
vmap, the profiler and everything else. An eager call of plain tensors without gradients, which has been made before
with arguments of the same kind, is repeated by a memo of the core (``csrc/memo.h``) instead: the dispatcher would take
longer than the kernel of a small tensor. :data:`GUARDS` says what a plain call is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from zfcuda import core
from zfcuda.ops._arrays import on_arrays
from zfcuda.ops._out import Result, check_apart, meeting, outputs, refuse_gradients
from zfcuda.ops._signature import Signature

NAMESPACE = "zfcuda"

#: An operator lives as long as this.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Function = TypeVar("Function", bound=Callable[..., Any])

#: What an implementation returns: a generator that yields once.
OneResult = Generator[Result, Tensor, None]
TwoResults = Generator[tuple[Result, Result], tuple[Tensor, Tensor], None]
ThreeResults = Generator[tuple[Result, Result, Result], tuple[Tensor, Tensor, Tensor], None]
FourResults = Generator[tuple[Result, Result, Result, Result], tuple[Tensor, Tensor, Tensor, Tensor], None]
NoResult = Generator[None, None, None]
_RETURNS = {
    OneResult: Tensor,
    TwoResults: tuple[Tensor, Tensor],
    ThreeResults: tuple[Tensor, Tensor, Tensor],
    FourResults: tuple[Tensor, Tensor, Tensor, Tensor],
    NoResult: None,
}


class Operator:
    """An implementation, registered under a name of the namespace ``zfcuda``. Calling it calls the dispatcher.

    Parameters
    ----------
    name
        In ``torch.ops.zfcuda`` and in profiles.
    implementation
        A generator that checks its arguments, yields what its results will be, is sent tensors for them, and writes
        these: dense ones of the CPU or of CUDA. For tensors without data it is left at its yield. Its type hints are
        the schema, but for its NamedTuples (:class:`Signature`), which calls, contexts and tangents have too.
    batched
        Names of the tensors whose first dimension is the batch, if it is also the first dimension of every result
        and images do not meet: vmap then adds its dimension to the batch. Otherwise it calls the operator in a loop.
    mutates
        Names of the tensors that the implementation writes; their versions go up, so that autograd sees it. Such an
        operator has no gradients and no vmap.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable[..., Generator[Any, Any, None]],
        batched: Sequence[str] = (),
        mutates: Sequence[str] = (),
    ) -> None:
        self._implementation, self._signature = implementation, Signature(implementation)
        schema = self._signature.schema(_RETURNS[self._signature.returns], mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._name, self.name = name, f"{NAMESPACE}::{name}"
        _LIBRARY.impl(name, self._compute, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(self.name, lambda *args: _allocated(next(self._begun(args))), lib=_LIBRARY)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._function: Any = None
        self._writing: Operator | None = None
        self._batched, self._mutated = ([n in some for n in self._signature.names] for some in (batched, mutates))
        if mutates:
            _LIBRARY.impl(name, self._count_writes, "ADInplaceOrView", with_keyset=True)
        else:
            torch.library.register_vmap(self.name, functools.partial(self._vmap, self.overload), lib=_LIBRARY)

    def __call__(self, *args: Any) -> Any:
        return self._call(*self._signature.flat(args))

    def _call(self, *args: Any) -> Any:
        if self._function is not None and _transforming():
            return self._function.apply(*args)
        return self.overload(*args)

    def _begun(self, args: Sequence[Any]) -> Generator[Any, Any, None]:
        return self._implementation(*self._signature.grouped(args))

    def _compute(self, *args: Any) -> Any:
        work = self._begun(args)
        results = _allocated(next(work))
        _finish(work, results)
        return results

    def register_out(self, *names: str, **constants: Any) -> None:
        """Register NAME_out, which :meth:`into` calls: it writes into tensors of these ``names``, its last arguments.

        ``constants`` are the last arguments of this operator, and none of the other's. Results behind those that have
        names are dropped.
        """
        count = len(self._signature.parameters) - len(constants)
        parameters = self._signature.parameters[:count]
        labels = ["out"] if len(names) == 1 else [f"out[{n}]" for n in range(len(names))]

        def write(*args: Any) -> NoResult:
            given, outs = args[:count], args[count:]
            work = self._implementation(*given, **constants)
            wanted = next(work)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for label, out, result in zip(labels, outs, wanted, strict=False):
                result.check(label, out)
            yield
            inputs = {p.name: a for p, a in zip(parameters, given, strict=True) if isinstance(a, Tensor)}
            check_apart(dict(zip(labels, outs, strict=True)), inputs)
            results = (*outs, *_allocated(wanted[len(outs) :]))
            _finish(work, results if len(results) > 1 else results[0])

        written = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for n in names]
        signature = inspect.Signature([*parameters, *written], return_annotation=NoResult)
        write.__signature__ = signature  # type: ignore[attr-defined]
        self._writing = Operator(f"{self._name}_out", write, mutates=names)

    def into(self, out: Any, *args: Any) -> Any:
        """``out``, a tensor or a tuple of them, after the results for these arguments have been written into it."""
        assert self._writing is not None
        tensors = outputs(out, sum(self._writing._mutated))
        refuse_gradients(self._name, *(a for a in args if isinstance(a, Tensor)), *tensors)
        self._writing(*args, *tensors)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., Any] | None = None,
        tangent: Callable[..., Any] | None = None,
    ) -> None:
        """As ``torch.library.register_autograd``, whose gradients torch.func refuses, and with a forward mode.

        ``backward`` gets None for a result that nothing depends on, unless there is no other; what it returns may end
        at the last gradient. ``tangent(inputs, results, tangents)`` gives the tangents of the results for those of the
        inputs, one for each argument of the schema; None is zero.
        """

        def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            if setup_context:
                setup_context(ctx, self._signature.grouped(inputs), output)
            if tangent and forward_ad._current_level >= 0:
                values, ctx.structure = pytree.tree_flatten((inputs, output))
                ctx.save_for_forward(*(v if isinstance(v, Tensor) else None for v in values))
                ctx.constants_of_tangent = [None if isinstance(v, Tensor) else v for v in values]

        def pull_back(ctx: Any, *grads: Any) -> Any:
            given = () if all(g is None for g in grads) else backward(ctx, *grads)
            given = given if isinstance(given, tuple) else (given,)
            return *given, *(None,) * (len(ctx.needs_input_grad) - len(given))

        def push_forward(ctx: Any, *tangents: Any) -> Any:
            if tangent is None:
                self._refuse_tangents()
            # torch has switched tangents off, of this level as well as of those around it, which need them.
            with forward_ad._set_fwd_grad_enabled(True):
                primals = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
                values = [c if t is None else t for c, t in zip(ctx.constants_of_tangent, primals, strict=True)]
                inputs, results = pytree.tree_unflatten(values, ctx.structure)
                moved = tangent(self._signature.grouped(inputs), results, tangents)
                return pytree.tree_map(_or_zero, moved, results)

        methods: dict[str, Callable[..., Any]] = {
            "forward": self._below_autograd,
            "setup_context": prepare,
            "backward": pull_back,
            "jvp": push_forward,
            "vmap": functools.partial(self._vmap, self._call),
        }
        names = {name: staticmethod(method) for name, method in methods.items()}
        self._function = type(self.name.replace("::", "_"), (torch.autograd.Function,), names)

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        # Below autograd tangents would be lost in silence, that is, zero.
        dual = torch._C._is_fwd_grad_enabled() and forward_ad._current_level >= 0
        dual = dual and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        if dual or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            if self._function is None:
                if dual:
                    self._refuse_tangents()
                raise RuntimeError(
                    f"{self.name} has no gradient, but got a tensor that requires one; call it under torch.no_grad()"
                )
            return self._function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _count_writes(self, keyset: Any, *args: Any) -> Any:
        """Kernels write memory that torch does not see them write."""
        for tensor, mutated in zip(args, self._mutated, strict=True):
            if mutated and tensor is not None:
                torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def _refuse_tangents(self) -> NoReturn:
        raise RuntimeError(
            f"{self.name} has no forward-mode derivative, but got a tensor with a tangent; go backwards: "
            "torch.func.vjp, torch.func.jacrev, torch.autograd.functional.jvp"
        )

    def _vmap(self, call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mapped = [isinstance(a, Tensor) and d is not None for a, d in zip(args, in_dims, strict=True)]
        moved = [a.movedim(d, 0) if m else a for a, d, m in zip(args, in_dims, mapped, strict=True)]
        size = info.batch_size
        if all(b or not m for b, m in zip(self._batched, mapped, strict=True)):
            tensors = [b and isinstance(a, Tensor) for a, b in zip(args, self._batched, strict=True)]
            folded = [
                (a if m else a.expand(size, *a.shape)).flatten(0, 1) if t else a
                for a, m, t in zip(moved, mapped, tensors, strict=True)
            ]
            results = pytree.tree_map(lambda r: r.unflatten(0, (size, r.size(0) // size)), call(*folded))
        else:
            one_by_one = [call(*(a[i] if m else a for a, m in zip(moved, mapped, strict=True))) for i in range(size)]
            results = pytree.tree_map(lambda *r: torch.stack(r), *one_by_one)
        return results, pytree.tree_map(lambda _: 0, results)


def _allocated(wanted: Result | tuple[Result, ...] | None) -> Any:
    if isinstance(wanted, tuple):
        return tuple(map(Result.allocate, wanted))
    return wanted and wanted.allocate()


def _finish(work: Generator[Any, Any, None], results: Any) -> None:
    try:
        work.send(results)
    except StopIteration:
        return
    raise AssertionError("an implementation yields once")


def _or_zero(tangent: Tensor | None, result: Tensor) -> Tensor | None:
    """A tangent that torch takes: None is for integers alone."""
    return torch.zeros_like(result) if tangent is None and result.is_floating_point() else tangent


def operator(
    name: str, batched: Sequence[str] = (), mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Generator[Any, Any, None]]], Operator]:
    """Decorator: :class:`Operator` of the decorated implementation."""
    return lambda implementation: Operator(name, implementation, batched, mutates)


def not_differentiable(operator: Operator, name: str, remedy: str) -> None:
    """Make ``operator``, which computes ``name``, refuse a backward pass through its results.

    Inputs that require gradients are welcome: a network's weights do.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"zfcuda.ops.{name} is not differentiable, but a gradient was asked for; {remedy}")

    operator.register_autograd(backward)


def _transforming() -> bool:
    """Whether a transform of torch.func or forward mode is active; the compiler traces neither question."""
    if is_dynamo_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def derivable(*tensors: Tensor | None) -> bool:
    """Whether derivatives by these may be asked for of what is computed from them now."""
    return _transforming() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


# ---------------------------------------------------------------- what users call

#: A call is plain if each of these returns something false: no dispatch or function mode, no transform of
#: torch.func, no profiler, no tracing, no autocast. The memo adds that there are no forward-mode derivatives, and that
#: tensors are exactly Tensor or Parameter, strided, on the CPU or CUDA, and that nobody asks for their gradients.
GUARDS: list[Callable[[], Any]] = [
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    _functorch.peek_interpreter_stack,
    torch.autograd._profiler_enabled,
    torch._C._is_tracing,
    torch._C._is_any_autocast_enabled,
]


def entry(
    *, casts: bool = False, repeats: bool = True, images: Sequence[str] = (), whole: str = ""
) -> Callable[[Function], Function]:
    """Decorator of the function that users call, which checks types and calls an :class:`Operator`.

    It may be called with arrays in the place of all tensors. What it writes, ``out`` or, where its name ends in ``_``,
    its first tensor, is never converted to another dtype.

    Parameters
    ----------
    casts
        Autocast converts the tensors to its active dtype, as it does for torch's convolutions.
    repeats
        Plain calls may be repeated from a memo: the values of tensors change nothing but through the kernels that run,
        and through :func:`zfcuda.core.find`.
    images
        Names of the tensors that may be one image, (channels, height, width), all of them at once: the call is then
        that of a batch of one, results and ``out`` without the batch.
    whole
        Name of the argument that may be the shape of such an image.
    """

    def decorate(function: Function) -> Function:
        names = [*inspect.signature(function).parameters]
        in_place = function.__name__.endswith("_")
        memo = core.memo(GUARDS) if repeats and not in_place else None
        recall = memo and memo.recall

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if recall is None or is_dynamo_compiling():
                return ordinary(args, kwargs)
            if kwargs.get("out") is not None:
                return _written(memo, ordinary, args, kwargs)
            known = recall(*args, **kwargs)
            return _first_time(memo, ordinary, args, kwargs) if known is None else known

        def ordinary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            arguments = (*args, *kwargs.values())
            if has_torch_function(arguments):
                return handle_torch_function(call, arguments, *args, **kwargs)
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            if not tensors:
                return on_arrays(batched, args, kwargs)
            device = tensors[0].device.type
            if casts and device in core.BACKENDS and torch.is_autocast_enabled(device):
                to = functools.partial(_autocast, torch.get_autocast_dtype(device))
                named = {name: value if name == "out" else to(value) for name, value in kwargs.items()}
                return batched(*map(to, args), **named)
            return batched(*args, **kwargs)

        @functools.wraps(function)
        def batched(*args: Any, **kwargs: Any) -> Any:
            given = [*zip(names[: len(args)], args, strict=False), *kwargs.items()]  # torch 2.6 traces no uneven zip
            those = [value for name, value in given if name in images and value is not None]
            single = len(those) > 0 and all(isinstance(v, Tensor) and v.dim() == 3 for v in those)
            if not single or len(args) > len(names):
                return function(*args, **kwargs)
            to = functools.partial(_batch_of_one, images, whole)
            results = call(*map(to, names, args), **{name: to(name, value) for name, value in kwargs.items()})
            out = kwargs.get("out")
            return pytree.tree_map(lambda r: r.squeeze(0), results) if out is None else out

        return cast(Function, call)

    return decorate


def _autocast(active: torch.dtype, value: Any) -> Any:
    """``value`` in the active dtype, if it is a floating tensor; float64 is left alone, as torch does."""
    converts = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(active) if converts else value


def _batch_of_one(images: Sequence[str], whole: str, name: str, value: Any) -> Any:
    """An argument of a call of one image as that of a batch."""
    if name == "out" and isinstance(value, (tuple, list)):
        return tuple(_batch_of_one(images, whole, name, v) for v in value)
    if name in (*images, "out"):
        return value.unsqueeze(0) if isinstance(value, Tensor) else value
    return (1, *value) if name == whole and isinstance(value, (tuple, list)) and len(value) == 3 else value


def _first_time(memo: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call, and let the memo repeat it if it is plain and nothing but kernels computed its results."""
    key = memo.key(*args, **kwargs)
    if key is None:
        return function(args, kwargs)
    with core.recording() as record:
        result = function(args, kwargs)
    record.teach(memo, key, (*args, *kwargs.values()), result)
    return result


def _written(memo: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call with ``out``, or let the memo repeat it, for which tensors to be written are arguments like others.

    It does not see whether they share memory, nor does torch see that they are written.
    """
    out = kwargs["out"]
    several = isinstance(out, (tuple, list))
    outs = {f"out[{n}]": value for n, value in enumerate(out)} if several else {"out": out}
    rest = {name: value for name, value in kwargs.items() if name != "out"}
    key = memo.key(*args, **rest, **outs)
    if key is None or not outs or not all(isinstance(value, Tensor) for value in outs.values()):
        return function(args, kwargs)
    inputs = {str(n): a for n, a in enumerate((*args, *rest.values())) if isinstance(a, Tensor)}
    if not meeting(outs, inputs) and memo.recall(*args, **rest, **outs) is not None:
        torch.autograd.graph.increment_version(outs.values())
        return out if isinstance(out, Tensor) else tuple(out)
    with core.recording() as record:
        result = function(args, kwargs)
    record.teach(memo, key, (*args, *rest.values(), *outs.values()), (), outs.values())
    return result
