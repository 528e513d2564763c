"""A bar with images a second and the time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Meter"]


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} images/s" if speed else "")


class Meter:
    """Counts images on standard error while it is entered, if a terminal or a notebook watches.

    Parameters
    ----------
    total : int or None
        None where it is not known.
    done : int
        Before the start.
    enabled : bool
    """

    def __init__(self, total: int | None, done: int, enabled: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("Mining"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        watched = console.is_terminal or console.is_jupyter
        self._progress = Progress(*columns, console=console, disable=not (enabled and watched))
        self._task = self._progress.add_task("", total=total, completed=done)
        self._total = total

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, images: int) -> None:
        """So many more, the filled-up places of last batches left out."""
        self._progress.advance(self._task, images)
        task = self._progress.tasks[0]
        if self._total is not None and task.completed > self._total:
            self._progress.update(self._task, completed=self._total)
