"""Weights from files, and networks by name: against onnxruntime, torchvision and what was saved."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import helper, numpy_helper

from zfcuda.demo.folder import Stages
from zfcuda.demo.training import Recipe, Training
from zfcuda.models import load_model, load_weights, torchvision, zfnet512
from zfcuda.models.zfnet512 import read_onnx

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light/light_zfnet512.onnx"
TINY = Recipe(steps=6, size=64, widths=(6, 8, 8, 8, 8), fc_width=16, crops=2)


def edited(folder: Path, edit) -> Path:
    """The light model with a change."""
    model = onnx.load(LIGHT)
    edit(model.graph)
    path = folder / "edited.onnx"
    onnx.save(model, path)
    return path


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def initialise(graph: onnx.GraphProto) -> None:
    """The light model's constants become initialisers with random weights, as in the zoo's file."""
    draw = np.random.default_rng(0)
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("__SHAPE")}
    for constant in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
        shape = shapes[constant.input[0]]
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
        # Activations keep their size from layer to layer, so that errors show in each.
        weights = draw.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))
        graph.initializer.append(numpy_helper.from_array(weights, constant.output[0]))
        graph.node.remove(constant)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return edited(tmp_path_factory.mktemp("zoo"), initialise)


def test_zfnet512_computes_in_every_layer_what_onnxruntime_computes(trained):
    """Each node's output, of our network in float32 and of onnxruntime, against our network in float64."""
    model = onnx.load(trained)
    nodes = [node for node in model.graph.node if node.op_type != "Softmax"]
    model.graph.output.extend(helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in nodes)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 50
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    theirs = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"gpu_0/data_0": images.numpy()}), strict=True)
    )

    net = zfnet512(trained).eval()
    single, double = features(net, images), features(net.double(), images.double())
    # Conv and its Relu are one module here.
    rectified = [n for n, after in zip(nodes, [*nodes[1:], None], strict=True) if not (n.op_type == "Conv" and after)]
    outputs = {name: theirs[n.output[0]] for name, n in zip(single, rectified, strict=True)}
    for name, output in outputs.items():
        exact = double[name]
        assert output.shape == exact.shape, name
        error, own = (float((torch.as_tensor(t).double() - exact).norm()) for t in (output, single[name]))
        assert own <= 2 * error + 1e-6 * float(exact.norm()), name
        assert error <= 1e-5 * float(exact.norm()), name
    assert exact.std() > 0.1  # the last, the logits, tell the classes apart
    np.testing.assert_allclose(theirs["gpu_0/softmax_1"], single["fc8"].softmax(1).numpy(), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def features(net: torch.nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = {}
    for name, module in net.named_children():
        if isinstance(module, torch.nn.Dropout):
            continue
        x = out[name] = module(x)
    return out


def set_attribute(name: str, attribute: str, value):
    def edit(graph: onnx.GraphProto) -> None:
        target = node(graph, name)
        others = [a for a in target.attribute if a.name != attribute]
        del target.attribute[:]
        target.attribute.extend([*others, helper.make_attribute(attribute, value)])

    return edit


def without_attribute(graph: onnx.GraphProto) -> None:
    target = node(graph, "n3")
    kept = [a for a in target.attribute if a.name != "strides"]
    del target.attribute[:]
    target.attribute.extend(kept)


def swap_weights(graph: onnx.GraphProto) -> None:
    third, fourth = node(graph, "n8"), node(graph, "n10")
    third.input[1], fourth.input[1] = fourth.input[1], third.input[1]


def bypass(graph: onnx.GraphProto) -> None:
    node(graph, "n10").input[0] = "r7"


def average(graph: onnx.GraphProto) -> None:
    node(graph, "n7").op_type = "AveragePool"


def shorten(graph: onnx.GraphProto) -> None:
    graph.node.remove(node(graph, "n21"))


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda graph: None, "gpu_0/conv1_w_0 are made by ConstantOfShape.*get the model zoo's"),
        (average, "AveragePool; expected MaxPool"),
        (set_attribute("n0", "strides", [4, 4]), r"Conv node n0: its strides is \[4, 4\]; expected \(2, 2\)"),
        (set_attribute("n0", "auto_pad", "SAME_UPPER"), "auto_pad"),
        (set_attribute("n3", "ceil_mode", 1), "ceil_mode is 1"),
        (set_attribute("n2", "alpha", 1e-4), "LRN node n2: its alpha"),
        (set_attribute("n16", "transB", 0), "transB is 0"),
        (without_attribute, r"strides is \(1, 1\); expected \(2, 2\)"),
        (swap_weights, "gpu_0/conv4_w_0.*expected.*gpu_0/conv3_w_0"),
        (bypass, "takes r7"),
        (shorten, "21 nodes; expected 22"),
    ],
)
def test_another_graph_is_refused_with_the_node_and_the_reason(tmp_path, edit, words):
    def with_weights(graph: onnx.GraphProto) -> None:
        for constant in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
            # No numbers needed: the graph is checked before them.
            graph.initializer.append(onnx.TensorProto(name=constant.output[0], data_type=1, dims=[0]))
            graph.node.remove(constant)
        edit(graph)

    path = edited(tmp_path, edit if "made by" in words else with_weights)
    with pytest.raises(RuntimeError, match=words):
        read_onnx(path)


