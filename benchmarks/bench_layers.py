"""ZFNet's convolutional layers, fused with their pool and not, and convolutions with groups; both gradients."""

from conftest import cases


@cases("layers", "grouped")
def bench_layers(contest, setting, case) -> None:
    contest(setting, case)
