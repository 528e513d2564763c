"""zfcuda.optimize: the same outputs, gradients and state dict by other operators; and what must not be touched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import zfcuda
from zfcuda.models import torchvision as loader

torchvision = loader.load()


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return sum(each == name for each in self.names)


def calls(model, x):
    with torch.no_grad(), Calls() as seen:
        model(x)
    return seen


def results(model, x):
    """Output and gradients, by fixed cotangents."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = model(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(7)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **{f"output {i}": o.detach() for i, o in enumerate(outputs)}, **gradients}


def assert_same(model, optimised, x, tolerance=1e-11):
    """In double precision, where other orders of summation leave nothing visible."""
    model, optimised, x = copy.deepcopy(model).double(), copy.deepcopy(optimised).double(), x.double()
    for training in (False, True):
        model.train(training)
        optimised.train(training)
        torch.manual_seed(3)
        expected = results(model, x)
        torch.manual_seed(3)
        actual = results(optimised, x)
        assert list(expected) == list(actual)
        for name, value in expected.items():
            scale = float(value.abs().max()) or 1.0
            torch.testing.assert_close(actual[name] / scale, value / scale, rtol=0, atol=tolerance, msg=name)


# ---------------------------------------------------------------- torchvision


#: What is replaced: convolutions with ReLU, those with a pool too, pools; and the size of images to run.
MODELS = {
    "alexnet": (2, 3, 0, 64),
    "vgg11": (3, 5, 0, 32),
    "squeezenet1_0": (25, 1, 2, 64),
    "googlenet": (0, 0, 13, 64),
    "resnet18": (0, 0, 1, 64),
}


