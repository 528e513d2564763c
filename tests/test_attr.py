"""Attribution with captum's arguments: equal to captum where it is right, and different where it is not."""

import inspect

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from test_deconvnet import randomise
from torch import nn

import zfcuda.attr
from zfcuda.models import torchvision as loader

pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks")

OUTPUT = ["Deconvolution", "GuidedBackprop"]
NEURON = ["NeuronDeconvolution", "NeuronGuidedBackprop"]


def chain():
    """ReLU modules, overlapping pools, no normalisation: what captum supports."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(),
        nn.Linear(8 * 9, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    return randomise(net).double().eval()


def images(size=29):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def close(got, want, rel=1e-12):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert want.abs().max() > 0, "captum's is zero everywhere; the test says nothing"
    assert (got - want).abs().max() <= rel * want.abs().max()


def both(name, *arguments):
    return [getattr(package, name)(*arguments) for package in (zfcuda.attr, captum.attr)]


@pytest.mark.parametrize("name", [*OUTPUT, *NEURON])
@pytest.mark.parametrize("method", ["__init__", "attribute"])
def test_arguments_have_captums_names_order_and_defaults(name, method):
    ours, theirs = (
        [
            (p.name, p.default, p.kind)
            for p in inspect.signature(getattr(getattr(package, name), method)).parameters.values()
        ]
        for package in (zfcuda.attr, captum.attr)
    )
    assert ours == theirs


TARGETS = [
    3, torch.tensor(2), torch.tensor([4]), torch.tensor([0, 4, 2]), [1, 1, 3], [(0,), (4,), (2,)], (2,), -1
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", OUTPUT)
def test_targets_equal_captum(name, target):
    ours, theirs = both(name, chain())
    x = images()
    close(ours.attribute(x, target), theirs.attribute(x.clone().requires_grad_(), target).detach())
    assert not x.requires_grad


@pytest.mark.parametrize("name", OUTPUT)
def test_targets_of_maps_and_of_single_outputs_equal_captum(name):
    maps, x = chain()[:5], images()
    for target in [(2, 1, 0), [(1, 0, 2), (7, 1, 1), (0, 0, 0)]]:
        ours, theirs = both(name, maps)
        close(ours.attribute(x, target), theirs.attribute(x.clone().requires_grad_(), target).detach())
    ours, theirs = both(name, nn.Sequential(*chain(), randomise(nn.Linear(5, 1)).double()))
    close(ours.attribute(x), theirs.attribute(x.clone().requires_grad_()).detach())


@pytest.mark.parametrize("name", OUTPUT)
def test_a_tuple_gives_a_tuple(name):
    ours, theirs = both(name, chain())
    x = images()
    (got,), (want,) = ours.attribute((x,), target=1), theirs.attribute((x.clone().requires_grad_(),), target=1)
    close(got, want.detach())


LAYERS = [
    ("0", (2, 3, 4)),  # before its ReLU
    ("1", (2, 3, 4)),
    ("2", (1, slice(0, 2), slice(None))),
    ("3.0", (5, 2, 2)),
    ("3", (5, 2, 2)),  # a module that holds others
    ("4", lambda map_: map_.amax((1, 2, 3))),
    ("4", lambda map_: (map_**2).sum()),
    ("5", (3, 1, 1)),
    ("6", 9),
    ("7", (4,)),
    ("8", 5),
    ("9", 2),
]


@pytest.mark.parametrize("layer, selector", LAYERS)
@pytest.mark.parametrize("name", NEURON)
def test_neurons_equal_captum(name, layer, selector):
    net, x = chain(), images()
    ours, theirs = both(name, net, net.get_submodule(layer))
    close(ours.attribute(x, selector), theirs.attribute(x.clone().requires_grad_(), selector).detach())


@pytest.mark.parametrize("layer, selector", [("0", (1, 20, 20)), ("1", (2, 3, 4)), ("4", (5, 2, 2)), ("9", 8)])
@pytest.mark.parametrize("name", NEURON)
def test_inputs_of_neurons_equal_captum(name, layer, selector):
    net, x = chain(), images()
    ours, theirs = both(name, net, net.get_submodule(layer))
    want = theirs.attribute(x.clone().requires_grad_(), selector, attribute_to_neuron_input=True)
    close(ours.attribute(x, selector, attribute_to_neuron_input=True), want.detach())


@pytest.mark.parametrize("name", OUTPUT)
def test_residual_networks_equal_captum(name):
    torch.manual_seed(0)
    models = loader.load().models
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).double().eval()
    # captum's hooks and ReLU in place do not go together, nor do modules used twice.
    for block in [m for m in net.modules() if isinstance(m, models.resnet.BasicBlock)]:
        block.relu, block.bn1 = nn.Identity(), nn.Sequential(block.bn1, nn.ReLU())
    net.relu = nn.ReLU()
    x = images(32)
    ours, theirs = both(name, net)
    close(ours.attribute(x, 1), theirs.attribute(x.clone().requires_grad_(), 1).detach(), 1e-10)


class Functional(nn.Module):
    """The same network with ``F.relu`` in its forward()."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for m in self.net:
            x = F.relu(x) if isinstance(m, nn.ReLU) else m(x)
        return x


