"""Products of long sums and few results, whose k CUDA splits among blocks: values, bits, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import pytest
import test_conv2d_relu_max_pool2d as pooled
import test_deconv2d as deconv
import test_precision as precision
import test_stacked_phases as stacked_phases
import test_unpool_relu_deconv2d as unpooled
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Sample, check_exact, check_values, normal, whole_numbers

from simt.backend import ORDERS
from simt.harness import Emulated, Out
from zfcuda import core, ops, reference

CUDA = precision.CUDA
IN_EACH_MODE = precision.AND_IEEE
mode = precision.mode

SPLITTING = ("conv2d_workspace", "deconv2d_workspace", "unpool_relu_deconv2d_workspace")


@pytest.fixture
def split(backend, monkeypatch, request) -> Callable[[], set[str]]:
    """The operators that have split since the last call: they have written behind the packed weights.

    A GPU of one multiprocessor never splits, so its workspace ends there. Whether a real GPU splits is its own affair.
    """
    if backend.name != "simt":
        return lambda: set(SPLITTING)
    emulator, room = request.getfixturevalue("emulator"), core.room
    used: list[tuple[str, torch.Tensor]] = []

    def spy(function, like, *arguments):
        tensor = room(function, like, *arguments)
        if function in SPLITTING:
            tensor.fill_(0xAB)
            with monkeypatch.context() as patch:
                patch.setattr(emulator, "processors", 1)
                packed = getattr(emulator, function)(*arguments, core._exec(like.device))
            used.append((function, tensor[packed:]))
        return tensor

    def found() -> set[str]:
        names = {name for name, partial in used if (partial != 0xAB).any()}
        used.clear()
        return names

    monkeypatch.setattr(core, "room", spy)
    return found


# ---------------------------------------------------------------- values

#: image, weight, options: every tile that small results have; k no multiple of a chunk, chunks none of the splits.
UP = [
    ((1, 232, 4, 5), (20, 232, 3, 3), {"padding": 1}),
    ((1, 512, 3, 3), (6, 256, 3, 3), {"groups": 2, "padding": 1}),  # three columns a group
    ((1, 1032, 4, 3), (20, 1032, 1, 1), {}),  # no halo
    ((1, 1032, 4, 3), (12, 1032, 1, 1), {}),
    ((1, 2048, 3, 2), (128, 2048, 1, 1), {}),
    ((1, 40, 9, 8), (128, 40, 5, 5), {"stride": 2}),
    ((1, 3, 19, 20), (96, 3, 17, 17), {}),  # merged rows
    ((1, 3, 19, 20), (40, 3, 17, 17), {}),
    ((1, 3, 27, 20), (96, 3, 24, 16), {}),  # by FMA, too
    ((1, 3, 63, 11), (40, 3, 60, 8), {}),
]
DOWN = [
    ((1, 448, 3, 2), (448, 20, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),  # a phase of a fourth of k
    ((1, 384, 3, 3), (384, 3, 3, 3), {"groups": 2}),
    ((1, 384, 2, 2), (384, 96, 3, 3), {}),  # three times 32 columns
    ((1, 1024, 2, 2), (1024, 3, 5, 5), {"stride": 2, "padding": 1}),  # phases as columns
]


def name(case) -> str:
    return f"{case[1]} {case[2]}"


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("case", UP, ids=name)
def test_convolution(backend, mode, split, case):
    size, filters, options = case
    image, weight, bias = normal(*size), normal(*filters, seed=1), normal(filters[0], seed=2)
    actual = ops.conv2d_relu(*precision.placed(mode, backend.device, image, weight, bias), **options)
    assert split() >= {"conv2d_workspace"}

    def torchs(x, w):
        return F.conv2d(x, w, bias.to(x), **options).relu()

    precision.check_model(actual, torchs, image, weight, mode, options.get("groups", 1), merged=size[1] == 3)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("case", DOWN, ids=name)
def test_transposed_convolution(backend, mode, split, case):
    size, filters, options = case
    groups = options.get("groups", 1)
    signal, weight, bias = normal(*size), normal(*filters, seed=1), normal(filters[1] * groups, seed=2)
    actual = ops.deconv2d(*precision.placed(mode, backend.device, signal, weight, bias), **options)
    assert split() >= {"deconv2d_workspace"}

    def torchs(x, w):
        return F.conv_transpose2d(x, w, bias.to(x), **options)

    precision.check_model(actual, torchs, signal.relu(), weight, mode, groups)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("columns", [3, 20, 96])
def test_unpooled_transposed_convolution(backend, mode, split, columns):
    above, switches = reference.max_pool2d(normal(1, 192, 5, 4), 3, 2, ceil_mode=True)
    signal, weight = normal(*above.shape, seed=3), normal(192, columns, 3, 3, seed=1)
    options = {"padding": 1}
    pool = {"kernel_size": 3, "stride": 2, "output_size": (5, 4)}
    values, filters = precision.placed(mode, backend.device, signal, weight)
    where = switches.to(backend.device, memory_format=torch.channels_last)
    given = {f"pool_{k}": v for k, v in pool.items()}
    actual = ops.unpool_relu_deconv2d(values, where, filters, **options, **given)
    assert split() >= {"unpool_relu_deconv2d_workspace"}
    stored = signal.to(precision.HALVES.get(mode, torch.float32)).float()
    maps = reference.max_unpool2d(stored, switches, **pool).relu()

    def torchs(x, w):
        return F.conv_transpose2d(x, w, None, **options)

    precision.check_model(actual, torchs, maps, weight, mode)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [UP[0], UP[1], DOWN[0]], ids=name)
def test_contiguous(backend, split, case, dtype, monkeypatch, request):
    """By FMA, where results are stored by pixels, but for halves; gradients too."""
    if backend.name == "simt":  # without tensor cores for bfloat16
        monkeypatch.setattr(request.getfixturevalue("emulator"), "arch", 75)
    size, filters, options = case
    tensors = [normal(*size), normal(*filters, seed=1)]
    if case in UP:
        functions = ops.conv2d_relu, reference.conv2d_relu, lambda *a, **more: F.conv2d(*a, **more).relu()
        sample = Sample([*tensors, normal(filters[0], seed=2)], options)
    else:
        functions = ops.deconv2d, reference.deconv2d, deconv.torchs
        sample = deconv.gated("guided", [*tensors, normal(filters[1], seed=2)], **options)
    check_values(*functions, sample, backend.device, dtype)
    assert split()


@CUDA
@pytest.mark.parametrize("mode", ["ieee", "tf32"], indirect=True)
@pytest.mark.parametrize("gate", ["backprop", "guided"])
def test_gates_are_exact(backend, mode, split, gate):
    """Down by the gate, and back up by the gradient, where the mask acts on the result: after the splits are added."""
    tensors = [whole_numbers(1, 128, 2, 2, top=1), whole_numbers(128, 88, 3, 3, seed=1, top=1)]
    sample = deconv.gated(gate, [*tensors, whole_numbers(88, seed=2)], padding=1)
    check_exact(ops.deconv2d, deconv.torchs, sample, backend)
    assert split() >= {"conv2d_workspace", "deconv2d_workspace"}


@CUDA
def test_an_unpooled_gate_is_exact(backend, split, threads):
    threads(1)  # torch's own unpooling is a race between threads where windows overlap
    sample = unpooled.stepped(
        whole_numbers, 20, (1, 192, 5, 4), (3, 3), pool=unpooled.PAPER, gate="guided", overlap="overwrite", stride=2
    )
    check_exact(ops.unpool_relu_deconv2d, unpooled.torchs, sample, backend)
    assert split()


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@pytest.mark.parametrize("mode", ["ieee", "tf32", *precision.HALVES], indirect=True)
def test_the_largest_tiles(backend, emulator, monkeypatch, choice, mode, split):
    """Where their splits fill the GPU; down and unpooled on the tensor cores alone, by FMA there are none."""
    monkeypatch.setattr(emulator, "processors", 6)
    channels = 288 if mode in precision.HALVES else 144
    signal, weight = normal(1, channels, 12, 12), normal(128, channels, 3, 3, seed=1)
    way = {"ieee": "fma", "tf32": "tf32"}.get(mode, "halves")
    dtype = torch.float16 if way == "halves" else torch.float32
    columns, splits, _ = choice(conv_shape(1, channels, (12, 12), 128, 3, padding=1), False, dtype, way, 6)
    assert columns == 128 and splits > 1
    actual = ops.conv2d_relu(*precision.placed(mode, backend.device, signal, weight), padding=1)
    assert split()
    precision.check_model(actual, lambda x, w: F.conv2d(x, w, padding=1).relu(), signal, weight, mode)
    if mode == "ieee":
        return
    weight = weight.transpose(0, 1)

    def torchs(x, w):
        return F.conv_transpose2d(x, w, padding=1)

    actual = ops.deconv2d(*precision.placed(mode, backend.device, signal, weight), padding=1)
    assert split()
    precision.check_model(actual, torchs, signal.relu(), weight, mode)
    above, switches = reference.max_pool2d(signal, 2)
    values, filters = precision.placed(mode, backend.device, above, weight)
    where = switches.to(memory_format=torch.channels_last)
    actual = ops.unpool_relu_deconv2d(values, where, filters, padding=1, pool_kernel_size=2, pool_output_size=(12, 12))
    assert split()
    maps = reference.max_unpool2d(above, switches, 2, output_size=(12, 12)).relu()
    precision.check_model(actual, torchs, maps, weight, mode)


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@pytest.mark.parametrize("processors", [2, 31, 10_000])
def test_other_gpus(backend, emulator, monkeypatch, processors):
    """They have other splits, but whole numbers have the same sums."""
    image, weight = (whole_numbers(*size).float() for size in ((1, 104, 4, 5), (20, 104, 3, 3)))
    expected = ops.conv2d_relu(image, weight, padding=1)
    monkeypatch.setattr(emulator, "processors", processors)
    assert torch.equal(ops.conv2d_relu(image, weight, padding=1), expected)


@CUDA
@IN_EACH_MODE
def test_the_same_bits_in_every_run(backend, mode, split, monkeypatch, request):
    """In every order of the threads and of the blocks (the emulator compares them), and in the next call."""
    if backend.name == "simt":
        monkeypatch.setattr(request.getfixturevalue("emulator"), "orders", tuple(ORDERS))
    tensors = precision.placed(mode, backend.device, normal(1, 232, 3, 3), normal(20, 232, 3, 3, seed=1))
    first = ops.conv2d_relu(*tensors, padding=1)
    assert split()
    assert torch.equal(ops.conv2d_relu(*tensors, padding=1), first)


@CUDA
def test_a_pool_whose_windows_fit_no_block(backend):
    """It convolves one image at a time, in splits, and its maps lie behind their partial sums."""
    tensors = pooled.tensors(whole_numbers, 2, 40, (15, 14), 20, (3, 3))
    sample = Sample(tensors, {"pool_kernel_size": (13, 12)})
    check_exact(ops.conv2d_relu_max_pool2d, pooled.torchs, sample, backend)


# ---------------------------------------------------------------- the choice

WAYS = {"fma": 0, "tf32": 1, "tf32x3": 2, "halves": 3}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2}

#: What the source of tap_choice.cuh states of tiles, by their columns: rows, and blocks that share a multiprocessor.
TILES = {
    "fma": {128: (128, 2), 64: (128, 2), 16: (256, 2)},
    "merged": {96: (128, 2), 64: (128, 2)},
    "double": {64: (64, 1)},
    "mma": {128: (128, 2), 96: (128, 2), 64: (128, 2), 16: (128, 2)},
}


@pytest.fixture(scope="module")
def choice() -> Callable[..., tuple[int, int, int]]:
    """Columns of the tile, splits, and the estimated cycles of a convolution."""
    library = Emulated("choice")

    def choose(shape, transposed, dtype, way, processors, may_split=True):
        out = torch.empty(3, dtype=torch.int64)
        square = not transposed and dtype is torch.float32 and bool(shape[-1]) and shape[1] % 4 == 0
        fields = torch.tensor(shape)
        library("choice", fields, transposed, DTYPES[dtype], WAYS[way], square, may_split, processors, Out(out))
        return tuple(out.tolist())

    return choose


def conv_shape(batch, channels, size, maps, kernel, stride=1, padding=0, channels_last=1):
    """As Python passes it to the core."""
    out = [(s + 2 * padding - kernel) // stride + 1 for s in size]
    return (
        *(batch, channels, *size, maps, *out, kernel, kernel),
        *(stride, stride, padding, padding, 1, 1, 1, channels_last),
    )


def test_the_example_of_the_source(choice):
    """ZFNet's third convolution in tf32 on an H100."""
    one, many = (conv_shape(batch, 256, (13, 13), 384, 3, padding=1) for batch in (1, 128))
    assert choice(one, False, torch.float32, "tf32", 132) == (128, 16, 15_670)
    assert choice(one, False, torch.float32, "tf32", 132, may_split=False) == (64, 1, 72_000)
    assert choice(many, False, torch.float32, "tf32", 132) == (128, 1, 345_600)