def network(name):
    torch.manual_seed(0)
    options = {"weights": None, "num_classes": 10, **({"init_weights": True} if name == "googlenet" else {})}
    model = getattr(torchvision.models, name)(**options)
    if name in ("alexnet", "vgg11"):  # 100 million weights of linear layers would take minutes in double precision
        model.classifier = nn.Linear(next(m for m in model.classifier if isinstance(m, nn.Linear)).in_features, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_torchvisions_networks(name):
    model = network(name).eval()
    optimised = zfcuda.optimize(model)
    fused, pooled, pools, size = MODELS[name]
    x = torch.randn(2, 3, size, size)
    seen = calls(optimised, x)
    assert seen.count("zfcuda::conv2d_relu") == fused
    assert seen.count("zfcuda::conv2d_relu_max_pool2d") == pooled
    replaced = optimised.zfcuda_report.replaced
    assert len(replaced) == fused + pooled + pools
    assert sum(each.now == "zfcuda.nn.FastestMaxPool2d" for each in replaced) == pools
    assert_same(model, optimised, x)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_is_the_same(name):
    model = network(name)
    optimised = zfcuda.optimize(model)
    assert list(optimised.state_dict()) == list(model.state_dict())
    assert [n for n, _ in optimised.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(a is b for a, b in zip(optimised.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(optimised.buffers(), model.buffers(), strict=True))
    other = network(name)
    for p in other.parameters():
        nn.init.normal_(p)
    optimised.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.load_state_dict(zfcuda.optimize(model).state_dict())


# ---------------------------------------------------------------- however it is written


class Net(nn.Module):
    """A convolution, what ``rectify(self, x)`` makes of it, and perhaps of that a pool."""

    def __init__(self, rectify, pool=None):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        if pool is not None:
            self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.last = nn.Conv2d(4, 2, 1)
        self.rectify, self.pooled = rectify, pool or (lambda self, x: x)

    def forward(self, x):
        return self.last(self.pooled(self, self.rectify(self, self.conv(x))))


def statement(in_place):
    """In place, and the result not used."""

    def rectify(self, x):
        in_place(self, x)
        return x

    return rectify


RELUS = {
    "module": lambda self, x: self.relu(x),
    "module, in place": lambda self, x: self.relu_(x),
    "F.relu": lambda self, x: F.relu(x),
    "F.relu, in place": lambda self, x: F.relu(x, inplace=True),
    "F.relu_": lambda self, x: F.relu_(x),
    "torch.relu": lambda self, x: torch.relu(x),
    "torch.relu_": lambda self, x: torch.relu_(x),
    "method": lambda self, x: x.relu(),
    "method, in place": lambda self, x: x.relu_(),
    "statement": statement(lambda self, x: x.relu_()),
    "statement of a module": statement(lambda self, x: self.relu_(x)),
    "twice": lambda self, x: F.relu(self.relu(x)),
}
POOLS = {
    "module": lambda self, x: self.pool(x),
    "F.max_pool2d": lambda self, x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "torch.max_pool2d": lambda self, x: torch.max_pool2d(x, 3, 2, 0, 1, True),
    "F.max_pool2d, by name": lambda self, x: F.max_pool2d(input=x, kernel_size=(2, 3), padding=(1, 0)),
}
X = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("pool", [None, *POOLS])
@pytest.mark.parametrize("relu", RELUS)
def test_however_relu_and_pool_are_written(relu, pool):
    model = Net(RELUS[relu], POOLS.get(pool))
    optimised = zfcuda.optimize(model)
    seen = calls(optimised, X)
    assert seen.count("zfcuda::conv2d_relu_max_pool2d" if pool and relu != "twice" else "zfcuda::conv2d_relu") == 1
    if relu != "twice":
        assert not any("relu" in name for name in seen.names if name.startswith("aten"))
        assert not any("max_pool" in name for name in seen.names if name.startswith("aten"))
    assert_same(model, optimised, X)


def test_a_relu_that_is_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True)

        def forward(self, x):
            x = self.relu(self.first(x))
            return self.relu(self.second(x) + x)

    model = Shared()
    optimised = zfcuda.optimize(model)
    assert [r.name for r in optimised.zfcuda_report.replaced] == ["first"]
    assert calls(optimised, X).names.count("aten::relu_") == 1
    assert_same(model, optimised, X)


def test_what_else_is_done_in_place():
    class Sums(Net):
        def forward(self, x):
            x = F.relu(self.conv(x))
            y = x
            x += 1
            x.mul_(2)
            return self.last(x + y)

    model = Sums(None).requires_grad_(False)  # autograd refuses to change what ReLU keeps
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == 1
    torch.testing.assert_close(optimised(X), model(X))


def test_shared_parameters_and_modules():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    tied = nn.Conv2d(3, 3, 3, padding=1)
    tied.weight = shared.weight
    block = nn.Sequential(shared, nn.ReLU())
    model = nn.Sequential(block, block, tied, nn.ReLU(), shared)
    optimised = zfcuda.optimize(model)
    assert optimised[0] is optimised[1] and optimised[0][0] is optimised[4]
    assert optimised[2].weight is optimised[4].weight is shared.weight
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == 3
    assert_same(model, optimised, X)


def test_normalisation_and_pools_alone():
    class Functions(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.local_response_norm(x, 3, 0.1, k=2.0), 2, return_indices=False)

    modules = nn.Sequential(nn.LocalResponseNorm(3, 0.1, 0.75, 2.0), nn.MaxPool2d(2))
    large = torch.randn(2, 4, 64, 64)  # 32,768 numbers
    for model in (modules, Functions()):
        optimised = zfcuda.optimize(model)
        ours = [name for name in calls(optimised, large).names if name.startswith("zfcuda")]
        assert ours == ["zfcuda::local_response_norm", "zfcuda::max_pool2d"]
        assert_same(model, optimised, large)
        last, little = large.contiguous(memory_format=torch.channels_last), large[:, :, :8, :8]
        larger = torch.randn(2, 4, 256, 256)
        for x, inference, training in ((large, 1, 0), (last, 1, 0), (little, 0, 0), (larger, 1, 1)):
            assert calls(optimised, x).count("zfcuda::max_pool2d") == inference
            with Calls() as seen:
                optimised(x.clone(memory_format=torch.preserve_format).requires_grad_())
            assert seen.count("zfcuda::max_pool2d") == training
            assert_same(model, optimised, x)


class Layer(nn.Module):
    """A convolution with all that may follow it: ``norm(self, x)`` of ``pool(self, x)`` of the rectified maps."""

    def __init__(self, pool, norm, conv=None, rectify=torch.relu):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 6, 3)
        self.rectify, self.pooled, self.normed = rectify, pool, norm
        self.pool, self.norm = nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5, 0.5, 0.75, 2.0)
        self.our_pool, self.our_norm = zfcuda.nn.MaxPool2d(3, 2), zfcuda.nn.LocalResponseNorm(5, 0.5, 0.75, 2.0)
        self.switching = zfcuda.nn.MaxPool2d(3, 2, return_switches=True)

    def forward(self, x):
        return self.normed(self, self.pooled(self, self.rectify(self.conv(x))))


