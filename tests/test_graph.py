"""Networks as graphs: torchvision's and small odd ones, against an oracle by autograd.

The oracle runs the model's own forward() under a TorchFunctionMode that gives ReLU and contrast normalisation the
backward of the deconvnet's rule, and lets autograd go down. It knows nothing of graphs: residual sums, concatenations,
batch normalisation and average pools are autograd's.
"""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

import zfcuda
from zfcuda.deconv.graph import trace
from zfcuda.models import torchvision as loader

torchvision = loader.load()
GATES = ["deconvnet", "backprop", "guided"]


class Rectify(Function):
    @staticmethod
    def forward(ctx, x, gate, inplace):
        ctx.gate, ctx.blocked = gate, x <= 0
        if inplace:
            ctx.mark_dirty(x)
            return x.clamp_(min=0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        if ctx.gate in ("deconvnet", "guided"):
            grad = grad.clamp(min=0)
        if ctx.gate in ("backprop", "guided"):
            grad = grad.masked_fill(ctx.blocked, 0)
        return grad, None, None


class Skip(Function):
    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Rules(TorchFunctionMode):
    """ReLU and contrast normalisation with the deconvnet's backward."""

    RELU = (F.relu, torch.relu, torch.Tensor.relu)
    RELU_ = (F.relu_, torch.relu_, torch.Tensor.relu_)

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.RELU or func in self.RELU_:
            inplace = func in self.RELU_ or kwargs.get("inplace", args[1] if len(args) > 1 else False)
            return Rectify.apply(args[0], self.gate, inplace)
        if func is F.local_response_norm:
            return Skip.apply(args[0], lambda x: func(x, *args[1:], **kwargs))
        return func(*args, **kwargs)


def maps_of(model, images, module=None, call=0, before=False):
    """The output of a module's call (or the input), or of the model; unharmed by what happens to it in place."""
    if module is None:
        return model(images)
    seen = []
    hooked = model.get_submodule(module)
    if before:
        handle = hooked.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    else:
        handle = hooked.register_forward_hook(lambda m, x, y: seen.append(y.clone()))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[call]


def strongest_units(map_, count=2):
    return map_.detach().flatten(2).amax(2).sum(0).topk(count).indices.tolist() if map_.dim() == 4 else [0, 1]


def oracle(model, images, gate, *where, **options):
    """Projections (N, 2, C, H, W) of the two strongest units, and these."""
    x = images.clone().requires_grad_()
    with Rules(gate):
        # Not x itself: a leaf cannot be changed in place.
        map_ = maps_of(model, x * 1, *where, **options)
    units = strongest_units(map_)
    values = map_[:, units].flatten(2).amax(2) if map_.dim() == 4 else map_[:, units]
    seeds = values.detach()
    projections = [torch.autograd.grad(values[:, u], x, seeds[:, u], retain_graph=True)[0] for u in range(2)]
    return torch.stack(projections, 1), units


def randomise(model, seed=0):
    """Weights that keep activations about 1; batch normalisation with statistics of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like, scale):
        return torch.randn(like.shape, generator=generator) * scale

    def uniform(like):
        return torch.rand(like.shape, generator=generator) + 0.5

    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.data = normal(module.bias, 0.1)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean, module.running_var = normal(module.running_mean, 0.3), uniform(module.running_mean)
            if module.affine:
                module.weight.data, module.bias.data = uniform(module.weight), normal(module.bias, 0.3)
    return model.double().eval()


def narrow(model):
    """The classifier of AlexNet and VGG with few units: their weights are hundreds of megabytes."""
    width = None
    for i, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            out = min(layer.out_features, 24)
            model.classifier[i] = nn.Linear(width or layer.in_features, out)
            width = out
    return model


@functools.cache
def network(name):
    """A network of torchvision with random weights, and two images."""
    models = torchvision.models
    with torch.device("meta"):
        if name == "bottleneck":
            net = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
        elif name in ("googlenet", "inception_v3"):
            net = getattr(models, name)(num_classes=10, init_weights=False, transform_input=True)
        else:
            net = getattr(models, name)(num_classes=10)
        if hasattr(net, "classifier") and name.startswith(("alexnet", "vgg")):
            net = narrow(net)
    size = 96 if name == "inception_v3" else 64
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return randomise(net), images


NETWORKS = [
    "alexnet", "vgg11", "vgg11_bn", "squeezenet1_0", "squeezenet1_1", "googlenet", "resnet18", "bottleneck",
    "densenet121",
]  # fmt: skip

# The layer's name, and where the oracle finds its map: the output of which module's which call.
LAYERS = [
    ("alexnet", "features.3", ("features.4",)),
    ("alexnet", "features.12", ("features.12",)),
    ("alexnet", "avgpool", ("avgpool",)),  # enlarges here: windows of different sizes
    ("alexnet", "classifier.4", ("classifier.5",)),
    ("vgg11", "features.8", ("features.9",)),
    ("vgg11", "classifier.6", ()),
    ("vgg11_bn", "features.4", ("features.6",)),
    ("vgg11_bn", "classifier.6", ()),
    ("squeezenet1_0", "features.3.squeeze", ("features.3.squeeze_activation",)),
    ("squeezenet1_0", "features.4.cat", ("features.4",)),
    ("squeezenet1_1", "flatten", ()),
    ("googlenet", "conv1.conv", ("conv1",)),
    ("googlenet", "inception3a.branch4.1.conv", ("inception3a.branch4.1",)),
    ("googlenet", "inception4b.cat", ("inception4b",)),
    ("googlenet", "fc", ()),
    ("resnet18", "layer1.0.conv1", ("layer1.0.relu",)),
    ("resnet18", "layer1.0.conv2", ("layer1.0.bn2",)),
    ("resnet18", "layer2.0.relu_1", ("layer2.0",)),
    ("resnet18", "fc", ()),
    ("bottleneck", "layer2.0.downsample.0", ("layer2.0.downsample",)),
    ("bottleneck", "layer3.0.conv3", ("layer3.0.bn3",)),
    ("bottleneck", "fc", ()),
    ("densenet121", "features.denseblock1.denselayer2.norm1", ("features.denseblock1.denselayer2.norm1",)),
    ("densenet121", "features.transition1.pool", ("features.transition1.pool",)),
    ("densenet121", "classifier", ()),
]


def close(got, want, rel=1e-11):
    assert got.shape == want.shape
    scale = want.abs().max()
    assert scale > 0, "the oracle is zero everywhere; the test says nothing"
    assert (got - want).abs().max() <= rel * scale


@pytest.mark.parametrize("name", [*NETWORKS, "inception_v3"])
def test_forward_equals_torch(name):
    model, images = network(name)
    with torch.no_grad():
        want = model(images)
    record = zfcuda.DeconvNet(model)(images)
    close(record.logits, want)
    close(record.logits, trace(model).run(images))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name, layer, where", LAYERS)
def test_projections_equal_autograd_under_the_rules(name, layer, where, gate):
    model, images = network(name)
    want, units = oracle(model, images, gate, *where)
    close(zfcuda.DeconvNet(model).project(images, layer, units, gate=gate), want)


@pytest.mark.parametrize("name", [*NETWORKS, "inception_v3"])
def test_backprop_is_the_gradient(name):
    model, images = network(name)
    x = images.clone().requires_grad_()
    logits = model(x)
    unit = int(logits.sum(0).argmax())
    want = torch.autograd.grad(logits[:, unit].sum(), x)[0]
    deconvnet = zfcuda.DeconvNet(model)
    close(deconvnet.project(images, deconvnet.graph.nodes[-1].name, unit, start=1, gate="backprop"), want)


def test_float32_is_as_near_as_autograd_in_float32():
    model, images = network("resnet18")
    want, units = oracle(model, images, "guided", "layer2.0")
    position = zfcuda.DeconvNet(model).strongest(zfcuda.DeconvNet(model)(images), "layer2.0.relu_1", units)
    model, images = network.__wrapped__("resnet18")
    got = zfcuda.DeconvNet(model.float()).project(
        images.float(), "layer2.0.relu_1", units, position=position.positions, start=position.values, gate="guided"
    )
    close(got.double(), want, 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_say_the_sizes_of_the_maps(name):
    model, images = network(name)
    deconvnet = zfcuda.DeconvNet(model, tuple(images.shape[2:]))
    record = deconvnet(images)
    for layer in deconvnet.layers:
        map_ = record.maps[layer.name]
        assert layer.size == (tuple(map_.shape[2:]) or None), layer
        assert layer.channels == map_.shape[1], layer
        assert layer.map_bytes == map_[0].numel() * 8, layer


# ---------------------------------------------------------------- small nets, one peculiarity each


class Net(nn.Module):
    """Two convolutions, a normalisation and a linear layer, which the nets below put together."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.lrn = nn.LocalResponseNorm(3, alpha=0.5)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 6)
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 2.0, 1.5]).view(3, 1, 1))


