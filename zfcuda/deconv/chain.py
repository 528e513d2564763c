"""A model as a chain of steps, or a clear refusal.

The deconvnet goes back through a network layer by layer, so it must know the order of the layers.
That order is known for `torch.nn.Sequential` (nested as you like, modules used twice included); `zfcuda.models.ZFNet`
is one. Anything else is refused by name, with the reason, rather than projected wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from zfcuda import nn
from zfcuda.deconv.receptive_field import Window

__all__ = ["Step", "chain"]


@dataclass(frozen=True)
class Step:
    """One layer of the chain.

    ``rectified`` says that a ReLU follows a convolution or a linear layer; their map is the one after it.
    """

    name: str
    kind: str
    module: Any  # a torch.nn.Module, with the attributes of its kind
    window: Window | None = None
    rectified: bool = False
    aliases: tuple[str, ...] = ()


_T = torch.nn

KINDS: dict[Any, str] = {
    nn.ConvReLU2d: "conv",
    _T.Conv2d: "conv",
    _T.ReLU: "relu",
    nn.MaxPool2d: "pool",
    _T.MaxPool2d: "pool",
    nn.LocalResponseNorm: "norm",
    _T.LocalResponseNorm: "norm",
    _T.AdaptiveAvgPool2d: "identity",  # only where it changes nothing: checked with the image
    _T.AdaptiveMaxPool2d: "identity",
    _T.Flatten: "flatten",
    _T.Linear: "linear",
    # Nothing to do in eval semantics: other names of the map before them.
    _T.Identity: "alias",
    _T.Dropout: "alias",
    _T.Dropout1d: "alias",
    _T.Dropout2d: "alias",
    _T.Dropout3d: "alias",
    _T.AlphaDropout: "alias",
    _T.FeatureAlphaDropout: "alias",
}

REASONS: tuple[tuple[tuple[type, ...], str], ...] = (
    (
        (_T.modules.batchnorm._BatchNorm,),
        (
            "batch normalisation has no step in the paper's deconvnet; "
            "fold it into the convolution before it (torch.nn.utils.fusion.fuse_conv_bn_eval)"
        ),
    ),
    (
        (_T.AvgPool2d, _T.LPPool2d, _T.FractionalMaxPool2d),
        "only max-pools with a regular grid have switches to unpool by; replace it by MaxPool2d",
    ),
    ((_T.Softmax, _T.LogSoftmax, _T.Softmax2d), "probabilities are not projected; leave it out and project the logits"),
    (
        (_T.ReLU6, _T.LeakyReLU, _T.PReLU, _T.ELU, _T.GELU, _T.SiLU, _T.Sigmoid, _T.Tanh, _T.Hardtanh, _T.Hardswish),
        "the paper's gates are defined for ReLU only",
    ),
)


def chain(model: torch.nn.Module) -> tuple[Step, ...]:
    """The steps of ``model``, in order.

    Raises
    ------
    TypeError
        If ``model`` is not a module, or holds one that cannot be followed; the message names it and says why.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    steps: list[Step] = []
    flat = False
    for name, module in _leaves(model, ""):
        step = _step(name, module)
        flat = _check_rank(step, flat)
        last = steps[-1] if steps else None
        joins = step.kind == "relu" and last is not None and last.kind in ("conv", "linear") and not last.rectified
        if last is not None and (step.kind == "alias" or joins):
            steps[-1] = replace(last, aliases=(*last.aliases, name), rectified=last.rectified or joins)
        elif step.kind != "alias":
            steps.append(step)
    if not steps:
        raise TypeError(f"model is a {type(model).__name__} without layers; there is nothing to project")
    return tuple(steps)


def _leaves(module: Any, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
    if type(module).forward is _T.Sequential.forward:
        # Not named_children(): that leaves out a module's second use.
        for key, child in module._modules.items():
            assert child is not None
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name or type(module).__name__, module


def _step(name: str, module: Any) -> Step:
    cls: Any = next((c for c in type(module).__mro__ if c in KINDS), None)
    if cls is None or type(module).forward is not cls.forward:
        raise _refusal(name, module, _reason(module, cls))
    kind = KINDS[cls]
    if kind == "conv":
        return Step(name, kind, module, _conv_window(name, module), rectified=cls is nn.ConvReLU2d)
    if kind == "pool":
        for option in ("return_indices", "return_switches"):
            if getattr(module, option, False):
                raise _refusal(name, module, f"{option}=True makes it return two tensors; the deconvnet keeps its own")
        stride = module.kernel_size if module.stride is None else module.stride
        window = Window(
            _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(module.dilation), module.ceil_mode
        )
        return Step(name, kind, module, window)
    if kind == "flatten" and (module.start_dim, module.end_dim) != (1, -1):
        raise _refusal(name, module, "it must flatten everything but the batch (start_dim=1, end_dim=-1)")
    return Step(name, kind, module)


def _check_rank(step: Step, flat: bool) -> bool:
    """Whether the map is (N, features) after the step; maps must be flattened exactly before linear layers."""
    if step.kind == "linear" and not flat:
        raise _refusal(step.name, step.module, "a linear layer needs a Flatten before it")
    if step.kind in ("conv", "pool", "norm", "identity", "flatten") and flat:
        raise _refusal(step.name, step.module, "its input has no height and width: they were flattened before it")
    return flat or step.kind == "flatten"


def _conv_window(name: str, conv: Any) -> Window:
    if conv.padding_mode != "zeros":
        raise _refusal(name, conv, f"padding_mode={conv.padding_mode!r} has no transposed convolution; use 'zeros'")
    kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
    padding = conv.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(t % 2 for t in total):
            raise _refusal(name, conv, "padding='same' with an even kernel pads one side more; pad explicitly")
        padding = tuple(t // 2 for t in total)
    return Window(kernel, _pair(conv.stride), _pair(padding), dilation)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _reason(module: torch.nn.Module, cls: type | None) -> str:
    if cls is not None:
        return f"it overrides the forward() of {cls.__name__}, so what it computes is not known"
    for types, reason in REASONS:
        if isinstance(module, types):
            return reason
    if next(module.children(), None) is not None:
        return "the order of its layers is hidden in its forward(); write it as torch.nn.Sequential"
    return "it is none of " + ", ".join(sorted({c.__name__ for c in KINDS}))


def _refusal(name: str, module: torch.nn.Module, reason: str) -> TypeError:
    return TypeError(f"DeconvNet cannot go back through {name} ({type(module).__name__}): {reason}")
