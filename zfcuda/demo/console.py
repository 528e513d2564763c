"""What the demo says while it works: a progress bar for each stage, and what was taken over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Step = Callable[[int], None]


class Bars:
    """Progress bars, one below the other, while it is entered."""

    def __init__(self) -> None:
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Step]:
        """A bar, and the function that moves it on."""
        task = self.progress.add_task(title, total=total, note="")
        yield lambda done: self.progress.advance(task, done)

    @contextmanager
    def training(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """A bar, and the function that sets it to a step and a loss."""
        task = self.progress.add_task(title, total=total, note="")
        yield lambda step, loss: self.progress.update(task, completed=step, note=f"loss {loss:.2f}" if step else "")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)