def net(forward):
    """A Net with this forward()."""
    model = type(forward.__name__, (Net,), {"forward": forward})()
    mean, std = model.mean, model.std
    randomise(model)
    model.mean, model.std = mean.double(), std.double()
    return model


def images(size=12):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check(model, layer, **where):
    """Forward and every gate, at the output or where a module's call is."""
    deconvnet, x = zfcuda.DeconvNet(model), images()
    with torch.no_grad():
        close(deconvnet(x).logits, model(x.clone()))
    for gate in GATES:
        want, units = oracle(model, x, gate, **where)
        close(deconvnet.project(x, layer, units, gate=gate), want)
    return deconvnet


RELUS = {
    "module": lambda m, x: m.relu(x),
    "module in place": lambda m, x: m.relu_(x),
    "F.relu": lambda m, x: F.relu(x),
    "F.relu in place": lambda m, x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda m, x: F.relu(x, True),
    "F.relu_": lambda m, x: F.relu_(x),
    "torch.relu": lambda m, x: torch.relu(x),
    "torch.relu_": lambda m, x: torch.relu_(x),
    "method": lambda m, x: x.relu(),
    "method in place": lambda m, x: x.relu_(),
    "result unused": lambda m, x: (F.relu_(x), x)[1],
    "result of a module unused": lambda m, x: (m.relu_(x), x)[1],
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_every_way_to_write_relu(relu):
    def forward(self, x):
        x = relu(self, self.conv1(x))
        return relu(self, self.conv2(self.pool(x)))

    deconvnet = check(net(forward), "conv2")
    assert [n.name for n in deconvnet.graph.nodes] == ["conv1", "pool", "conv2"]
    assert all(n.rectified for n in deconvnet.graph.nodes if n.kind == "conv")


def used_before_its_relu(self, x):
    y = self.conv1(x)
    return y + self.conv2(F.relu(y))


def used_before_its_relu_in_place(self, x):
    y = self.conv1(x)
    z = y * 0.5
    self.relu_(y)
    return self.conv2(y) + z


def changed_in_place(self, x):
    y = z = self.conv1(x)
    self.relu_(y)
    return self.conv2(z) + z


def sum_in_place(self, x):
    y = self.conv1(x)
    z = y
    y += self.conv2(F.relu(y))
    return self.pool(F.relu(z)) + self.pool(y)


def twice_the_same(self, x):
    y = F.relu(self.conv1(x))
    return y + y


def reused(self, x):
    x = self.relu(self.conv1(x))
    x = self.relu(self.conv2(x))
    return self.relu(self.conv2(self.pool(x)))


def normalisation_alone(self, x):
    return self.conv2(F.relu(self.bn(self.pool(self.conv1(x)))))


def normalisation_of_a_shared_map(self, x):
    y = self.conv1(x)
    return self.bn(y).relu() + y


def normalisation_after_relu(self, x):
    return self.bn(F.relu(self.conv1(x)))


def contrast(self, x):
    return self.conv2(self.lrn(F.relu(self.conv1(x)))) + F.local_response_norm(self.conv1(x), 3, alpha=0.2)


def branches(self, x):
    y = F.relu(self.conv1(x))
    pools = [F.max_pool2d(y, 3, 1, 1), F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False)]
    return torch.cat([self.conv2(y), *pools, y], dim=1)


