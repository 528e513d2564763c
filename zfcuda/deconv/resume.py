"""Going on after Ctrl-C, a kill or a crash."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zfcuda.deconv.collector import Collector
from zfcuda.deconv.mined import DOCUMENT, Mined, Tensors, read_document, read_folder, write_folder
from zfcuda.deconv.ranks import Ranks

__all__ = ["Interruptions", "Parts"]

#: Of the time, at most so much for saving what has been done.
SAVE_SHARE = 0.01
#: A guess for the first save, in bytes a second.
DISK = 500e6


class Parts:
    """A folder of mining: the part of each rank until all have finished, then the result.

    Parameters
    ----------
    folder : Path
    about : dict
        What must be the same for mining to go on.
    ranks : Ranks
    iterable : bool
        Of a data set that cannot be continued; nothing is saved before the end.

    Attributes
    ----------
    finished : bool
        The folder holds the result of just this.
    document : dict or None
        Of this rank's part.

    Raises
    ------
    RuntimeError
        If the folder holds anything else; the message names what differs.
    """

    def __init__(self, folder: Path, about: dict[str, Any], ranks: Ranks, iterable: bool) -> None:
        self.folder, self.about, self.ranks, self.iterable = folder, about, ranks, iterable
        self._part = folder / f"part-{ranks.rank}-of-{ranks.size}"
        self.finished = (folder / DOCUMENT).exists()
        self.document: dict[str, Any] | None = None
        others = [p.name for p in folder.glob("part-*-of-*") if not p.name.endswith(f"-of-{ranks.size}")]
        if self.finished:
            self._check(folder, _about(Mined.load(folder)))
        elif others:
            raise RuntimeError(
                f"{folder} was begun by {others[0].rpartition('-')[2]} processes, and these are {ranks.size}: go on "
                "with as many, or give another folder"
            )
        elif (self._part / DOCUMENT).exists():
            self.document = read_document(self._part)
            self._check(folder, self.document["about"])
        self._saved, self._cost = time.monotonic(), 0.0

    def tensors(self) -> Tensors:
        """Of this rank's part."""
        return read_folder(self._part)[1]

    def due(self) -> bool:
        """Whether saving now costs little of the time since the last save."""
        return not self.iterable and time.monotonic() - self._saved > self._cost / SAVE_SHARE

    def save(self, collector: Collector) -> None:
        """Save this rank's part, whole or not at all."""
        if self.iterable:
            return
        begun = time.monotonic()
        write_folder(self._part, {"about": self.about, **collector.document()}, collector.tensors())
        self._saved = time.monotonic()
        self._cost = self._saved - begun

    def expect(self, bytes_: int) -> None:
        """Before the first save: how many bytes it will write."""
        self._cost = bytes_ / DISK

    def finish(self, mined: Mined) -> None:
        """Save the result, and forget the parts."""
        if self.ranks.rank == 0:
            mined.save(self.folder)
        self.ranks.gather(None)
        shutil.rmtree(self._part, ignore_errors=True)

    def _check(self, folder: Path, there: dict[str, Any]) -> None:
        if self.iterable:
            raise RuntimeError(
                f"{folder} holds a mining already, and that of an iterable data set can neither be continued nor "
                "recognised, for it has no indices: give another folder, or delete this one"
            )
        for name, here in self.about.items():
            if name in there and there[name] != here:
                raise RuntimeError(
                    f"{folder} was mined with another {_words(name, there[name], here)}: give another folder, delete "
                    "this one, or mine as before"
                )


def _about(mined: Mined) -> dict[str, Any]:
    names = ("top", "per_image", "batch_size", "model", "dataset")
    return {n: getattr(mined, n) for n in names} | {"layers": list(mined), "gates": list(mined.gates)}


def _words(name: str, there: Any, here: Any) -> str:
    if name == "model":
        return "model (its weights differ)"
    if isinstance(there, dict):
        different = [k for k in here if there.get(k) != here[k]]
        return f"{name} ({', '.join(f'{k}: {_short(there.get(k))}, now {_short(here[k])}' for k in different)})"
    return f"{name} ({_short(there)}, now {_short(here)})"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Interruptions:
    """While it is entered, Ctrl-C and SIGTERM wait until they are asked for; a second one does not.

    On leaving, what has waited has its usual effect. Signals that are ignored stay so.
    """

    SIGNALS: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, enabled: bool) -> None:
        # Only the main thread may handle signals.
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self.pending: int | None = None

    def __enter__(self) -> Interruptions:
        heeded = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in heeded} if self._enabled else {}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.pending = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
        if self.pending is not None:
            signal.raise_signal(self.pending)
