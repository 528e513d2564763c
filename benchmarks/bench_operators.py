"""Every operator on ZFNet's layers, and what a call costs before any work."""

from conftest import cases


@cases("operators", "calls")
def bench_operators(contest, setting, case) -> None:
    contest(setting, case)