LAYER_POOLS = {
    "module": lambda self, x: self.pool(x),
    "ours": lambda self, x: self.our_pool(x),
    "function": lambda self, x: F.max_pool2d(x, 3, 2),
}
LAYER_NORMS = {
    "module": lambda self, x: self.norm(x),
    "ours": lambda self, x: self.our_norm(x),
    "function": lambda self, x: F.local_response_norm(x, 5, 0.5, k=2.0),
    "our function": lambda self, x: zfcuda.ops.local_response_norm(x, 5, 0.5, k=2.0),
}


@pytest.mark.parametrize("norm", LAYER_NORMS)
@pytest.mark.parametrize("pool", LAYER_POOLS)
def test_a_whole_layer(pool, norm):
    """However pool and normalisation are written."""
    model = Layer(LAYER_POOLS[pool], LAYER_NORMS[norm])
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).names == ["zfcuda::conv2d_relu_max_pool2d_norm"]
    (replaced,) = [r for r in optimised.zfcuda_report.replaced if r.name == "conv"]
    assert replaced.now == "zfcuda.ops.conv2d_relu_max_pool2d_norm" and len(replaced.joined) == 3
    assert_same(model, optimised, X)


NOT_NORMED = {
    "elsewhere": lambda self, x: self.norm(x) + x,
    "not behind the pool": lambda self, x: self.norm(x.neg()),
    "twice": lambda self, x: (self.norm(x), self.our_norm(x)),
    "no constant": lambda self, x: F.local_response_norm(x, x.size(1), 0.5),
}


@pytest.mark.parametrize("norm", NOT_NORMED)
def test_a_normalisation_that_is_not_the_layers(norm):
    model = Layer(LAYER_POOLS["module"], NOT_NORMED[norm])
    optimised = zfcuda.optimize(model)
    seen = calls(optimised, X)
    assert (seen.count("zfcuda::conv2d_relu_max_pool2d"), seen.count("zfcuda::conv2d_relu_max_pool2d_norm")) == (1, 0)
    assert_same(model, optimised, X)


def test_layers_of_our_own_modules():
    """Which have their ReLU already; alone they stay, and so does a pool that gives its switches."""
    for pool, name in ((LAYER_POOLS["ours"], "conv2d_relu_max_pool2d_norm"), (lambda self, x: x, "conv2d_relu")):
        model = Layer(pool, LAYER_NORMS["ours"], zfcuda.nn.ConvReLU2d(3, 6, 3), rectify=lambda x: x)
        optimised = zfcuda.optimize(model)
        assert calls(optimised, X).names[0] == f"zfcuda::{name}"
        assert_same(model, optimised, X)
    for pool in (lambda self, x: self.switching(x)[0], lambda self, x: zfcuda.ops.max_pool2d(x, 3, 2)[0]):
        model = Layer(pool, LAYER_NORMS["ours"], zfcuda.nn.ConvReLU2d(3, 6, 3), rectify=lambda x: x)
        seen = calls(zfcuda.optimize(model), X).names
        assert seen == ["zfcuda::conv2d_relu", "zfcuda::max_pool2d", "zfcuda::local_response_norm"]

    hooked = Layer(LAYER_POOLS["ours"], LAYER_NORMS["ours"], zfcuda.nn.ConvReLU2d(3, 6, 3), rectify=lambda x: x)
    hooked.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert "zfcuda::conv2d_relu" in calls(zfcuda.optimize(hooked), X).names
    assert_same(hooked, zfcuda.optimize(hooked), X)