def adaptive(self, x):
    y = F.relu(self.conv1(x))
    return F.adaptive_avg_pool2d(y, (5, 7)) + self.conv2(F.adaptive_avg_pool2d(y, (5, 7)))


def adaptive_maximum(self, x):
    return self.conv2(F.adaptive_max_pool2d(F.relu(self.conv1(x)), (4, 3)))


def preprocessed(self, x):
    x = (x[:, [2, 1, 0]] - self.mean) / self.std
    return F.relu(self.conv1(0.5 - x * 2)).mul(1.5)


def chosen_channels(self, x):
    y = F.relu(self.conv1(x))
    return torch.cat((y[:, 3:], torch.unsqueeze(y[:, 0], 1), y[:, [1, 1]]), 1)


def flattened(self, x):
    x = F.relu(self.conv1(x)).mean((2, 3))
    return self.fc(F.dropout(F.relu(self.fc(x)), 0.5, self.training)) + x


def viewed(self, x):
    x = F.adaptive_avg_pool2d(F.relu(self.conv1(x)), 1)
    return torch.cat(
        [self.fc(x.view(x.size(0), -1)), x.reshape((x.shape[0], 6)), x.view(-1, 6), torch.flatten(x, 1)], 1
    )


def copies(self, x):
    y = self.conv1(x)
    z, copied = y.contiguous(), y.clone()
    F.relu_(copied)
    return y + copied + self.conv2(z)


