"""The ways to do a piece of work: ours and torch's in both memory formats, torch.compile, and other runtimes."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zfcuda.bench.case import FORMATS, Call, Contender, Mode, Outputs, Setting, Unavailable

INSTALL = "pip install 'zfcuda[bench]'"
Read = Callable[[Any], Outputs]


def need(module: str, package: str) -> ModuleType:
    """Import a rival.

    Raises
    ------
    Unavailable
        If it is not installed; the message names the remedy.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed: {INSTALL} ({error})") from None


def laid_out(tensors: Sequence[Any], layout: torch.memory_format) -> list[Any]:
    """The tensors of four dimensions in this format, whatever else there is as it is."""
    return [t.contiguous(memory_format=layout) if isinstance(t, Tensor) and t.dim() == 4 else t for t in tensors]


# ---------------------------------------------------------------- functions of tensors


def ours(call: Callable[..., Any], tensors: Sequence[Any], read: Read = Outputs.of, out: Any = None) -> list[Contender]:
    """``call(*tensors)`` in both formats. ``out`` makes a keyword argument from a result, for buffers that are kept."""

    def prepare(layout: torch.memory_format) -> Call:
        return partial(call, *laid_out(tensors, layout))

    def reused(layout: torch.memory_format) -> Call:
        given = laid_out(tensors, layout)
        return partial(call, *given, out=out(call(*given)))

    return [
        Contender(
            "zfcuda" if name == "contiguous" else f"zfcuda {name}",
            partial(prepare, layout),
            ours=True,
            reused=partial(reused, layout) if out else None,
            read=read,
            family="zfcuda",
        )
        for name, layout in FORMATS.items()
    ]


def torch_ways(
    setting: Setting, call: Callable[..., Any], tensors: Sequence[Any], mode: Mode, read: Read = Outputs.of
) -> list[Contender]:
    """torch eager in both formats and compiled, for functions of tensors."""

    def eager(layout: torch.memory_format) -> Call:
        mode.require_torch()
        return partial(call, *laid_out(tensors, layout))

    def compiled(layout: torch.memory_format, options: dict[str, Any]) -> Call:
        mode.require_torch()
        return partial(torch.compile(call, **options), *laid_out(tensors, layout))

    library = "cuDNN" if setting.kind == "cuda" else "torch"
    ways = [
        Contender(f"{library} eager {name}", partial(eager, layout), read=read, family="torch eager")
        for name, layout in FORMATS.items()
    ]
    return ways + [
        Contender(name, partial(compiled, layout, options), read=read, family="torch.compile", slow_start=True)
        for name, layout, options in compilations(setting)
    ]


def compilations(setting: Setting) -> list[tuple[str, torch.memory_format, dict[str, Any]]]:
    """Name, format and options of every way to compile."""
    ways: list[tuple[str, torch.memory_format, dict[str, Any]]] = [
        ("torch.compile", torch.contiguous_format, {}),
        ("torch.compile channels_last", torch.channels_last, {}),
    ]
    if setting.kind == "cuda":  # without graphs of its own: those are a regime here
        mode = {"mode": "max-autotune-no-cudagraphs"}
        ways.append(("torch.compile max-autotune channels_last", torch.channels_last, mode))
    return ways


# ---------------------------------------------------------------- modules


def modules(
    setting: Setting, name: str, module: nn.Module, image: Tensor, mode: Mode, run: Callable[..., Any], ours: bool
) -> list[Contender]:
    """``run(module, image)`` with a copy of the module in each format."""

    def prepare(layout: torch.memory_format) -> Call:
        if not ours:
            mode.require_torch()
        return partial(run, _placed(setting, module, mode, layout), *laid_out([image], layout))

    labels = {"contiguous": name if ours else f"{name} contiguous", "channels_last": f"{name} channels_last"}
    return [
        Contender(labels[format_], partial(prepare, layout), ours=ours, family=name)
        for format_, layout in FORMATS.items()
    ]


