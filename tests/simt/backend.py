"""The emulator in the place of a backend module: registers the tensors of each call, tries several thread orders."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from simt import build

#: Positions of the tensors that each function of csrc/ops.h writes, after its shape and options;
#: True where it must write every element.
WRITTEN = {
    "conv2d": {7: True, 8: False},
    "deconv2d": {7: True, 8: False},
    "conv2d_weight_gradient": {6: True, 7: True, 8: False},
    "max_pool2d": {4: True, 5: True},
    "conv2d_relu_max_pool2d": {6: True, 7: True, 8: True, 9: True, 10: False},
    "conv2d_relu_max_pool2d_norm": {10: True, 11: True, 12: True, 13: False},
    "max_unpool2d": {5: True},
    "unpool_relu_deconv2d": {10: True, 11: False},
    "unpool_relu_weight_gradient": {9: True, 10: False},
    "switch_gather": {5: True},
    "find_invalid_switch": {2: True},
    "local_response_norm": {6: True},
    "local_response_norm_gradient": {7: True},
    "window_deconv2d_pack": {3: True},
    "window_deconv2d": {8: True, 9: False},
    "renormalize_filters": {4: False},
    "crop_windows": {4: True},
    "map_maximum": {5: True, 6: True},
}

#: Those that it reads first and need not write: they hold values on entry, the same in each order.
UPDATED = {"renormalize_filters": 4}


@dataclass(frozen=True)
class Order:
    """Of threads and of blocks; with ``preempt``, threads also change places every so many accesses."""

    kind: int
    seed: int = 0
    preempt: int = 0


ORDERS = {
    "forward": Order(0),
    "reverse": Order(1),
    "shuffle": Order(2, seed=1),
    "preempt": Order(2, seed=2, preempt=7),
}


#: Multiprocessors of the emulated GPU unless a test wants others: an H100's.
PROCESSORS = 132


def configure(controls: ctypes.CDLL, order: Order, arch: int, processors: int = PROCESSORS) -> None:
    """Choose the order of the launches to come, and the GPU that they are for."""
    controls.zf_simt_configure(order.kind, order.seed, order.preempt, arch, processors)


def register(
    controls: ctypes.CDLL, address: int, nbytes: int, writable: bool, name: str, updated: bool = False
) -> None:
    """Let kernels read ``nbytes`` at ``address``; a writable tensor is uninitialised at first, unless ``updated``."""
    controls.zf_simt_register(address, nbytes, writable, updated, name.encode())


class Address(int):
    """A tensor's address that has not forgotten its size."""

    nbytes: int


class Emulator:
    """Looks like a backend module. Each call runs once in each order, and the results must be the same bits."""

    def __init__(
        self,
        module: ModuleType,
        arch: int = 86,
        orders: tuple[str, ...] = ("forward", "reverse", "shuffle"),
        processors: int = PROCESSORS,
    ):
        self.module, self.arch, self.orders, self.processors = module, arch, orders, processors
        self.controls = build.controls(str(module.__file__))
        self.lock = threading.Lock()

    @staticmethod
    def address(argument: Any) -> Any:
        """What ``zfcuda.core._address`` does, for this stand-in."""
        if not isinstance(argument, Tensor):
            return argument
        address = Address(argument.data_ptr())
        address.nbytes = argument.numel() * argument.element_size()
        return address

    def __getattr__(self, function: str) -> Any:
        call = getattr(self.module, function)
        if function not in WRITTEN:
            # Sizes may depend on the GPU.
            configure(self.controls, ORDERS["forward"], self.arch, self.processors)
            return call
        return lambda *arguments: self._run(function, call, arguments)

    def _run(self, function: str, call: Any, arguments: tuple[Any, ...]) -> None:
        first: dict[int, bytes] = {}
        written = {i: whole for i, whole in WRITTEN[function].items() if isinstance(arguments[i], Address)}
        updated = UPDATED.get(function)
        before = b"" if updated is None else ctypes.string_at(arguments[updated], arguments[updated].nbytes)
        with self.lock:
            for name in self.orders:
                if updated is not None:
                    ctypes.memmove(arguments[updated], before, len(before))
                self._checked(function, call, arguments, written, ORDERS[name])
                for i in (i for i, whole in written.items() if whole or i == updated):
                    result = ctypes.string_at(arguments[i], arguments[i].nbytes)
                    if first.setdefault(i, result) != result:
                        raise RuntimeError(f"emulator: argument {i} of {function} depends on the order of the threads")

    def _checked(
        self, function: str, call: Any, arguments: tuple[Any, ...], written: dict[int, bool], order: Order
    ) -> None:
        for i, argument in enumerate(arguments):
            if isinstance(argument, Address):
                name, updated = f"argument {i} of {function}", i == UPDATED.get(function)
                register(self.controls, argument, argument.nbytes, i in written, name, updated)
        try:
            configure(self.controls, order, self.arch, self.processors)
            call(*arguments)
            for i in (i for i, whole in written.items() if whole):
                at = self.controls.zf_simt_unwritten(arguments[i])
                if at >= 0:
                    raise RuntimeError(f"emulator: unwritten output: byte {at} of argument {i} of {function}")
        finally:
            self.controls.zf_simt_forget()
