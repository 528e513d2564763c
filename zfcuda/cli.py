"""The ``zfcuda`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

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