@pytest.mark.parametrize("name", OUTPUT)
def test_functional_relu_is_a_gate_where_captum_gives_the_plain_gradient(name):
    net = nn.Sequential(*chain()[:3], *chain()[3], *chain()[4:])
    x = images().requires_grad_()
    ours, theirs = both(name, Functional(net))
    gradient = torch.autograd.grad(net(x)[:, 3].sum(), x)[0]
    close(theirs.attribute(x, 3).detach(), gradient)
    got = ours.attribute(x, 3)
    close(got, getattr(captum.attr, name)(net).attribute(x, 3).detach())
    assert (got - gradient).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("name", OUTPUT)
def test_contrast_normalisation_is_skipped_where_captum_goes_through_its_gradient(name):
    class Skipped(nn.LocalResponseNorm):
        def forward(self, x):
            return x + (super().forward(x) - x).detach()

    options = {"alpha": 5.0, "k": 2.0}
    net, skipped = chain(), chain()
    net.insert(3, nn.LocalResponseNorm(5, **options))
    skipped.insert(3, Skipped(5, **options))
    x = images().requires_grad_()
    got = getattr(zfcuda.attr, name)(net).attribute(x, 3)
    close(got, getattr(captum.attr, name)(skipped).attribute(x, 3).detach())
    captums = getattr(captum.attr, name)(net).attribute(x, 3).detach()
    assert (got - captums).norm() > 0.1 * got.norm()


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.unused = nn.Conv2d(3, 3, 1), nn.Dropout(), nn.ReLU()
        self.block = nn.Sequential(nn.ReLU())

    def forward(self, x):
        return self.drop(self.block(self.conv(self.drop(self.block(self.conv(x))))))


@pytest.mark.parametrize("layer", ["conv", "drop", "block", "block.0"])
def test_a_layer_that_is_used_twice_is_refused(layer):
    model = Repeats()
    with pytest.raises(ValueError, match=f"layer {layer} is used more than once"):
        zfcuda.attr.NeuronDeconvolution(model, model.get_submodule(layer))


def test_what_cannot_be_honoured_raises():
    net, x = chain(), images()
    output, neuron = zfcuda.attr.Deconvolution(net), zfcuda.attr.NeuronDeconvolution(net, net[3])
    with pytest.raises(TypeError, match="additional_forward_args"):
        output.attribute(x, 1, additional_forward_args=(2,))
    with pytest.raises(TypeError, match="additional_forward_args"):
        neuron.attribute(x, (1, 1, 1), x)
    with pytest.raises(TypeError, match="inputs is tuple"):
        output.attribute((x, x), 1)
    with pytest.raises(TypeError, match=r"inputs is \(3, 29, 29\)"):
        output.attribute(x[0], 1)
    with pytest.raises(RuntimeError, match=r"target is None.*\(3, 5\).*one number for each image"):
        output.attribute(x)
    with pytest.raises(RuntimeError, match=r"target.*\(2,\).*3 images"):
        output.attribute(x, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="target has 2 entries"):
        output.attribute(x, [1, 2])
    with pytest.raises(TypeError, match=r"target is 1\.5"):
        output.attribute(x, 1.5)
    with pytest.raises(IndexError):
        output.attribute(x, 5)
    with pytest.raises(RuntimeError, match=r"neuron_selector is 2.*\(3, 8, 6, 6\)"):
        neuron.attribute(x, 2)
    with pytest.raises(TypeError, match=r"attribute_to_neuron_input.*Sequential"):
        neuron.attribute(x, (1, 1, 1), attribute_to_neuron_input=True)
    with pytest.raises(TypeError, match="device_ids"):
        zfcuda.attr.NeuronDeconvolution(net, net[0], device_ids=[0])
    with pytest.raises(ValueError, match="not a module of the model"):
        zfcuda.attr.NeuronDeconvolution(net, nn.ReLU())
    model = Repeats()
    with pytest.raises(ValueError, match=r"unused.*no part"):
        zfcuda.attr.NeuronGuidedBackprop(model, model.unused)
    with pytest.raises(TypeError, match=r"LeakyReLU.*ReLU only"):
        zfcuda.attr.Deconvolution(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LeakyReLU()))
