"""Whole networks forward, torchvision's after ``zfcuda.optimize``, and ZFNet's training step."""

from conftest import cases


@cases("nets", "training")
def bench_nets(contest, setting, case) -> None:
    contest(setting, case)