def unchanged_size(self, x):
    return F.adaptive_avg_pool2d(self.conv1(x), (None, None)) + F.adaptive_max_pool2d(self.conv1(x), (None, 12))


def dead_code(self, x):
    y = F.relu(self.conv1(x))
    F.softmax(self.conv2(y), 1)
    return y


@pytest.mark.parametrize(
    "forward",
    [
        used_before_its_relu, used_before_its_relu_in_place, changed_in_place, sum_in_place, twice_the_same, reused,
        normalisation_alone, normalisation_of_a_shared_map, normalisation_after_relu, contrast, branches, adaptive,
        adaptive_maximum, preprocessed, chosen_channels, flattened, viewed,
        copies, unchanged_size, dead_code,
    ],
)  # fmt: skip
def test_what_forwards_do(forward):
    model = net(forward)
    check(model, trace(model).nodes[-1].name)


def test_names_are_those_of_modules_and_of_the_functions_in_them():
    names = [node.name for node in trace(network("resnet18")[0]).nodes]
    assert names[:7] == [
        "conv1", "maxpool", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.add", "layer1.0.relu_1", "layer1.1.conv1"
    ]  # fmt: skip
    nodes = {node.name: node for node in trace(network("googlenet")[0]).nodes}
    path = "inception3a.branch2.0"
    assert nodes[f"{path}.conv"].aliases == (f"{path}.bn", f"{path}.relu", path)
    assert nodes["inception3a.cat"].aliases == ("inception3a",)
    nodes = {node.name: node for node in trace(net(reused)).nodes}
    assert list(nodes) == ["conv1", "conv2", "pool", "conv2_1"]
    assert [node.aliases for node in nodes.values()] == [("relu",), ("relu_1",), (), ("relu_2",)]


def test_a_module_under_two_names_has_both():
    conv, relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    block = nn.Sequential(conv, relu)
    nodes = trace(nn.Sequential(block, nn.MaxPool2d(2), block, conv)).nodes
    assert [node.name for node in nodes] == ["0.0", "1", "2.0", "3"]
    assert [node.aliases for node in nodes] == [("0.1", "0"), (), ("2.1", "2"), ()]


def test_joined_only_where_nothing_else_sees_the_map():
    nodes = {node.name: node for node in trace(net(used_before_its_relu)).nodes}
    assert not nodes["conv1"].rectified and nodes["relu_1"].kind == "relu"
    nodes = {node.name: node for node in trace(net(normalisation_of_a_shared_map)).nodes}
    assert nodes["conv1"].folded is None and nodes["bn"].kind == "affine"
    folded = trace(network("vgg11_bn")[0]).nodes[0]
    assert folded.rectified and folded.aliases == ("features.1", "features.2")