def _placed(setting: Setting, module: nn.Module, mode: Mode, layout: torch.memory_format) -> nn.Module:
    """A copy of the module where and as it is to run."""
    return copy.deepcopy(module).to(setting.device, mode.dtype).to(memory_format=layout)  # type: ignore[call-overload]


def compiled_modules(
    setting: Setting, module: nn.Module, image: Tensor, mode: Mode, run: Callable[..., Any], training: bool = False
) -> list[Contender]:
    """The same, compiled; on the CPU also with frozen weights, where there is no training."""

    def prepare(layout: torch.memory_format, options: dict[str, Any], around: Callable[[], Any]) -> Call:
        mode.require_torch()
        ready = _placed(setting, module, mode, layout)
        call = partial(run, torch.compile(ready, **options), *laid_out([image], layout))
        with around():
            call()  # compiles
        return call

    ways = [(name, partial(prepare, layout, options, nullcontext)) for name, layout, options in compilations(setting)]
    if setting.kind == "cpu" and not training:
        ways.append(("torch.compile frozen", partial(prepare, torch.channels_last, {}, frozen)))
    return [Contender(name, make, family="torch.compile", slow_start=True) for name, make in ways]


@contextmanager
def frozen() -> Iterator[None]:
    """Compilation that takes the weights for constants, and packs them for oneDNN."""
    import torch._inductor.config as config

    with config.patch(freezing=True), torch.no_grad():
        yield


def runtimes(setting: Setting, module: nn.Module, image: Tensor, mode: Mode, lacks: str = "") -> list[Contender]:
    """ONNX Runtime and OpenVINO on the CPU, for a module of one input in float32."""
    if setting.kind != "cpu" or mode.name != "ieee":
        return []
    onnxruntime, openvino = partial(_onnxruntime, setting, module, image), partial(_openvino, setting, module, image)
    return [
        Contender(
            name,
            partial(make, False),
            reused=partial(make, True),
            read=lambda result: Outputs([torch.as_tensor(part) for part in result]),
            family=name,
            lacks=lacks,
        )
        for name, make in (("ONNX Runtime", onnxruntime), ("OpenVINO", openvino))
    ]


def _onnxruntime(setting: Setting, module: nn.Module, image: Tensor, reuse: bool) -> Call:
    library = need("onnxruntime", "onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    session = library.InferenceSession(to_onnx(module, image), options, providers=["CPUExecutionProvider"])
    given = image.numpy()
    if not reuse:
        return partial(session.run, None, {"image": given})
    [first] = session.run(None, {"image": given})
    binding = session.io_binding()
    where = "cpu", 0, first.dtype
    binding.bind_input("image", *where, given.shape, given.ctypes.data)
    binding.bind_output(session.get_outputs()[0].name, *where, first.shape, first.ctypes.data)

    def call() -> list[Any]:
        session.run_with_iobinding(binding)
        return [first]

    return call


def _openvino(setting: Setting, module: nn.Module, image: Tensor, reuse: bool) -> Call:
    library = need("openvino", "openvino")
    runtime = library.Core()
    model = runtime.read_model(to_onnx(module, image))
    options = {
        "INFERENCE_NUM_THREADS": setting.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # without it processors with bfloat16 use that
    }
    request = runtime.compile_model(model, "CPU", options).create_infer_request()
    given = image.numpy()
    return lambda: [request.infer([given], share_inputs=True, share_outputs=reuse)[0]]


def to_onnx(module: nn.Module, image: Tensor) -> bytes:
    """The module as an ONNX model whose input is "image": operator by operator where it is a chain of known modules.

    torch's exporter, which serves the others, takes normalisation apart, which would make the rivals slow.
    """
    need("onnx", "onnx")
    from zfcuda.bench import chains

    if chains.is_chain(module):
        return chains.to_onnx(module, image)
    with warnings.catch_warnings(), io.BytesIO() as file:
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (image,), file, input_names=["image"], dynamo=False)  # type: ignore[arg-type]
        return file.getvalue()
