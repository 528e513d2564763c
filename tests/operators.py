"""Every operator and what it promises, declared once; but not those that write their argument (`name_`).

``test_contract.py`` runs each property on each operator on each backend present; ``python tests/operators.py`` writes
the table of ``docs/operators.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import test_conv2d_relu
import test_conv2d_relu_max_pool2d
import test_conv2d_relu_max_pool2d_maximum
import test_conv2d_relu_max_pool2d_norm
import test_crop_windows
import test_deconv2d
import test_local_response_norm
import test_map_maximum
import test_max_pool2d
import test_max_unpool2d
import test_relu_max_pool2d
import test_switch_gather
import test_unpool_relu_deconv2d
import test_window_deconv2d
import torch
import torch.nn.functional as F
from oracles import HALVES, Sample, normal
from torch import Tensor

from zfcuda import ops, reference


@dataclass(frozen=True)
class Declared:
    """An operator of ``zfcuda.ops`` and its properties."""

    call: Callable[..., Any]
    #: Of every kind of arguments; the first is small and ordinary.
    samples: Callable[[], list[Sample]]
    #: torch's way to the same results, and the slow oracle; both from the operator's own test file.
    rival: Callable[..., Any]
    oracle: Callable[..., Any] | None = None
    #: The oracle of a dtype, where numbers that are rounded on the way are compared.
    rounding: Callable[[torch.dtype], Callable[..., Any]] | None = None
    #: The tensors that have derivatives of every order.
    differentiable: tuple[str, ...] = ()
    #: The tensors whose first dimension is the batch's.
    batched: tuple[str, ...] = ()
    #: Takes one image, (channels, height, width), for a batch of one.
    unbatched: bool = False
    #: Autocast brings tensors to its dtype, not only to one that there are kernels for.
    casts: bool = False
    #: A call on a tiny input without gradients, and torch's own on the same, which takes at least as long.
    tiny: tuple[Callable[[], Any], Callable[[], Any]] | None = None

    @property
    def name(self) -> str:
        return self.call.__name__

    def oracle_of(self, dtype: torch.dtype) -> Any:
        """The oracle for numbers of ``dtype``."""
        return self.rounding(dtype) if self.rounding and dtype in HALVES else self.oracle

    def sample(self, device: torch.device, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Sample:
        """The first one."""
        return self.samples()[0].on(device, dtype, layout)

    def images(self, sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with a changed batch."""
        names = inspect.signature(self.call).parameters
        tensors = [
            change(t) if t is not None and name in self.batched else t
            for name, t in zip(names, sample.tensors, strict=False)
        ]
        options = {n: change(v) if n in self.batched else v for n, v in sample.options.items()}
        return Sample(tensors, options, sample.differentiable)

    def of(self, sample: Sample) -> tuple[Callable[..., Any], list[Tensor]]:
        """The operator's first result as a function of the sample's floating tensors alone, and these tensors."""
        free = [t is not None and t.is_floating_point() for t in sample.tensors]

        def function(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            result = self.call(*(next(left) if f else t for t, f in zip(sample.tensors, free, strict=True)), **options)
            return result[0] if several else result

        options, several = sample.options, "tuple" in self.call.__annotations__["return"]
        return function, [t.detach() for t, f in zip(sample.tensors, free, strict=True) if f]


IMAGE, FILTERS, BIAS = (normal(*size).float() for size in ((1, 1, 4, 4), (1, 1, 3, 3), (1,)))
POOLED, SWITCHES = reference.max_pool2d(IMAGE, 2)
INDICES = reference.switches_to_indices(SWITCHES, (4, 4), 2)


def _crops() -> list[Sample]:
    images = test_crop_windows.images_of
    return [
        test_crop_windows.crops(normal(3, 5, 6, 4), (4, 3)),
        test_crop_windows.crops(images(3, 5, 6, 4), (4, 3), fill=9),
        test_crop_windows.crops(images(3, 5, 6, 4), (4, 3), windows=0),
    ]


OPERATORS = [
    Declared(
        ops.conv2d_relu,
        test_conv2d_relu.sample_inputs,
        test_conv2d_relu.torchs,
        reference.conv2d_relu,
        batched=("input",),
        differentiable=("input", "weight", "bias"),
        unbatched=True,
        casts=True,
        tiny=(lambda: ops.conv2d_relu(IMAGE, FILTERS, BIAS), lambda: F.conv2d(IMAGE, FILTERS, BIAS)),
    ),
    Declared(
        ops.deconv2d,
        test_deconv2d.sample_inputs,
        test_deconv2d.torchs,
        reference.deconv2d,
        batched=("signal", "forward"),
        differentiable=("signal", "weight", "bias"),
        unbatched=True,
        casts=True,
        tiny=(lambda: ops.deconv2d(IMAGE, FILTERS, BIAS), lambda: F.conv_transpose2d(IMAGE, FILTERS, BIAS)),
    ),
    Declared(
        ops.conv2d_relu_max_pool2d,
        test_conv2d_relu_max_pool2d.sample_inputs,
        test_conv2d_relu_max_pool2d.torchs,
        reference.conv2d_relu_max_pool2d,
        test_conv2d_relu_max_pool2d.rounding,
        batched=("input",),
        differentiable=("input", "weight", "bias"),
        unbatched=True,
        casts=True,
        tiny=(
            lambda: ops.conv2d_relu_max_pool2d(IMAGE, FILTERS, BIAS, pool_kernel_size=2),
            lambda: F.max_pool2d(F.conv2d(IMAGE, FILTERS, BIAS).relu(), 2, return_indices=True),
        ),
    ),
    Declared(
        ops.conv2d_relu_max_pool2d_maximum,
        test_conv2d_relu_max_pool2d_maximum.sample_inputs,
        test_conv2d_relu_max_pool2d_maximum.torchs,
        reference.conv2d_relu_max_pool2d_maximum,
        test_conv2d_relu_max_pool2d_maximum.rounding,
        batched=("input",),
        unbatched=True,
        casts=True,
    ),
    Declared(
        ops.conv2d_relu_max_pool2d_norm,
        test_conv2d_relu_max_pool2d_norm.sample_inputs,
        test_conv2d_relu_max_pool2d_norm.torchs,
        reference.conv2d_relu_max_pool2d_norm,
        test_conv2d_relu_max_pool2d_norm.rounding,
        batched=("input",),
        differentiable=("input", "weight", "bias"),
        unbatched=True,
        casts=True,
        tiny=(
            lambda: ops.conv2d_relu_max_pool2d_norm(IMAGE, FILTERS, BIAS, pool_kernel_size=2, norm_size=5),
            lambda: F.local_response_norm(
                F.max_pool2d(F.conv2d(IMAGE, FILTERS, BIAS).relu(), 2, return_indices=True)[0], 5
            ),
        ),
    ),
    Declared(
        ops.unpool_relu_deconv2d,
        test_unpool_relu_deconv2d.sample_inputs,
        test_unpool_relu_deconv2d.torchs,
        reference.unpool_relu_deconv2d,
        batched=("signal", "switches", "forward"),
        differentiable=("signal", "weight", "bias"),
        unbatched=True,
        casts=True,
        tiny=(
            lambda: ops.unpool_relu_deconv2d(POOLED, SWITCHES, FILTERS, BIAS, pool_kernel_size=2),
            lambda: F.conv_transpose2d(F.max_unpool2d(POOLED, INDICES, 2).relu(), FILTERS, BIAS),
        ),
    ),
    Declared(
        ops.max_pool2d,
        test_max_pool2d.sample_inputs,
        test_max_pool2d.torchs,
        reference.max_pool2d,
        batched=("input",),
        differentiable=("input",),
        unbatched=True,
        tiny=(lambda: ops.max_pool2d(IMAGE, 2), lambda: F.max_pool2d(IMAGE, 2, return_indices=True)),
    ),
    Declared(
        ops.max_unpool2d,
        test_max_unpool2d.sample_inputs,
        test_max_unpool2d.torchs,
        reference.max_unpool2d,
        batched=("input", "switches"),
        differentiable=("input",),
        unbatched=True,
        tiny=(lambda: ops.max_unpool2d(POOLED, SWITCHES, 2), lambda: F.max_unpool2d(POOLED, INDICES, 2)),
    ),
    Declared(
        ops.relu_max_pool2d,
        test_relu_max_pool2d.sample_inputs,
        test_relu_max_pool2d.torchs,
        reference.relu_max_pool2d,
        batched=("input",),
        differentiable=("input",),
        unbatched=True,
        tiny=(lambda: ops.relu_max_pool2d(IMAGE, 2), lambda: F.max_pool2d(IMAGE.relu(), 2, return_indices=True)),
    ),
    Declared(
        ops.switch_gather,
        test_switch_gather.sample_inputs,
        test_switch_gather.torchs,
        reference.switch_gather,
        batched=("input", "switches"),
        differentiable=("input",),
        unbatched=True,
        tiny=(
            lambda: ops.switch_gather(IMAGE, SWITCHES, 2),
            lambda: IMAGE.flatten(2).gather(2, INDICES.flatten(2)).view_as(INDICES),
        ),
    ),
    Declared(
        ops.local_response_norm,
        test_local_response_norm.sample_inputs,
        F.local_response_norm,
        reference.local_response_norm,
        batched=("input",),
        differentiable=("input",),
        tiny=(lambda: ops.local_response_norm(IMAGE, 5), lambda: F.local_response_norm(IMAGE, 5)),
    ),
    Declared(
        ops.window_deconv2d,
        test_window_deconv2d.sample_inputs,
        test_window_deconv2d.torchs,
        reference.window_deconv2d,
        batched=("signal", "origins", "positive", "switches"),
    ),
    Declared(ops.crop_windows, _crops, test_crop_windows.numpys, batched=("images", "origins")),
    Declared(
        ops.map_maximum,
        test_map_maximum.sample_inputs,
        test_map_maximum.torchs,
        reference.map_maximum,
        batched=("input", "pooled", "switches"),
    ),
]


# ---------------------------------------------------------------- the table of the documents

_HEAD = """# What every operator promises

Written by `make operators` from `tests/operators.py`; `tests/test_contract.py` runs each property on each operator, on
every backend present.

| operator | derivatives | one image without a batch | autocast computes in |
| --- | --- | --- | --- |
"""

_FOOT = """
All of them:

- take float16, bfloat16, float32 and float64 tensors of any strides on the CPU and on CUDA, lazily negated ones too,
  and empty batches; sums of halves are float32, and a result is rounded once;
- follow the memory format of their first tensor; a gradient has the strides of its tensor, as DDP asks;
- give the same bits with any number of threads, from several Python threads at once and under
  `torch.use_deterministic_algorithms`;
- compile by `torch.compile(fullgraph=True, dynamic=True)`, export by `torch.export`, strict or not, and trace by
  `make_fx`, `torch.fx.symbolic_trace`, `FakeTensorMode` and on `meta`; profilers see them as `zfcuda::name`;
- answer `torch.func.grad`, `jacrev`, `vmap` and forward mode (`jvp`, `jacfwd`, dual tensors), in any nesting, where
  they have derivatives, and refuse a gradient or a tangent where they have none, never answering by zeros. Inside
  `torch.compile`, `vmap` and `jvp` work, and torch refuses `torch.func.grad` of registered operators;
- leave float64 alone under autocast, as torch does.

What is written into `out=`, and `renormalize_filters_`, is not differentiable: a tensor that requires a gradient is
refused by the one, and changed as an optimiser changes it by the other. Both count as writes for autograd, and compile.

An eager call without gradients, made before with arguments of the same kind, is repeated from a memo in about the time
of its allocations (from torch 2.10 on): on a tiny input the operators that have derivatives take at most as long as
torch's own, the fused ones as the chain of torch's. With `out=` too: a check that no memory is shared comes on top.
"""


def table() -> str:
    """``docs/operators.md``."""
    rows = [
        " | ".join(
            (
                f"| `{d.name}`",
                f"every order, by {', '.join(d.differentiable)}" if d.differentiable else "refused",
                "yes" if d.unbatched else "—",
                ("its own dtype |" if d.casts else "the tensors' dtype |"),
            )
        )
        for d in OPERATORS
    ]
    return _HEAD + "\n".join(rows) + "\n" + _FOOT


if __name__ == "__main__":
    print(table(), end="")