def test_folded_parameters_follow_the_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    graph = trace(model)
    x = images()
    with torch.no_grad():
        randomise(model)
        close(graph.run(x), model(x))
        weight, bias = graph.nodes[0].parameters()
        close(F.conv2d(x, weight, bias).relu(), model(x))
        model[1].running_var.mul_(4)
        close(graph.run(x), model(x))


def test_batch_normalisation_scales_the_signal_folded_or_not():
    """Alone, because its input is used once more with weight zero, and folded."""

    def forward(self, x):
        return self.conv2(F.relu(self.bn(self.conv1(x))))

    def shared(self, x):
        y = self.conv1(x)
        return self.conv2(F.relu(self.bn(y))) + y * 0.0

    folded, alone = net(forward), net(shared)
    assert {n.kind for n in trace(alone).nodes} >= {"affine"} and "affine" not in {n.kind for n in trace(folded).nodes}
    want = zfcuda.DeconvNet(folded).project(images(), "conv2", 2)
    close(zfcuda.DeconvNet(alone).project(images(), "conv2", 2), want)


def test_training_mode_and_random_state_are_left_alone():
    model, x = network("googlenet")
    model.train()
    model.inception3a.eval()
    try:
        before, rng = [m.training for m in model.modules()], torch.get_rng_state()
        logits = zfcuda.DeconvNet(model)(x).logits
        assert before == [m.training for m in model.modules()]
        assert torch.equal(rng, torch.get_rng_state())
    finally:
        model.eval()
    close(logits, model(x).detach())


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_maps_are_freed_after_their_last_use(name):
    model, x = network(name)
    graph = trace(model)
    last_use = {j: i for i, node in enumerate(graph.nodes) for j in node.inputs}
    alive, most = {}, 0

    def visit(i, output, switches):
        nonlocal most
        assert (switches is not None) == (graph.nodes[i].kind == "pool")
        alive[i] = weakref.ref(output)
        here = {j for j, map_ in alive.items() if map_() is not None}
        # Those that node i took may still be there.
        assert here <= {j for j in here if last_use.get(j, i) >= i}
        most = max(most, len(here))

    top = graph.find("avgpool")  # what is flattened after it stays, as a view of it
    graph.run(x, visit, top)
    assert list(alive) == list(range(top + 1))
    assert most <= 6


def test_run_stops_at_the_last_node_asked_for():
    model, x = network("resnet18")
    graph = trace(model)
    seen = []
    output = graph.run(x, lambda i, *_: seen.append(i), last=graph.find("layer1.0.relu_1"))
    assert seen == list(range(6))
    close(output, maps_of(model, x, "layer1.0").detach())


def test_paths_are_chains():
    graph = trace(network("resnet18")[0])
    assert graph.path(graph.find("layer1.0.conv2")) == (3, 2, 1, 0)
    assert graph.path(graph.find("layer1.0.add")) is None
    assert graph.path(graph.find("layer1.1.conv1")) is None
    graph = trace(network("alexnet")[0])
    assert graph.path(graph.find("features.12")) == tuple(range(7, -1, -1))
    assert graph.path(graph.find("avgpool")) is None
    with pytest.raises(ValueError, match=r"layer9.*features\.0"):
        graph.find("layer9")


# ---------------------------------------------------------------- layers


