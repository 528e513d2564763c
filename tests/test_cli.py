"""The commands, as a user calls them: options, config files, exit codes, JSON; and the same in Python."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_mined import same

import zfcuda
from zfcuda import jobs
from zfcuda.cli import main
from zfcuda.deconv import Mined, mining_memory
from zfcuda.images import ImageFiles
from zfcuda.report import notebook

NETS = """
import torch

def tiny(num_classes=4):
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("first", torch.nn.Conv2d(3, 6, 3, padding=1))
    net.add_module("relu", torch.nn.ReLU())
    net.add_module("pool", torch.nn.MaxPool2d(2))
    net.add_module("second", torch.nn.Conv2d(6, 5, 3))
    net.add_module("relu2", torch.nn.ReLU())
    net.add_module("flat", torch.nn.Flatten())
    net.add_module("out", torch.nn.Linear(5 * 14 * 14, num_classes))
    net.input_size, net.mean, net.std = 32, 128.0, 64.0
    return net

def refused():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.GELU())
"""
RESULTS = {"layers": jobs.layers, "mine": jobs.mine, "project": jobs.project, "gallery": jobs.gallery}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a network, photographs of noise in two classes, and one file that is no image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "photos" / ("cat" if index % 2 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos/dog/broken.jpg").write_bytes(b"not an image")
    return tmp_path


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("name", RESULTS)
def test_every_option_is_a_parameter_in_python_and_the_other_way_round(name):
    command = main.commands[name]
    options = {p.name: p for p in command.params if p.name not in ("config", "as_json")}
    parameters = inspect.signature(RESULTS[name]).parameters
    assert options.keys() == parameters.keys()
    needed = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    assert needed == [key for key, option in options.items() if option.required]
    given = {"model": ["zfnet"], "data": ["."], "layer": ["--layer", "conv1"]}
    parsed = command.make_context(name, [word for key in needed for word in given[key]]).params
    for key in options.keys() - set(needed):
        assert parsed[key] == parameters[key].default, key


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_shows_examples_and_every_option(name):
    shown = run(*([name] if name else []), "--help").output
    if name in RESULTS:
        assert "Examples:\n  " in shown.replace("    zfcuda", "  zfcuda") and "--config" in shown and "--json" in shown
    assert "Exit codes" in shown or name


@pytest.mark.parametrize("name", RESULTS)
def test_the_examples_of_the_help_parse(name, here):
    """Each line of an example is taken by its command, up to what needs files."""
    (here / "run.toml").write_text('model = "vgg16"\ndata = ["photos"]\n')
    Image.new("RGB", (8, 8)).save(here / "cat.jpg")
    text = main.commands[name].help
    lines = [
        line.strip() for line in text[text.index("Examples:") :].splitlines() if line.strip().startswith("zfcuda ")
    ]
    assert len(lines) >= 2
    for line in lines:
        program, command, *arguments = line.split()
        assert (program, command) == ("zfcuda", name)
        main.commands[name].make_context(name, arguments)


def test_layers_as_a_table_and_as_json(here):
    shown = run("layers", "nets:tiny").output
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert lines["first"][1:5] == ["conv", "6", "32", "3"] and lines["second"][1:6] == ["conv", "5", "14", "8", "2"]
    facts = json.loads(run("layers", "nets:tiny", "--json").output)
    expected = zfcuda.DeconvNet(jobs.load_model("nets:tiny").model, (32, 32)).layers
    assert [line["name"] for line in facts["layers"]] == [layer.name for layer in expected]
    assert facts["layers"][0]["map_bytes"] == 6 * 32 * 32 * 4 and facts["model"]["input_size"] == [32, 32]
    assert facts["model"]["random"] is False


def test_random_weights_are_announced():
    shown = run("layers", "alexnet").output
    assert "weights are random" in shown and "--weights" in shown and "weights random (seed 0)" in shown


def test_project_writes_the_pictures_that_it_lists(here):
    facts = json.loads(
        run("project", "nets:tiny", "photos/cat/01.png", "photos/dog/02.png", "--layer", "second", "--units", "3,0",
            "--npz", "--size", "64", "--output", "out", "--json").output
    )  # fmt: skip
    net = zfcuda.DeconvNet(jobs.load_model("nets:tiny").model, (32, 32))
    images = ImageFiles([here / "photos/cat/01.png", here / "photos/dog/02.png"], 32, 128.0, 64.0)
    rows = iter(facts["projections"])
    for index, name in enumerate(("01", "02")):
        record = net(images[index][0][None])
        pixels = net.project(record, "second", [3, 0])[0]
        kept = np.load(here / f"out/second/{name}.npz")
        np.testing.assert_allclose(kept["pixels"], pixels.numpy(), atol=1e-6)
        np.testing.assert_array_equal(kept["input"], images[index][0].numpy())
        for unit in (3, 0):
            row = next(rows)
            place = net.strongest(record, "second", unit).positions[0]
            assert row["unit"] == unit and row["position"] == place.tolist()
            assert row["value"] == pytest.approx(float(record.maps["second"][0, unit].max()))
            assert row["box"] == list(net.box("second", place))
            picture = np.asarray(Image.open(row["file"]))
            assert picture.shape == (64, 2 * 64 + 8, 3)  # the box is square
    assert next(rows, None) is None


def test_project_names_and_skips_what_it_cannot_read(here):
    shown = run("project", "nets:tiny", "photos/dog", "--layer", "second")
    assert "could not be read: 1\n  broken.jpg: UnidentifiedImageError" in shown.output
    facts = json.loads(run("project", "nets:tiny", "photos/dog", "--layer", "second", "--json").stdout)
    assert [row["image"] for row in facts["projections"]] == [f"{i:02d}.png" for i in range(0, 12, 2)]
    assert [(s["index"], s["name"]) for s in facts["skipped"]] == [(6, "broken.jpg")]


def test_mining_says_how_much_memory_it_takes_before_it_reads_the_images(here):
    result = run("mine", "nets:tiny", "photos", "--json")
    memory, skipped = result.stderr.splitlines()
    of = mining_memory(jobs.load_model("nets:tiny").model, (32, 32))
    taken = notebook.bytes_text(sum(sum(parts.values()) for parts in of.values()))
    assert memory == f"mining 2 layers, 11 maps, {taken} of lists, patches and switches"
    assert skipped.startswith("skipped image 12 (dog/broken.jpg): UnidentifiedImageError")
    assert json.loads(result.stdout)["images_seen"] == 12
    result = run("mine", "nets:tiny", "photos", "--output", "little", "--memory", "1KiB")
    assert "no switches of second: projecting them reads the images again" in result.stderr


def test_of_several_processes_one_reports_and_writes_the_page(here):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zfcuda", "gallery"]
    options = ["nets:tiny", "photos", "--batch-size", "2", "--json"]
    done = subprocess.run(
        [sys.executable, *command, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["images_seen"] == 12 and Path(facts["page"]).is_file()
    assert done.stderr.count("skipped image 12 ") == 1
    alone = jobs.mine("nets:tiny", "photos", output="alone", batch_size=2, progress=False).mined
    assert same(Mined.load(facts["folder"]), alone)


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(jobs._device(None)) == "cuda:0" and str(jobs._device("cpu")) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(jobs._device(None)) == "cuda:1"


def test_project_takes_the_strongest_units_where_none_are_named(here):
    result = jobs.project("nets:tiny", ["photos/cat/01.png"], layer="second", strongest=3)
    values = [row.value for row in result.rows]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    assert all(row.file.parent == Path("nets_tiny-01/second") and row.file.is_file() for row in result.rows)
    whole = jobs.project("nets:tiny", ["photos/cat/01.png"], layer="out", units=[1], full=True, output="o")
    assert whole.rows[0].position is None and whole.rows[0].box == (0, 0, 32, 32)


def test_a_config_file_sets_options_and_the_command_line_wins(here):
    (here / "run.toml").write_text(
        'model = "nets:tiny"\ndata = ["photos/cat"]\nlayer = "second"\nunits = [1, 2]\nnum-classes = 2\nmean = 100\n'
        'input_size = [32, 32]\noutput = "from-config"\njson = true\n'
    )
    facts = json.loads(run("project", "--config", "run.toml").output)
    assert {row["unit"] for row in facts["projections"]} == {1, 2} and len(facts["projections"]) == 12
    assert facts["model"]["mean"] == [100.0] * 3
    assert all(row["file"].startswith("from-config/") for row in facts["projections"])
    facts = json.loads(run("project", "--config", "run.toml", "--units", "4", "--output", "given").output)
    assert {row["unit"] for row in facts["projections"]} == {4}
    assert all(row["file"].startswith("given/") for row in facts["projections"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("topp = 3\nlayer = 'x'", "sets topp; project has config"),
        ("strongest = 'many'", "'many' is not a valid integer"),
        ("strongest = 0", "0 is not in the range"),
        ("units = 1.5", "1.5 is not"),
        ("layer = ", "is not TOML"),
        ("gate = 'none'", "'none' is not one of"),
    ],
)
def test_wrong_config_files_are_refused_by_name(here, text, words):
    (here / "run.toml").write_text(text)
    shown = run("project", "nets:tiny", "photos", "--layer", "second", "--config", "run.toml", code=2).output
    if words.startswith("sets"):
        words = "sets topp; project has data"
    assert words in " ".join(shown.split())


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["layers", "nets:refused"], 1, "GELU"),
        (["layers", "vg16"], 2, "Did you mean vgg16"),
        (["layers", "alexnet", "--weights", "nope.pth"], 1, "neither a file"),
        (["layers", "demo"], 1, "run `zfcuda demo` first"),
        (["project", "nets:tiny", "photos/cat", "--layer", "third"], 2, "'third'; it must be one of first"),
        (["project", "nets:tiny", "photos/cat", "--layer", "second", "--units", "5"], 2, "units 0 to 4"),
        (["project", "nets:tiny", "photos/dog/broken.jpg", "--layer", "second"], 1, "broken.jpg"),
        (["project", "nets:tiny", "nowhere", "--layer", "second"], 2, "does not exist"),
        (["project", "nets:tiny", "photos/cat", "--layer", "second", "--input-size", "a"], 2, "is not a size"),
        (["mine", "nets:tiny"], 2, "Missing argument"),
        (["gallery", "nets:tiny", "photos", "--tops", "3"], 2, "No such option"),
    ],
)
def test_failures_are_a_message_and_an_exit_code(here, arguments, code, words):
    result = run(*arguments, code=code)
    assert words in " ".join(result.output.split()) and "Traceback" not in result.output


def test_ctrl_c_is_130_and_says_so_once(here, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    for command in ("layers", "mine"):
        monkeypatch.setattr(jobs, command, stop)
    assert run("layers", "zfnet", code=130).stderr == "\nStopped.\n"
    assert run("mine", "zfnet", "photos", code=130).stderr == "\nStopped. The same command goes on from here.\n"


def test_a_list_of_files(here):
    (here / "photos/list.txt").write_text("cat/01.png\n\ndog/02.png\n")
    result = jobs.project("nets:tiny", "photos/list.txt", layer="second")
    assert [Path(row.image).name for row in result.rows] == ["01.png", "02.png"]


def test_help_is_quick_as_it_imports_neither_torch_nor_numpy():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from zfcuda.cli import main\n"
        "for command in ('layers', 'mine', 'project', 'gallery', 'demo', 'info'):\n"
        "    assert CliRunner().invoke(main, [command, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'PIL', 'jinja2', 'rich') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stdout + shown.stderr


def test_python_dash_m_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "zfcuda", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"zfcuda, version {zfcuda.__version__}"
