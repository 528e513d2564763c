"""The ``zfcuda`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path

import click

import zfcuda


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(zfcuda.__version__)
def main() -> None:
    """See what a convolutional network has learned (Zeiler & Fergus, 2013)."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def info(as_json: bool) -> None:
    """What is installed, what it was compiled for, and what is missing with its remedy."""
    from zfcuda import info

    facts = info.collect()
    click.echo(info.to_json(facts)) if as_json else info.show(facts)


@main.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("zfcuda-demo"),
    show_default=True,
    help="Folder for the page, the figures and the checkpoint.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of windows, weights and dropout.")
@click.option("--steps", type=click.IntRange(1), help="Training steps; the default takes about two minutes.")
def demo(output: Path, seed: int, steps: int | None) -> None:
    """Train a narrow ZFNet on photographs and show what each of its maps sees (Fig. 2).

    A few minutes on two cores, without a network connection. Run again, it goes on where it was stopped.
    """
    from zfcuda.demo import Recipe, run

    run(output, Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps))
