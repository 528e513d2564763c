"""How far a result is from the same work in float64, and where a pool's maxima were found elsewhere."""

from __future__ import annotations

import math

import torch

from zfcuda.bench.case import Outputs

__all__ = ["differences"]


def differences(outputs: Outputs, reference: Outputs) -> dict[str, float | int]:
    """What a record holds of a contender's correctness.

    ``error``: the largest deviation of any value from the reference's, over the largest value of its tensor; infinite
    for NaN and for a wrong shape. ``switches``: windows whose maximum was found elsewhere than in float64, and
    ``switches_beyond_rounding``: those of them where the value there is further below the maximum than twice the
    contender's own largest deviation, which rounding cannot explain. Either may hold the first images
    alone.
    """
    scaled, largest = 0.0, 0.0
    for got, wanted in zip(outputs.values, reference.values, strict=True):
        images = min(len(got), len(wanted))
        got, wanted = got.detach()[:images].to(wanted.device, torch.float64), wanted[:images]
        if got.shape != wanted.shape:
            return {"error": math.inf}
        deviation = float((got - wanted).abs().max().nan_to_num(torch.inf))
        scale = float(wanted.abs().max())
        largest = max(largest, deviation)
        scaled = max(scaled, deviation / scale if scale else (math.inf if deviation else 0.0))
    found: dict[str, float | int] = {"error": scaled}
    if outputs.indices is None or reference.indices is None or reference.maps is None:
        return found
    ours = outputs.indices[: len(reference.indices)].to(reference.indices.device)
    values = reference.maps.flatten(2)
    low = values.gather(2, ours.flatten(2)) < values.gather(2, reference.indices.flatten(2)) - 2 * largest
    return found | {
        "windows": reference.indices.numel(),
        "switches": int((ours != reference.indices).sum()),
        "switches_beyond_rounding": int(low.sum()),
    }