def test_an_attribute_left_to_its_default_is_what_it_means(trained, tmp_path):
    """Exporters differ in what they write: pads of zero and a dilation of one may be missing or written."""

    def edit(graph: onnx.GraphProto) -> None:
        conv = node(graph, "n0")
        kept = [a for a in conv.attribute if a.name != "pads"]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute("dilations", [1, 1])])

    with pytest.raises(RuntimeError, match="made by ConstantOfShape"):  # past the attributes, to the weights
        read_onnx(edited(tmp_path, edit))


def test_the_zoos_file_is_a_model_by_its_path(trained):
    loaded = load_model(str(trained))
    assert loaded.weights == str(trained) and not loaded.random and loaded.input_size == (224, 224)
    stored = {t.name: t for t in onnx.load(trained).graph.initializer}
    for name in ("conv3", "fc8"):
        kept = numpy_helper.to_array(stored[f"gpu_0/{name}_w_0"])
        np.testing.assert_array_equal(loaded.model.get_parameter(f"{name}.weight").detach(), kept)
    with pytest.raises(RuntimeError, match=r"fc8.weight \(1000, 1024\), the model \(10, 1024\).*num_classes"):
        zfnet512(trained, num_classes=10)


def test_the_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zfcuda\[onnx\]'"):
        read_onnx(LIGHT)


def test_what_is_not_onnx_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(RuntimeError, match="not an ONNX file"):
        read_onnx(path)


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3))