def test_zfnet():
    """Layers 1 and 2 as one operator each, layer 5 with its pool; the same bits, and once more of the result."""
    net = zfcuda.models.zfnet(widths=(4, 6, 4, 4, 5), fc_width=8, num_classes=3).eval()
    optimised = zfcuda.optimize(net)
    images = torch.randn(1, 3, 224, 224)
    for fast in (optimised, zfcuda.optimize(optimised)):
        names = [name for name in calls(fast, images).names if name.startswith("zfcuda")]
        operators = ["conv2d_relu_max_pool2d_norm"] * 2 + ["conv2d_relu"] * 2 + ["conv2d_relu_max_pool2d"]
        assert names == [f"zfcuda::{name}" for name in operators]
        assert torch.equal(fast(images), net(images))
    assert not optimised.zfcuda_report.left


@pytest.mark.parametrize("module", [nn.MaxPool2d(2), nn.LocalResponseNorm(3), nn.Conv2d(3, 2, 3), nn.Identity()])
def test_a_layer_by_itself(module):
    assert_same(module, zfcuda.optimize(module), X)


# ---------------------------------------------------------------- left alone


def left(model, x=X, names=("conv",)):
    """Optimise, compare; the reasons for what was left."""
    optimised = zfcuda.optimize(model)
    assert_same(model, optimised, x)
    reasons = {each.name: each.reason for each in optimised.zfcuda_report.left}
    return " | ".join(reasons[name] for name in names)


def test_what_comes_before_the_relu_is_used_elsewhere():
    assert "add() uses its output before" in left(Net(lambda self, x: self.relu(x) + x))
    assert "clone() uses its output before" in left(Net(lambda self, x: (x.clone(), x.relu_())[0]))
    assert "Conv2d follows it" in left(Net(lambda self, x: x))

    class Both(Net):
        def forward(self, x):
            x = self.conv(x)
            return self.last(F.relu(x)), x

    assert "the end of the forward() uses its output before" in left(Both(None))