class Support(TorchFunctionMode):
    """Means for maxima, and no ReLU: every pixel that counts has a gradient."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (*Rules.RELU, *Rules.RELU_):
            return args[0]
        if getattr(func, "__name__", "").endswith("max_pool2d"):
            x, kernel, stride, padding, *_ = *args, *(kwargs or {}).values(), 0, 0
            return F.avg_pool2d(x, kernel, stride, padding)
        return func(*args, **(kwargs or {}))


def uneven(self, x):
    """Branches whose fields reach to different sides, and a pool behind them."""
    y = self.conv1(x)
    z = torch.cat([self.conv2(y), F.max_pool2d(y, (5, 3), 1, (2, 1))], 1)[:, :6]
    return self.conv2(F.max_pool2d(z + self.conv2(self.conv2(y)), 2, 2))


@pytest.mark.parametrize("size", [41])
def test_boxes_where_branches_meet_are_the_support_of_the_gradient(size):
    model = net(uneven)
    for p in model.parameters():
        p.data = p.data.abs() + 0.1
    deconvnet = zfcuda.DeconvNet(model, (size, size))
    name = deconvnet.graph.nodes[-1].name
    x = images(size).requires_grad_()
    with Support():
        map_ = model(x)[0, 0]
    assert map_.shape == deconvnet.layers[-1].size
    for position in [(0, 0), (7, 9), (19, 3)]:
        hit = torch.autograd.grad(map_[position], x, retain_graph=True)[0][0, 0].nonzero()
        found = (*hit.amin(0).tolist(), *(hit.amax(0) + 1).tolist())
        assert deconvnet.box(name, position).clip(size, size) == found


def test_switch_memory_is_that_of_the_receptive_field():
    with torch.device("meta"):
        layers = {x.name: x for x in zfcuda.DeconvNet(zfcuda.models.zfnet()).layers}
    # From the paper's fields: conv5 sees 139 pixels, so (139 - 11) / 4 + 1 of pool1 and (139 - 43) / 16 + 1 of pool2.
    assert layers["conv5"].switch_bytes == 33 * 33 * 96 + 7 * 7 * 256
    assert layers["pool1"].switch_bytes == 96 and layers["conv1"].switch_bytes == 0
    assert layers["fc6"].switch_bytes is None
    assert layers["pool1"].map_bytes == 55 * 55 * 96 * 4


# ---------------------------------------------------------------- refusals


def control_flow(self, x):
    return self.conv1(x) if x.sum() > 0 else x


def depends_on_size(self, x):
    return F.avg_pool2d(self.conv1(x), x.shape[2:])


def always_drops(self, x):
    return F.dropout(self.conv1(x))


def two_outputs(self, x):
    return self.conv1(x), x


def product_of_maps(self, x):
    y = self.conv1(x)
    return y * torch.sigmoid(y)


def gated(self, x):
    y = self.conv1(x)
    return y * y


def softmax(self, x):
    return F.softmax(self.fc(self.conv1(x).flatten(1)), dim=1)


def squeezed(self, x):
    return F.adaptive_avg_pool2d(self.conv1(x), 1).squeeze()


def views_by_size(self, x):
    y = self.conv1(x)
    return self.fc(y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)))


def flattened_batch(self, x):
    return torch.flatten(self.conv1(x))


def hidden_in_place(self, x):
    y = self.conv1(x)
    y.clamp_(0)
    return y


def item_assignment(self, x):
    y = self.conv1(x)
    y[:, 0] = 0
    return y


def changed_through_a_view(self, x):
    y = self.conv1(x)
    z = y.flatten(1)
    F.relu_(z)
    return self.conv2(y)


def concatenated_images(self, x):
    return torch.cat([self.conv1(x)] * 2)


def functional_weights(self, x):
    return F.conv2d(x, self.conv1.weight)


def needs_a_mask(self, x, mask):
    return self.conv1(x) * mask


def numpy_inside(self, x):
    return self.conv1(torch.from_numpy(x.numpy()))


def leaky(self, x):
    return F.leaky_relu(self.conv1(x))


def wrong_constant(self, x):
    return self.conv1(x) + self.conv1.weight


def one_over(self, x):
    return 1 / self.conv1(x)


def flat_and_not(self, x):
    y = self.conv1(x)
    return torch.cat([y, y.flatten(1)], 1)


def last_rows(self, x):
    return self.conv1(x)[:, :, 1:]


def more_dimensions(self, x):
    return self.conv1(x)[:, 0:2].unsqueeze(1)


def unused_result_in_place(self, x):
    y = self.conv1(x)
    F.leaky_relu(y, 0.1, True)
    return y


def concatenated_into(self, x):
    return torch.cat([x, x], 1, out=x)


@pytest.mark.parametrize(
    "forward, words",
    [
        (control_flow, r"control_flow.*cannot follow.*control flow"),
        (depends_on_size, "avg_pool2d.*kernel_size is computed from the image.*adaptive"),
        (always_drops, "dropout.*self.training"),
        (two_outputs, "two_outputs.*tuple.*one tensor"),
        (product_of_maps, "sigmoid.*ReLU only"),
        (gated, "mul.*two maps.*only sums"),
        (softmax, "softmax.*logits"),
        (squeezed, r"squeeze.*x\.flatten\(1\)"),
        (views_by_size, r"view.*x\.flatten\(1\)"),
        (flattened_batch, "flatten.*start_dim=1"),
        (hidden_in_place, "clamp.*ReLU only"),
        (item_assignment, "item_assignment.*item assignment"),
        (changed_through_a_view, "conv2.*memory.*relu_.*in place"),
        (concatenated_images, "cat.*dimension 0.*dim=1"),
        (functional_weights, "conv2d.*torch.nn"),
        (needs_a_mask, "mul.*mask.*nothing else"),
        (numpy_inside, "numpy_inside.*cannot follow"),
        (leaky, "leaky_relu.*ReLU only"),
        (wrong_constant, r"add.*conv1\.weight.*\(6, 3, 3, 3\)"),
        (one_over, "division by a map"),
        (flat_and_not, "cat.*flattened"),
        (more_dimensions, "unsqueeze.*dimensions"),
        (unused_result_in_place, "leaky_relu.*ReLU only"),
        (concatenated_into, "cat.*out"),
        (last_rows, r"getitem.*x\[:, a:b\]"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(forward, words):
    with pytest.raises(TypeError, match="(?s)DeconvNet cannot go back through.*" + words):
        zfcuda.DeconvNet(net(forward))


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.BatchNorm2d(3, track_running_stats=False), r"1 \(BatchNorm2d\).*running statistics"),
        (nn.GroupNorm(1, 3), "GroupNorm.*divisor"),
        (nn.InstanceNorm2d(3), "InstanceNorm2d.*divisor"),
        (nn.BatchNorm1d(3), "BatchNorm1d.*BatchNorm2d"),
        (nn.BatchNorm3d(3), "BatchNorm3d.*BatchNorm2d"),
        (nn.Upsample(scale_factor=2), "Upsample.*none of"),
        (nn.ReLU6(), "ReLU6.*ReLU only"),
    ],
)
def test_modules_are_refused_by_name(layer, words):
    with pytest.raises(TypeError, match=words):
        zfcuda.DeconvNet(nn.Sequential(nn.Conv2d(3, 3, 3), layer))


def test_an_adaptive_maximum_needs_windows_of_one_size():
    deconvnet = zfcuda.DeconvNet(net(adaptive_maximum))
    with pytest.raises(RuntimeError, match=r"adaptive_max_pool2d.*\(11, 12\).*\(4, 3\).*divide"):
        deconvnet(images()[:, :, 1:])


def test_constants_for_other_channels_do_not_broadcast():
    def forward(self, x):
        return self.conv1(x[:, :1] - self.mean)

    with pytest.raises(RuntimeError, match="sub has constants for 3 channels, and its input has 1"):
        zfcuda.DeconvNet(net(forward))(images())


def test_weights_that_a_hook_computes_are_refused():
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match=r"0 \(Conv2d\).*hook.*parametrizations"):
        zfcuda.DeconvNet(nn.Sequential(conv))
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    assert zfcuda.DeconvNet(nn.Sequential(conv)).layers[0].kind == "conv"


def test_hooks_do_not_run():
    model, seen = net(branches), []
    for module in model.modules():
        module.register_forward_hook(lambda m, x, y: seen.append(y))
    zfcuda.DeconvNet(nn.Sequential(model))(images())
    assert not seen


def test_maps_of_different_sizes_do_not_broadcast():
    deconvnet = zfcuda.DeconvNet(net(adaptive))
    deconvnet(images())

    def forward(self, x):
        y = self.conv1(x)
        return y + F.adaptive_avg_pool2d(y, 1)

    with pytest.raises(RuntimeError, match="add adds maps of shapes"):
        zfcuda.DeconvNet(net(forward))(images())


def test_a_view_with_a_fixed_number_of_features_does_not_mix_images():
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.conv1(x), (1, 2)).view(-1, 6))

    with pytest.raises(RuntimeError, match="view makes 6 features"):
        zfcuda.DeconvNet(net(forward))(images())