SAVED = {
    "plain.pth": lambda state, path: torch.save(state, path),
    "nested.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path),
    "model.tar": lambda state, path: torch.save({"model": state}, path),
    "parallel.pth": lambda state, path: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path),
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain.safetensors": lambda state, path: safetensors.torch.save_file(state, path),
    "parallel.safetensors": lambda state, path: safetensors.torch.save_file(
        {f"module.{k}": v for k, v in state.items()}, path
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_is_loaded(tmp_path, name):
    saved, net = small(0), small(1)
    SAVED[name](saved.state_dict(), tmp_path / name)
    assert load_weights(net, tmp_path / name) == ([], [])
    for key, tensor in saved.state_dict().items():
        assert torch.equal(net.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda s: s.pop("0.bias"), "lacks 0.bias.*strict=False"),
        (lambda s: s.update(extra=torch.ones(1)), "has beyond the model extra"),
        (lambda s: s.update({"2.bias": torch.ones(5)}), r"2.bias \(5,\), the model \(2,\).*num_classes"),
        (
            lambda s: [s.update({f"backbone.{k}": s.pop(k)}) for k in list(s)],
            r"lacks 0.weight.*and 3 more.*beyond the model backbone.0.weight.*prefix",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, edit, words):
    state, net = dict(small(0).state_dict()), small(1)
    edit(state)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=words):
        load_weights(net, tmp_path / "w.pth")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_not_strict_leaves_alone_what_the_other_side_lacks(tmp_path):
    state, net = dict(small(0).state_dict()), small(1)
    own = state.pop("0.bias") * 0 + net.state_dict()["0.bias"]
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "w.pth")
    assert load_weights(net, tmp_path / "w.pth", strict=False) == (["0.bias"], ["extra"])
    assert torch.equal(net.state_dict()["0.bias"], own)
    assert torch.equal(net.state_dict()["0.weight"], state["0.weight"])
    torch.save({**state, "2.bias": torch.ones(5)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"other shapes 2\.bias"):
        load_weights(net, tmp_path / "w.pth", strict=False)


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    proof = tmp_path / "ran"
    evil = {"state_dict": {**small().state_dict(), "x": Malicious(proof)}}
    torch.save(evil, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert proof.exists()  # it would
    proof.unlink()
    for load in (load_weights, lambda net, path: load_model("alexnet", path)):
        with pytest.raises(RuntimeError, match="refused, as it holds more than tensors"):
            load(small(), tmp_path / "evil.pth")
    assert not proof.exists()


def test_a_pickled_model_is_refused_with_the_remedy(tmp_path):
    torch.save(small(), tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match=r"more than tensors: .*Sequential.*state_dict\(\)"):
        load_weights(small(), tmp_path / "model.pth")


@pytest.mark.parametrize(
    "name, contents, words",
    [
        ("w.pth", b"", "incomplete"),
        ("w.pth", b"<html>", "w.pth is"),
        ("w.safetensors", b"<html>", "not a safetensors file"),
        ("w.pth", pickle.dumps([1], protocol=2), "w.pth is"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(RuntimeError, match=words):
        load_weights(small(), tmp_path / name)


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match="a dict of epoch, loss; expected a state dict"):
        load_weights(small(), tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(small(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "resnet18", "googlenet"])
def test_torchvisions_state_dicts_by_name(tmp_path, name):
    models = torchvision.load().models
    options = {"init_weights": False} if name == "googlenet" else {}
    theirs = models.get_model(name, weights=None, num_classes=7, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    loaded = load_model(name, tmp_path / "w.pth", num_classes=7)
    assert not loaded.random and loaded.weights == str(tmp_path / "w.pth")
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), theirs(images))


def test_googlenets_preprocessing_is_its_transform_input_undone():
    models = torchvision.load().models
    loaded = load_model("googlenet", num_classes=2)
    pixels = torch.rand(1, 3, 8, 8) * 255
    imagenet = load_model("alexnet", num_classes=2)

    def prepared(by) -> torch.Tensor:
        return (pixels - torch.tensor(by.mean)[:, None, None]) / torch.tensor(by.std)[:, None, None]

    theirs = models.googlenet(num_classes=2, transform_input=True, init_weights=False)
    torch.testing.assert_close(prepared(loaded), theirs._transform_input(prepared(imagenet)))


def test_published_weights_are_fetched_by_name(tmp_path, monkeypatch):
    models = torchvision.load().models
    net = models.squeezenet1_1()
    torch.save(net.state_dict(), tmp_path / "published.pth")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda url, **options: fetched(url, options))

    def fetched(url: str, options) -> dict[str, torch.Tensor]:
        assert url == models.SqueezeNet1_1_Weights.DEFAULT.url and options["weights_only"] and options["check_hash"]
        return torch.load(tmp_path / "published.pth", weights_only=True)

    loaded = load_model("squeezenet1_1", "DEFAULT")
    assert "IMAGENET1K_V1" in loaded.weights and not loaded.random
    assert torch.equal(loaded.model.get_parameter("features.0.weight"), net.get_parameter("features.0.weight"))


def test_random_weights_are_those_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    nets = [load_model("alexnet", num_classes=2, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    first, same, other = (net.model.get_parameter("features.0.weight") for net in nets)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert all(net.random and not net.model.training for net in nets)


def test_the_demos_network_is_that_of_its_checkpoint(tmp_path, monkeypatch):
    training = Training(TINY, 8)
    Stages(tmp_path / "zfcuda-demo/state").save("training", {**vars(TINY), "classes": 8, "pool": 48}, training.state())
    monkeypatch.chdir(tmp_path)
    for spec in ("demo", "zfcuda-demo/state/training.pt"):
        loaded = load_model(spec)
        assert loaded.input_size == (64, 64) and not loaded.random and "0 of 6" in loaded.weights
        for name, parameter in training.net.named_parameters():
            assert torch.equal(loaded.model.get_parameter(name), parameter)
        crops = torch.rand(2, 3, 64, 64) * 200
        values = loaded.normalise(crops)
        torch.testing.assert_close(values.mean((2, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert load_model("demo", mean=128).normalise is None
    with pytest.raises(ValueError, match="leave out weights"):
        load_model("demo", "w.pth")
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match="does not tell its network"):
        load_model(tmp_path / "w.pth")


def test_a_factory_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "def build(num_classes=3):\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(1, num_classes, 3))\n"
        "    net.input_size, net.mean, net.std = 40, (100,), (50,)\n"
        "    return net\n"
        "ready = build(2)\n"
        "text = str\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    loaded = load_model("my_nets:build", num_classes=5)
    assert loaded.model[0].out_channels == 5 and loaded.input_size == (40, 40)
    assert (loaded.mean, loaded.std) == ((100.0,), (50.0,)) and not loaded.random
    assert load_model("my_nets:ready", input_size=(8, 9)).input_size == (8, 9)
    for spec, words in (("my_nets:nothing", "nothing"), ("no_such_module:x", "no_such_module")):
        with pytest.raises(ImportError, match=words):
            load_model(spec)
    with pytest.raises(ValueError, match="gives a str"):
        load_model("my_nets:text")
    with pytest.raises(ValueError, match="is a module already"):
        load_model("my_nets:ready", num_classes=5)


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        (("vg16",), {}, ValueError, "Did you mean vgg16"),
        (("alexnet", "nope.pth"), {}, FileNotFoundError, "neither a file nor published for alexnet: IMAGENET1K_V1"),
        (("zfnet", "nope.pth"), {}, FileNotFoundError, "not a file"),
        (("net.onnx", "w.pth"), {}, ValueError, "brings its own"),
        (("demo",), {}, FileNotFoundError, "run `zfcuda demo` first"),
        (("alexnet",), {"std": 0}, ValueError, "std is 0"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(tmp_path, monkeypatch, arguments, options, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        load_model(*arguments, **options)


def test_zfnet512_has_the_sizes_of_its_graph():
    with torch.device("meta"):
        net = zfnet512()
        features_of = features(net, torch.empty(2, 3, 224, 224))
    sizes = {name: tuple(t.shape[1:]) for name, t in features_of.items()}
    assert sizes["conv1"] == (96, 109, 109) and sizes["pool1"] == (96, 54, 54) and sizes["conv2"] == (256, 25, 25)
    assert sizes["pool5"] == (512, 6, 6) and sizes["fc7"] == (1024,) and sizes["fc8"] == (1000,)
    assert sum(p.numel() for p in net.parameters()) == 87_250_536
    assert list(sizes).index("norm1") < list(sizes).index("pool1")


def test_importing_the_library_imports_no_optional_package():
    code = "import sys, zfcuda; print([m for m in ('onnx', 'torchvision', 'safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