def test_a_convolution_that_is_not_quite_one():
    class Mine(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    def with_conv(conv):
        model = Net(RELUS["module"])
        model.conv = conv
        return model

    assert "derived from Conv2d" in left(with_conv(Mine(3, 4, 3)))
    assert "padding_mode is 'circular'" in left(with_conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")))
    patched = nn.Conv2d(3, 4, 3)
    patched.forward = lambda x: x[:, :1].expand(-1, 4, -1, -1)
    assert "derived from Conv2d" in left(with_conv(patched))


@pytest.mark.parametrize("pool", [None, "module"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_modes_of_padding(padding, pool):
    """For a kernel that asks for more padding on one side, too."""
    model = Net(RELUS["module"], POOLS.get(pool))
    model.conv = nn.Conv2d(3, 4, (2, 3), padding=padding, dilation=(1, 2))
    optimised = zfcuda.optimize(model)
    assert "conv" in {entry.name for entry in optimised.zfcuda_report.replaced}
    assert_same(model, optimised, X)


@pytest.mark.parametrize("parametrise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrisations(parametrise):
    model = Net(RELUS["module"])
    parametrise(model.conv)
    model.eval()
    optimised = zfcuda.optimize(model)
    assert "parametrised" in next(each.reason for each in optimised.zfcuda_report.left if each.name == "conv")
    assert torch.equal(optimised(X), model(X))
    assert list(optimised.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["conv", "relu", "pool", ""])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_see_what_they_saw(name, register):
    seen = []

    def look(module, *values):
        seen.append([v.clone() for value in values for v in (value if isinstance(value, tuple) else (value,))])

    model = Net(RELUS["module"], POOLS["module"])
    getattr(model.get_submodule(name), register)(look)
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == (name == "pool")
    assert calls(optimised, X).count("zfcuda::conv2d_relu_max_pool2d") == (name == "")
    seen.clear()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    optimised(x).sum().backward()
    expected, actual = seen
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


# ---------------------------------------------------------------- forwards that a recording would change


class Modes(Net):
    """The classic form: dropout by the module's own mode."""

    def forward(self, x):
        return self.last(F.dropout(F.relu(self.conv(x)), 0.5, self.training))


def test_the_mode_stays_a_switch():
    model = Modes(None).eval()
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == 1
    assert not optimised.training
    assert_same(model, optimised, X)


def test_modes_and_flags_are_kept_and_independent():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model[1].eval()
    model[3].weight.requires_grad_(False)
    optimised = zfcuda.optimize(model)
    assert [m.training for m in optimised.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in optimised.parameters()] == [True, True, True, True, False, True]
    optimised.eval()
    assert model.training and model[2].training


class ByMode(Net):
    def forward(self, x):
        return self.last(F.relu(self.conv(x)) if self.training else F.relu(self.conv(x)) * 2)


class ByChildsMode(Net):
    def forward(self, x):
        return self.last(F.dropout(F.relu(self.conv(x)), 0.5, self.relu.training))


class ByFlag(Net):
    def forward(self, x, double=False):
        return self.last(F.relu(self.conv(x)) * (2 if double else 1))


class ByNone(Net):
    def forward(self, x, added=None):
        x = self.conv(x)
        return self.last(F.relu(x if added is None else x + added))


class ByType(Net):
    def forward(self, x):
        x = torch.cat([x]) if isinstance(x, torch.Tensor) else torch.cat(x)
        return self.last(F.relu(self.conv(x)))


class ByValue(Net):
    def forward(self, x):
        return self.last(F.relu(self.conv(x)) if x.sum() > 0 else F.relu(self.conv(-x)))


class Detached(Net):
    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.conv(x))
        return self.last(x)


class Remembers(Net):
    def forward(self, x):
        self.seen = F.relu(self.conv(x))
        return self.last(self.seen)


class Appends(Net):
    def __init__(self, rectify):
        super().__init__(rectify)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.last(F.relu(self.conv(x)))


class MakesTensors(Net):
    def forward(self, x):
        return self.last(F.relu(self.conv(x)) * torch.rand(()))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByMode, "in training is not what it does in evaluation"),
        (ByChildsMode, "depends on the mode of a module within"),
        (ByFlag, "symbolically traced"),
        (ByNone, "or on its optional arguments"),
        (ByType, "asks for the type"),
        (ByValue, "symbolically traced"),
        (Detached, "switches gradients"),
        (Remembers, "it sets seen"),
        (Appends, "it sets seen"),
        (MakesTensors, "it sets _tensor_constant0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forwards_that_do_more_than_a_recording_says(kind, reason):
    model = kind(None)
    optimised = zfcuda.optimize(model)
    assert type(optimised) is kind
    (whole, *convolutions) = optimised.zfcuda_report.left
    assert whole.name == "" and reason in whole.reason
    assert [each.name for each in convolutions] == ["conv", "last"]
    assert "no forward()" in convolutions[0].reason
    assert vars(optimised).keys() - {"zfcuda_report"} == vars(model).keys()
    assert not getattr(model, "seen", []) and not getattr(optimised, "seen", [])
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert torch.equal(optimised(X), expected)


def test_modules_within_one_that_cannot_be_followed_are_optimised():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.features = Net(RELUS["F.relu"]), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())

        def forward(self, x):
            for layer in self.features if x.sum() > 1e9 else [self.block, *self.features]:
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    x = x + 1
            return x

    model = Outer()
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == 1, "the Sequential is not called, but taken apart"
    assert [r.name for r in optimised.zfcuda_report.replaced] == ["block.conv", "features.0"]
    assert_same(model, optimised, X)


def test_arguments_that_do_not_matter_to_the_calls():
    class Optional(Net):
        def forward(self, x, unused=None, scale=2.0):
            return self.last(F.relu(self.conv(x))) * scale

    model = Optional(None)
    optimised = zfcuda.optimize(model)
    assert calls(optimised, X).count("zfcuda::conv2d_relu") == 1
    torch.testing.assert_close(optimised(X, scale=3.0), model(X, scale=3.0))
    torch.testing.assert_close(optimised(X, None), model(X, None))


# ---------------------------------------------------------------- what can be done with the result


class Stacked(nn.Module):
    """Module level, so that it can be pickled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.LocalResponseNorm(3)
        )
        self.conv, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, input):
        return self.head(F.relu(self.conv(self.features(input))).mean((2, 3)))


def test_on_every_backend(backend):
    model = Stacked().to(backend.device)
    optimised = zfcuda.optimize(model)
    x = X.to(backend.device)
    expected, actual = results(model, x), results(optimised, x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_copies_and_pickles(tmp_path):
    optimised = zfcuda.optimize(Stacked())
    torch.save(optimised, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(optimised),
        pickle.loads(pickle.dumps(optimised)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(optimised)))),
    ):
        assert isinstance(other, Stacked) and isinstance(other.features, nn.Sequential)
        assert calls(other, X).names == calls(optimised, X).names
        assert torch.equal(other(X), optimised(X))
        assert other.zfcuda_report == optimised.zfcuda_report
        assert all(a is not b for a, b in zip(other.parameters(), optimised.parameters(), strict=True))


def test_compiles_into_one_graph():
    optimised = zfcuda.optimize(Stacked())
    torch.compiler.reset()
    compiled = torch.compile(optimised, fullgraph=True, backend="aot_eager")
    expected, actual = results(optimised, X), results(compiled, X)
    for (_, e), (_, a) in zip(expected.items(), actual.items(), strict=True):
        assert torch.equal(a, e)


def test_exports():
    optimised = zfcuda.optimize(Stacked()).eval()
    exported = torch.export.export(optimised, (X,))
    assert any("zfcuda" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(X), optimised(X))


def test_training_the_result_trains_the_model():
    model, alone = Stacked(), Stacked()
    for trained in (zfcuda.optimize(model), alone):
        optimiser = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimiser.zero_grad()
            trained(input=X).square().mean().backward()
            optimiser.step()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_is_not_changed():
    model = Stacked()
    before = pickle.dumps(model)
    zfcuda.optimize(model)
    assert pickle.dumps(model) == before
    assert not any(name.startswith("zfcuda") for name in calls(model, X).names)


def test_other_modules_bring_the_classs_forward_back():
    optimised = zfcuda.optimize(Stacked())
    first = optimised.features[0]
    assert [type(m) for m in optimised.features[:2]] == [nn.Conv2d, nn.ReLU]
    assert torch.equal(optimised.features[:2](X), first(X).relu())

    optimised.conv = nn.Identity()
    assert torch.equal(optimised(X), optimised.head(optimised.features(X).mean((2, 3))))
    for change in (
        lambda features: features.append(nn.Identity()),
        lambda features: features.insert(0, nn.Identity()),
        lambda features: features.__delitem__(2),
        lambda features: features.__setitem__(1, nn.Tanh()),
        lambda features: features.register_module("more", nn.Tanh()),
        lambda features: setattr(features, "more", nn.Tanh()),
        lambda features: features.pop(1),
    ):
        features = zfcuda.optimize(Stacked()).features
        change(features)
        expected = X
        for layer in features:
            expected = layer(expected)
        assert torch.equal(features(X), expected)


def test_twice_is_once():
    once = zfcuda.optimize(Stacked())
    twice = zfcuda.optimize(once)
    assert calls(twice, X).names == calls(once, X).names
    assert pickle.loads(pickle.dumps(twice))(X).equal(once(X))


def test_a_graph_module_and_batch_normalisation_that_was_folded():
    from torch.fx.experimental.optimization import fuse

    model = network("resnet18").eval()
    folded = fuse(model)
    optimised = zfcuda.optimize(folded)
    x = torch.randn(2, 3, 64, 64)
    assert calls(optimised, x).count("zfcuda::conv2d_relu") == 8
    assert calls(optimised, x).count("zfcuda::conv2d_relu_max_pool2d") == 1
    with torch.no_grad():
        expected = copy.deepcopy(folded).double()(x.double())
        torch.testing.assert_close(copy.deepcopy(optimised).double()(x.double()), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(pickle.loads(pickle.dumps(optimised))(x), optimised(x))


def test_fx_follows_the_result():
    for model in (Stacked(), nn.Sequential(nn.MaxPool2d(2)), Net(RELUS["method"], POOLS["F.max_pool2d"])):
        optimised = zfcuda.optimize(model)
        traced = torch.fx.symbolic_trace(optimised)
        assert calls(traced, X).names == calls(optimised, X).names
        assert torch.equal(traced(X), optimised(X))


def test_projections_of_the_result_are_the_models():
    model = network("alexnet").eval()
    x = torch.randn(1, 3, 64, 64)
    projected = []
    for each in (model, zfcuda.optimize(model)):
        deconvnet = zfcuda.DeconvNet(each)
        assert [layer.name for layer in deconvnet.layers][:3] == ["features.0", "features.2", "features.3"]
        projected.append(deconvnet.project(x, "features.3", 3))
    assert torch.equal(*projected)


def test_the_report():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        Modes(None),
    )
    report = zfcuda.optimize(model).zfcuda_report
    assert repr(report).splitlines() == [
        "2 replaced, 2 left",
        "  0.0     Conv2d → zfcuda.ops.conv2d_relu_max_pool2d  with 0.1, 0.2",
        "  3.conv  Conv2d → zfcuda.ops.conv2d_relu             with 3.relu()",
        "  1       Conv2d left                                 BatchNorm2d follows it, not a ReLU",
        "  3.last  Conv2d left                                 the end of the forward() follows it, not a ReLU",
    ]


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"model is a function; it must be a torch\.nn\.Module"):
        zfcuda.optimize(F.relu)


@pytest.mark.parametrize(
    ("channels", "maps", "groups", "faster"),
    [(8, 8, 4, True), (16, 16, 2, True), (8, 8, 8, False), (32, 32, 2, False), (8, 16, 4, False)],
)
def test_groups_are_replaced_where_that_is_faster(channels, maps, groups, faster):
    model = nn.Sequential(nn.Conv2d(channels, maps, 3, groups=groups), nn.ReLU())
    optimised = zfcuda.optimize(model)
    assert_same(model, optimised, torch.randn(2, channels, 6, 7))
    left = [entry.reason for entry in optimised.zfcuda_report.left]
    assert left == ([] if faster else [f"it has {groups} groups of a width for which torch's is faster"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype):
    """Outputs close to torch's, which round the same maps; torch keeps the bfloat16 convolutions of a CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU()).to(dtype)
    optimised = zfcuda.optimize(model)
    reasons = [each.reason for each in optimised.zfcuda_report.left]
    assert len(reasons) == (2 if dtype == torch.bfloat16 else 0) and all("bfloat16" in reason for reason in reasons)
    x = torch.randn(2, 3, 20, 20).to(dtype)
    expected = model(x)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert optimised(x).dtype == dtype and (optimised(x) - expected).abs().max() <= tolerance
