"""What is known of layers: which modules and functions, as what; and why others are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from zfcuda import nn
from zfcuda.deconv.receptive_field import Window

__all__ = [
    "ARITHMETIC",
    "COPIES",
    "FUNCTIONS",
    "KINDS",
    "PASSIVE",
    "is_layer",
    "objections",
    "reason",
    "refuse",
    "window",
]

_T = torch.nn
_PARAMETRIZATIONS = "weight_norm or spectral_norm of torch.nn.utils.parametrizations"

#: Modules by what they are to the deconvnet. "alias": nothing to do in evaluation mode.
KINDS: dict[Any, str] = {
    nn.ConvReLU2d: "conv",
    _T.Conv2d: "conv",
    _T.Linear: "linear",
    _T.ReLU: "relu",
    nn.MaxPool2d: "pool",
    nn.FastestMaxPool2d: "pool",
    _T.MaxPool2d: "pool",
    _T.AdaptiveMaxPool2d: "adaptive_pool",
    _T.AvgPool2d: "average",
    _T.AdaptiveAvgPool2d: "average",
    nn.LocalResponseNorm: "norm",
    _T.LocalResponseNorm: "norm",
    _T.BatchNorm1d: "affine",
    _T.BatchNorm2d: "affine",
    _T.SyncBatchNorm: "affine",
    _T.Flatten: "flatten",
    **dict.fromkeys(
        (_T.Identity, _T.Dropout, _T.Dropout1d, _T.Dropout2d, _T.Dropout3d, _T.AlphaDropout, _T.FeatureAlphaDropout),
        "alias",
    ),
}

#: Functions and methods that do what a module does: the module, the names of the arguments after the input, defaults.
FUNCTIONS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "relu": (_T.ReLU, ("inplace",), {}),
    "relu_": (_T.ReLU, (), {"inplace": True}),
    "max_pool2d": (
        _T.MaxPool2d,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        {},
    ),
    "avg_pool2d": (
        _T.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        {},
    ),
    "adaptive_max_pool2d": (_T.AdaptiveMaxPool2d, ("output_size", "return_indices"), {}),
    "adaptive_avg_pool2d": (_T.AdaptiveAvgPool2d, ("output_size",), {}),
    "local_response_norm": (_T.LocalResponseNorm, ("size", "alpha", "beta", "k"), {}),
    "flatten": (_T.Flatten, ("start_dim", "end_dim"), {"start_dim": 0}),
    "dropout": (_T.Dropout, ("p", "training", "inplace"), {"training": True}),
    "dropout2d": (_T.Dropout2d, ("p", "training", "inplace"), {"training": True}),
    "alpha_dropout": (_T.AlphaDropout, ("p", "training", "inplace"), {"training": False}),
}

#: Why, by the names of functions and of modules, in lower case and without underscores.
REASONS: tuple[tuple[str, str], ...] = (
    (
        "softmax softmax2d logsoftmax softmin",
        "probabilities are not projected; leave it out and project the logits",
    ),
    (
        "celu elu gelu glu hardsigmoid hardswish hardtanh leakyrelu logsigmoid mish prelu relu6 rrelu selu sigmoid "
        "silu softplus softsign tanh threshold clamp clip clampmin",
        "the paper's gates are defined for ReLU only",
    ),
    (
        "groupnorm layernorm instancenorm1d instancenorm2d instancenorm",
        "its divisor comes from the image itself, so it is neither an affine map, as batch normalisation is in "
        "evaluation mode, nor the contrast normalisation that the paper skips",
    ),
    (
        "squeeze unsqueeze permute transpose movedim",
        "it moves dimensions, and maps must stay (N, C, H, W) until they are flattened; use x.flatten(1) before linear "
        "layers",
    ),
    (
        "lppool2d fractionalmaxpool2d",
        "only max-pools with a regular grid have switches to unpool by; replace it by MaxPool2d",
    ),
    ("conv2d linear batchnorm", "its parameters belong to no module; use the module of torch.nn instead"),
)
UNKNOWN = (
    "it is none of the supported layers: "
    + ", ".join(sorted({c.__name__ for c in KINDS}))
    + (", sums, torch.cat, and products with constants")
)

#: Calls whose results are numbers or nothing, not maps; whoever takes them for maps is refused.
PASSIVE = frozenset({"size", "getattr", "dim", "_assert", "_assert_is_none"})

ARITHMETIC = {
    **dict.fromkeys(("add", "iadd", "add_"), "add"),
    **dict.fromkeys(("sub", "isub", "sub_", "subtract"), "sub"),
    **dict.fromkeys(("mul", "imul", "mul_", "multiply"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "div", "div_", "divide"), "div"),
}

#: Results equal the input; they may share its memory, but for clone's.
COPIES = frozenset({"clone", "contiguous", "detach"})


def is_layer(module: torch.nn.Module) -> bool:
    """Whether it is of a known kind, or derived from one."""
    return isinstance(module, tuple(KINDS))


def refuse(name: str, what: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    """Raise TypeError for a part of a model."""
    raise TypeError(f"DeconvNet cannot go back through {name} ({what}): {reason}") from cause


def reason(name: str, module: torch.nn.Module | None = None) -> str:
    """Why a module or a function of this name is refused."""
    plain = name.lower().replace("_", "")
    for names, why in REASONS:
        if plain in names.split():
            return why
    if isinstance(module, _T.modules.batchnorm._NormBase):
        return "only batch normalisation of maps (BatchNorm2d) and of flattened features (BatchNorm1d) is known"
    return UNKNOWN


def objections(kind: str, module: Any) -> Iterator[str]:
    """Why this one cannot be projected through, although its kind can."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            yield f"a hook computes its weights, and hooks are not run; use {_PARAMETRIZATIONS}"
    for option in ("return_indices", "return_switches"):
        if getattr(module, option, False):
            yield f"{option}=True makes it return two tensors; the deconvnet keeps its own"
    if kind == "flatten" and (module.start_dim, module.end_dim) not in ((1, -1), (1, 3)):
        yield "it must flatten everything but the batch (start_dim=1, end_dim=-1)"
    if kind == "affine" and module.running_mean is None:
        yield (
            "without running statistics it takes the batch's own even in evaluation mode, and is no affine map; "
            "use track_running_stats=True"
        )
    if kind == "conv" and module.padding_mode != "zeros":
        yield f"padding_mode={module.padding_mode!r} has no transposed convolution; use 'zeros'"
    if kind == "conv" and module.padding == "same" and any(t % 2 for t in _same_padding(module)):
        yield "padding='same' with an even kernel pads one side more; pad explicitly"


def window(kind: str, module: Any) -> Window | None:
    """How a convolution or a pool slides, where its own attributes say it."""
    if kind == "conv":
        padding = module.padding
        if padding in ("valid", "same"):
            padding = 0 if padding == "valid" else [t // 2 for t in _same_padding(module)]
        return Window(_pair(module.kernel_size), _pair(module.stride), _pair(padding), _pair(module.dilation))
    if kind == "pool" or isinstance(module, _T.AvgPool2d):
        stride = module.kernel_size if module.stride is None else module.stride
        dilation = getattr(module, "dilation", 1)
        return Window(
            _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(dilation), module.ceil_mode
        )
    return None


def _same_padding(conv: Any) -> list[int]:
    """Rows and columns that ``padding="same"`` adds in all."""
    return [d * (k - 1) for k, d in zip(_pair(conv.kernel_size), _pair(conv.dilation), strict=True)]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
