"""ZFNet's convolutional layers: forward, fused with their pool and not, and both gradients."""

from conftest import cases


@cases("layers")
def bench_layers(contest, setting, case) -> None:
    contest(setting, case)
