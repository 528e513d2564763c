"""The ``zfcuda`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import zfcuda
from zfcuda.cli import options
from zfcuda.cli.options import CONFIG, EXISTING, FOLDER, GATES, IMAGES, JSON, MINING, MODEL, Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=options.EXIT_CODES)
@click.version_option(zfcuda.__version__)
def main() -> None:
    """See what a convolutional network has learned (Zeiler & Fergus, 2013).

    \b
    Start with
      zfcuda demo                              train a small network, look inside
      zfcuda gallery vgg16 photos/ --weights DEFAULT
    """


@main.command()
@JSON
def info(as_json: bool) -> None:
    """What is installed, what it was compiled for, and what is missing with its remedy."""
    from zfcuda import info

    facts = info.collect()
    click.echo(info.to_json(facts)) if as_json else info.show(facts)


@main.command()
@click.option(
    "--output",
    type=FOLDER,
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


@main.command()
@click.option("--quick", is_flag=True, help="One image, the first layers, no compilers: under three minutes.")
@click.option("-k", "--filter", "wanted", multiple=True, metavar="NAME", help="Cases with NAME in theirs; repeatable.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
@click.option("--threads", type=click.IntRange(1), help="Of a processor.  [default: all that this process may use]")
@click.option(
    "--compare", "earlier", type=EXISTING, help="The bench.json of an earlier run, for a verdict on each case."
)
@click.option("--output", type=FOLDER, default=Path("zfcuda-bench"), show_default=True, help="Folder of the results.")
def bench(**given: Any) -> None:
    """Time everything beside every rival that is installed: torch, torch.compile, captum, ONNX Runtime, OpenVINO.

    Writes OUTPUT/bench.json, OUTPUT/report.html and figures. Contenders take turns, on pinned threads; rivals that are
    missing are named: pip install 'zfcuda[bench]' brings them. The full run trains a network first, and takes about
    an hour on two cores; with --output of an earlier run it finds that network again.

    With --compare the exit code is 3 if anything of ours is slower than in the earlier record, by more than 5 % and by
    more than chance explains.

    \b
    Examples:
      zfcuda bench --quick
      zfcuda bench -k layers/conv1 --threads 1
      zfcuda bench --quick --compare zfcuda-bench/bench.json --output new
    """
    import sys

    from rich.console import Console

    from zfcuda import bench

    console = Console()
    if not console.is_terminal:
        console.width = 200

    def show(*parts: Any) -> None:
        for part in parts:
            console.print(part, highlight=False)

    result = bench.run(**given, command=" ".join(["zfcuda", *sys.argv[1:]]), show=show)
    console.print(f"The report: {result.page}", highlight=False, soft_wrap=True)
    if result.slower:
        raise SystemExit(options.SLOWER)


@main.command("gpu-report")
@click.option("--output", type=FOLDER, default=Path("zfcuda-gpu-report"), show_default=True, help="A new folder.")
@click.option("--source", type=FOLDER, default=Path(), help="A clone of the repository.  [default: this folder]")
@click.option("--device", default="cuda", show_default=True, help="cpu rehearses the steps without a GPU.")
@click.option("--sanitize", is_flag=True, help="The operators' tests under compute-sanitizer, too: hours.")
@click.option("--quick", is_flag=True, help="The quick benchmarks.")
def gpu_report(output: Path, source: Path, device: str, sanitize: bool, quick: bool) -> None:
    """Build, test and time everything on this machine's GPU, into one ZIP file to attach to an issue.

    Steps that fail are recorded, and the next ones go on; the exit code is 1 if any did. `make gpu` installs what it
    needs and calls it.
    """
    from zfcuda.bench import gpu

    if not (source / "setup.py").is_file():
        raise ValueError(f"source is {str(source)!r}, which is no clone of zfcuda's repository: there is no setup.py")
    todo = gpu.steps(output, source, device, quick, sanitize)
    done = gpu.run_steps(todo, output, source, click.echo)
    gpu.report_of(output, done)
    click.echo(f"Please attach {gpu.archive(output)} to an issue.")
    if not all(step.good for step in done):
        raise SystemExit(1)


@main.command()
@MODEL
@CONFIG
@JSON
def layers(as_json: bool, **given: Any) -> None:
    """List the layers of MODEL: maps, sizes, receptive fields, memory.

    MODEL is zfnet, zfnet512, a network of torchvision (vgg16), demo (what `zfcuda demo` trained in this folder), the
    model zoo's zfnet512.onnx, or package.module:name for a module, or a function that builds one, of your own.

    The names are what the other commands take. A position of a map sees RECEPTIVE FIELD pixels, the next one those
    JUMP pixels further. MAP is the memory of the layer's output for one image, SWITCHES what mining keeps of each
    activation; layers without it are projected through the whole image.

    \b
    Examples:
      zfcuda layers zfnet
      zfcuda layers resnet18 --input-size 320 --json
      zfcuda layers my_package.nets:build --weights trained.safetensors
    """
    from zfcuda import jobs
    from zfcuda.cli import tables

    result = jobs.layers(**given)
    _report(tables.of_layers(result), as_json, {"model": _model(result.loaded), "layers": _dicts(result.layers)})


@main.command()
@MODEL
@IMAGES
@MINING
@click.option("--gates", type=options.Names(), default="deconvnet", show_default=True, help="Projections to keep for.")
@CONFIG
@JSON
def mine(as_json: bool, **given: Any) -> None:
    """Find the strongest activations of every map of MODEL over the images DATA.

    DATA is a folder (subfolders are classes), image files, or a text file with a path in every line. The lists are kept
    in OUTPUT/mined with all that projections need; images that cannot be read are named and skipped. Stopped, the
    same command goes on; finished, it does nothing.

    On several processes or machines: torchrun --nproc-per-node 4 -m zfcuda mine … gives the same lists.

    \b
    Examples:
      zfcuda mine vgg16 photos/ --weights DEFAULT
      zfcuda mine demo photos/ --layers conv4,conv5 --top 16 --output run1
      zfcuda mine --config run.toml --batch-size 64
    """
    from zfcuda import jobs
    from zfcuda.cli import tables

    result = jobs.mine(**_quiet(given, as_json))
    _report(tables.of_mined(result), as_json, {"model": _model(result.loaded), **tables.mined_facts(result)})


@main.command()
@MODEL
@IMAGES
@click.option("--layer", required=True, help="One of those that `zfcuda layers` lists.")
@click.option("--units", type=options.Numbers(int, "N,N,…"), help="Maps or units.  [default: the strongest]")
@click.option("--strongest", type=click.IntRange(1), default=1, show_default=True, help="How many, without --units.")
@click.option("--gate", type=GATES, default="deconvnet", show_default=True, help="The rule at each ReLU.")
@click.option("--full", is_flag=True, help="Show whole images instead of receptive fields.")
@click.option("--npz", is_flag=True, help="Also write the numbers, an .npz for each image.")
@click.option("--size", type=click.IntRange(8), default=224, show_default=True, help="Of the pictures, in pixels.")
@CONFIG
@JSON
def project(as_json: bool, **given: Any) -> None:
    """Project units of one layer to pixels, in the images DATA: what in each caused the activation?

    Writes OUTPUT/LAYER/IMAGE-UNIT.png for each: left the projection (zero is grey), right the patch of the image.
    Unlike `gallery` it takes the images as they come, without a search. Those that cannot be read are named and
    skipped.

    \b
    Examples:
      zfcuda project vgg16 cat.jpg --layer features.28 --strongest 5 --weights DEFAULT
      zfcuda project demo photos/ --layer conv5 --units 3,17 --npz
    """
    from zfcuda import jobs
    from zfcuda.cli import tables

    result = jobs.project(**given)
    facts = {"model": _model(result.loaded), "layer": result.layer, "projections": _dicts(result.rows)}
    facts["skipped"] = tables.skipped_facts(result.skipped)
    _report(tables.of_projected(result), as_json, facts)


@main.command()
@MODEL
@IMAGES
@MINING
@click.option("--gate", type=GATES, default="deconvnet", show_default=True, help="The rule at each ReLU.")
@click.option("--control", is_flag=True, help="Beside each projection that of the same net with shuffled weights.")
@CONFIG
@JSON
def gallery(as_json: bool, **given: Any) -> None:
    """A page with every map of MODEL: its strongest activations over the images DATA, projected to pixels (Fig. 2).

    Mines, or takes what `zfcuda mine` left, then projects and writes OUTPUT/gallery/index.html, which opens from the
    disk, without a server. Stopped, the same command goes on.

    \b
    Examples:
      zfcuda gallery demo photos/ --control
      zfcuda gallery vgg16 photos/ --weights DEFAULT --layers features.7,features.28
      zfcuda gallery my_package.nets:build photos/ --weights trained.pth --mean 0 --std 255
    """
    from zfcuda import jobs
    from zfcuda.cli import tables

    result = jobs.gallery(**_quiet(given, as_json))
    facts = {"model": _model(result.loaded), **tables.mined_facts(result), "page": result.page}
    _report([*tables.of_mined(result), f"\nThe page: {result.page}"], as_json, facts)


def _quiet(given: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Without bars where stdout must be JSON."""
    return given | {"progress": given["progress"] and not as_json}


def _model(loaded: Any) -> dict[str, Any]:
    """A `LoadedModel` without the module."""
    names = ("name", "weights", "random", "input_size", "mean", "std")
    return {name: getattr(loaded, name) for name in names}


def _dicts(rows: Any) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _report(shown: list[Any], as_json: bool, facts: dict[str, Any]) -> None:
    from zfcuda.deconv.ranks import is_first

    if not is_first():  # of several processes, whose results are the same
        return
    if as_json:
        click.echo(json.dumps(facts, default=options.plain))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160  # nothing to fit into, so nothing is cut
    for part in shown:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