SHAPES = st.builds(
    conv_shape,
    batch=st.integers(0, 40),
    channels=st.sampled_from([3, 8, 96, 256, 1024]),
    size=st.tuples(st.integers(7, 60), st.integers(7, 60)),
    maps=st.sampled_from([8, 64, 96, 384, 4096]),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    channels_last=st.integers(0, 1),
)
KINDS = st.sampled_from(
    [
        *((dtype, "fma") for dtype in DTYPES),
        *((torch.float32, way) for way in ("tf32", "tf32x3")),
        (torch.float16, "halves"),
    ]
)


@settings(max_examples=500)
@given(shape=SHAPES, kind=KINDS, transposed=st.booleans(), processors=st.integers(1, 300))
def test_splits_stay_within_a_wave_and_never_cost(choice, shape, kind, transposed, processors):
    columns, splits, cycles = choice(shape, transposed, *kind, processors)
    whole_columns, one, whole = choice(shape, transposed, *kind, processors, may_split=False)
    assert one == 1 and 1 <= splits <= 32
    assert cycles <= whole and (splits > 1 or (columns, cycles) == (whole_columns, whole))
    kinds = "mma" if kind[1] != "fma" else "double" if kind[0] is torch.float64 else "fma"
    batch, channels, height, width, maps, out_height, out_width, kernel, _, stride, _, padding, *_ = shape
    if kind == (torch.float32, "fma") and not transposed and channels == 3 and maps > 16 and shape[-1]:
        kinds = "merged"
    rows, resident = TILES[kinds][columns]
    pixels = batch * (ceil(height / stride) * ceil(width / stride) if transposed else out_height * out_width)
    tiles = ceil(pixels / rows) * ceil((channels if transposed else maps) / columns)
    narrowest = 64 if kinds == "double" else 16
    apart, stacked = stacked_phases.products(channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, narrowest)
    tiles *= min(stride, height) * min(stride, width) if transposed and apart <= stacked else 1
    assert splits == 1 or tiles * splits <= resident * processors
    results = batch * (channels * height * width if transposed else prod((maps, out_height, out_width)))
    assert splits == 1 or splits * results <= resident * processors * rows * columns


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@settings(max_examples=100)
@given(shape=SHAPES, dtype=st.sampled_from(list(DTYPES)), mode=st.sampled_from(["ieee", "tf32"]), up=st.booleans())
def test_workspaces_are_bounded(backend, emulator, shape, dtype, mode, up):
    """By 32 results, and by the sums of the largest tile in every place of a wave; beside them NCHW has copies."""
    shape = (*shape[:-1], 1)
    function = "conv2d_workspace" if up else "deconv2d_workspace"
    where = (0, 0, 1, core.PRECISIONS[mode])
    results = prod((shape[0], *(shape[4:7] if up else shape[1:4])))
    size = 8 if dtype is torch.float64 else 4

    def room(processors):
        emulator.processors = processors
        return getattr(emulator, function)(shape, core.DTYPES[dtype], where)

    try:
        packed, partial = room(1), room(132) - room(1)
    finally:
        emulator.processors = 132
    assert packed > 0
    assert 0 <= partial <= size * min(32 * results, 132 * 2 * 128 * 128) + 15
    assert partial == 0 or partial >= 2 * size * results


def test_what_a_mode_of_fewer_bits_is_for(choice):
    """Three products take longer than one: no mode of more bits is estimated to be faster."""
    for batch in (1, 8, 128):
        shape = conv_shape(batch, 256, (13, 13), 384, 3, padding=1)
        times = [choice(shape, False, torch.float32, way, 132)[2] for way in ("tf32", "tf32x3", "fma")]
        assert times == sorted(times)
        assert choice(shape, False, torch.float16, "halves", 132)[2] < times[0]
