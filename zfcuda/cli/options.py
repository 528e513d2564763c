"""What the commands share: types of options, config files, and exit codes."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import click

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed: the message on stderr says why, and what to do
  2    wrong arguments: an unknown option, model, layer or unit
  3    bench --compare: slower than the earlier record
  130  stopped with Ctrl-C; mine, gallery and demo go on from there when called again
"""
SLOWER = 3
CONTINUED = ("demo", "gallery", "mine")
FAILURES = (OSError, RuntimeError, TypeError, ImportError)
WRONG_ARGUMENTS = (ValueError, IndexError)


class Messages(logging.Handler):
    """What the library says while it runs (the memory that mining takes, images that it skips), on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)  # whatever stderr is now: bars stand in its place


@contextmanager
def messages() -> Iterator[None]:
    """Shows `Messages` while it is entered."""
    log, handler = logging.getLogger("zfcuda"), Messages()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class Commands(click.Group):
    """A group that turns exceptions into messages and exit codes; ``ZFCUDA_TRACEBACK=1`` shows them whole."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with messages():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            goes_on = " The same command goes on from here." if ctx.invoked_subcommand in CONTINUED else ""
            click.echo(f"\nStopped.{goes_on}", err=True)
            ctx.exit(130)
        except click.exceptions.Exit:  # a RuntimeError
            raise
        except (*FAILURES, *WRONG_ARGUMENTS) as error:
            if os.environ.get("ZFCUDA_TRACEBACK"):
                raise
            kind = click.UsageError if isinstance(error, WRONG_ARGUMENTS) else click.ClickException  # exit 2 or 1
            raise kind(str(error) or type(error).__name__) from error


class Names(click.ParamType):
    """``a,b,c``, or a list in a config file."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in parts):
            self.fail(f"{value!r} is not a list of names, such as conv1,conv2", param, ctx)
        return tuple(part.strip() for part in parts)


class Numbers(click.ParamType):
    """``1,2,3``, or a number or a list in a config file."""

    def __init__(self, kind: type[int] | type[float], name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        try:
            if any(isinstance(part, bool) or (self.kind is int and isinstance(part, float)) for part in parts):
                raise ValueError
            return tuple(self.kind(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not {self.name}", param, ctx)


class Count(click.ParamType):
    """A positive number, or ``all``."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value in (None, "all") else click.IntRange(1).convert(value, param, ctx)


class Bytes(click.ParamType):
    """``500MiB``, ``2GiB``, or a number of bytes."""

    name = "BYTES"
    UNITS: ClassVar = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "": 1}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]ib|)", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a size, such as 500MiB or 2GiB", param, ctx)
        return int(float(match[1]) * self.UNITS[match[2]])


class Size(click.ParamType):
    """``224``, or ``224x320`` (height x width); in a config file also a list of two."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = value.lower().split("x") if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            sides = [int(part) for part in parts]
        except (TypeError, ValueError):
            sides = []
        if isinstance(value, tuple):  # converted already
            return value[0], value[1]
        if len(sides) not in (1, 2) or min(sides) < 1:
            self.fail(f"{value!r} is not a size, such as 224 or 224x320 (height x width)", param, ctx)
        return sides[0], sides[-1]


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Options from a TOML file become the command's defaults; those on the command line win."""
    if path is None:
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    known = {p.name: p for p in ctx.command.params if p.name not in (param.name, "help")}
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    settings = {"as_json" if key == "json" else key: value for key, value in settings.items()}
    unknown = [key for key in settings if key not in known]
    if unknown:
        options = ", ".join(sorted(name.replace("as_json", "json").replace("_", "-") for name in known if name))
        raise click.BadParameter(f"{path} sets {', '.join(unknown)}; {ctx.command.name} has {options}")
    ctx.default_map = {**(ctx.default_map or {}), **settings}
    return path


def _combine(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def file_option(name: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, type=click.Path(path_type=Path), help=help)


EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
CONFIG = click.option(
    "--config",
    type=EXISTING,
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with options of this command (top = 16); the command line wins.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")

MODEL = _combine(
    click.argument("model"),
    click.option("--weights", metavar="FILE|NAME", help="Trained: .safetensors, .pth, or torchvision's DEFAULT."),
    click.option("--num-classes", type=click.IntRange(1), help="Outputs of the last layer.  [default: the network's]"),
    click.option("--input-size", metavar="N|HxW", type=Size(), help="Of the images.  [default: the network's]"),
)
IMAGES = _combine(
    click.argument("data", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)),
    click.option("--mean", type=Numbers(float, "R,G,B"), help="Less this, of pixels 0…255.  [default: the model's]"),
    click.option("--std", type=Numbers(float, "R,G,B"), help="Then divided by.  [default: the model's]"),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, where random."),
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1.  [default: a GPU where there is one]"),
    click.option("--output", type=FOLDER, help="Folder.  [default: MODEL-DATA]"),
)
MINING = _combine(
    click.option("--layers", type=Names(), help="Of those that `zfcuda layers` lists.  [default: all convolutions]"),
    click.option("--top", type=click.IntRange(1), default=9, show_default=True, help="Activations kept of each map."),
    click.option("--per-image", type=Count(), default=1, show_default=True, help="Of them from one image."),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images at a time."),
    click.option("--num-workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read."),
    click.option("--memory", type=Bytes(), default="2GiB", show_default=True, help="Of patches and switches."),
    click.option("--progress/--no-progress", default=True, show_default=True, help="Bars on the terminal."),
)
GATES = click.Choice(["deconvnet", "backprop", "guided"])


def plain(value: Any) -> Any:
    """What a JSON writer does not know: paths, tuples of them, numbers of torch."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def joined(names: Sequence[object]) -> str:
    return ", ".join(map(str, names))
