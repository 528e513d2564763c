"""CUDA's convolutions on the tensor cores: values by a model of each numeric mode, what chooses it, who respects it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import Sample, assert_within, check_exact, normal, whole_numbers
from torch import Tensor

import zfcuda
from zfcuda import core, ops, reference

CUDA = pytest.mark.parametrize("backend", ["simt", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
MODES = ("3xtf32", "tf32")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def mode(request):
    """How float32 is multiplied, or a half, which is multiplied as it is."""
    with zfcuda.set_fp32_precision("ieee" if request.param in HALVES else request.param):
        yield request.param


IN_EACH_MODE = pytest.mark.parametrize("mode", [*MODES, *HALVES], indirect=True)
AND_IEEE = pytest.mark.parametrize("mode", ["ieee", *MODES, *HALVES], indirect=True)
OF_FLOAT32 = pytest.mark.parametrize("mode", MODES, indirect=True)


def placed(mode: str, device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """In channels_last, and in the dtype of the mode."""
    tensors = tuple(t.to(device, HALVES.get(mode, torch.float32)) for t in tensors)
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


def truncated(values: Tensor) -> Tensor:
    """As the tensor cores read a float: 10 bits of fraction."""
    return (values.float().view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(values: Tensor) -> Tensor:
    """To 10 bits of fraction, ties away from zero: a weight as it is packed."""
    bits = values.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


# ---------------------------------------------------------------- values

#: image, weight, the rest: few channels; sums off every tile; strides, dilation, groups; filters as large as the image;
#: 1 x 1; no images; channels that the tensor cores do not serve.
CASES = [
    ((2, 4, 9, 8), (4, 4, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 12, 7, 6), (20, 12, 3, 2), {"padding": (2, 0), "dilation": (2, 3)}),
    ((2, 8, 12, 11), (72, 8, 3, 3), {"padding": 1}),  # 264 rows: two tiles and 8; 72 columns: a tile and 8
    ((1, 8, 5, 5), (6, 4, 3, 3), {"groups": 2, "padding": 1}),  # three columns a group
    ((1, 24, 4, 5), (17, 24, 1, 1), {}),
    ((1, 4, 5, 6), (2, 4, 5, 6), {}),
    ((1, 4, 2, 3), (5, 4, 3, 3), {"padding": 4, "stride": 5}),  # padding alone
    ((2, 20, 6, 5), (12, 20, 2, 4), {"stride": (3, 1), "padding": 1}),
    ((0, 4, 9, 8), (4, 4, 3, 3), {}),
    ((1, 6, 5, 5), (8, 6, 3, 3), {}),
]

#: Images whose channels are no whole pieces, and whose filters' rows are merged: the paper's first layer, AlexNet's,
#: VGG's; runs that fill no piece, one and several; rows apart; windows off every side; maps in tiles of 96 and 64.
MERGED = [
    ((2, 3, 15, 17), (96, 3, 7, 7), {"stride": 2, "padding": 1}),
    ((1, 3, 27, 23), (64, 3, 11, 11), {"stride": 4, "padding": 2}),
    ((1, 3, 8, 9), (20, 3, 3, 3), {"padding": 1}),
    ((3, 5, 9, 8), (192, 5, 5, 2), {"dilation": (2, 1)}),
    ((1, 6, 5, 7), (17, 6, 2, 3), {"stride": (1, 3)}),
    ((1, 2, 2, 3), (100, 2, 5, 6), {"padding": (2, 4), "stride": (2, 1)}),
    ((0, 3, 9, 9), (96, 3, 7, 7), {}),
    ((2, 3, 5, 150), (20, 3, 3, 3), {"padding": 1}),  # strips
    ((9, 3, 2, 3), (20, 3, 3, 2), {"padding": 1}),  # several images to a block
    ((3, 3, 13, 6), (17, 3, 2, 3), {"stride": (5, 2)}),  # rows between those that are read
    ((1, 2, 61, 40), (17, 2, 60, 12), {"padding": 2}),  # few pixels to a block
    ((1, 2, 9, 12), (20, 2, 3, 7), {}),  # as many rows at a time as there are
    ((1, 3, 6, 19), (100, 3, 5, 16), {"padding": 1}),  # runs that FMA just takes, and longer ones
    ((1, 3, 5, 19), (17, 3, 2, 17), {}),
]
CASES += MERGED

#: Filters whose taps share a halo, of the paper's third and second layer, images in strips, several to a block, small
#: blocks for tall filters; planes of a stride, some without taps; taps apart; a last chunk of five pieces; groups.
HALO = [
    ((2, 64, 13, 13), (40, 64, 3, 3), {"padding": 1}),
    ((1, 32, 15, 14), (9, 32, 5, 5), {"stride": 2, "padding": 1}),
    ((1, 32, 3, 70), (20, 32, 2, 3), {"padding": (0, 1)}),
    ((9, 32, 2, 2), (20, 32, 3, 3), {"padding": 1}),
    ((1, 32, 20, 19), (20, 32, 17, 9), {"padding": (0, 4)}),
    ((1, 32, 9, 12), (8, 32, 2, 8), {"stride": (1, 2), "padding": (1, 3)}),
    ((1, 32, 14, 13), (8, 32, 5, 5), {"stride": 2, "dilation": 2, "padding": 4}),
    ((1, 40, 8, 9), (20, 40, 3, 3), {"dilation": (1, 2)}),
    ((1, 64, 7, 7), (40, 32, 4, 4), {"groups": 2, "padding": 2}),
]
CASES += HALO
IDS = [f"{weight} {options}" for _, weight, options in CASES]


def check_model(
    actual: Tensor,
    torchs: Callable[..., Tensor],
    source: Tensor,
    weight: Tensor,
    mode: str,
    groups: int = 1,
    merged: bool = False,
) -> None:
    """At most twice the error that torch makes in this dtype, of the factors that the mode multiplies."""
    dtype = HALVES.get(mode, source.dtype if mode == "by FMA" else torch.float32)
    source, weight = source.to(dtype), weight.to(dtype)
    pieces = source.size(1) // groups % 4 == 0
    if mode == "tf32" and (pieces or merged):
        source, weight = truncated(source), rounded(weight)
    terms = source.size(1) // groups * weight.size(2) * weight.size(3)
    assert actual.dtype == dtype
    assert_within(actual, torchs(source, weight), torchs(source.double(), weight.double()), terms)


@CUDA
@AND_IEEE
@pytest.mark.parametrize(("size", "filters", "options"), CASES, ids=IDS)
def test_convolution(backend, mode, size, filters, options):
    image, weight, bias = normal(*size), normal(*filters, seed=1), normal(filters[0], seed=2)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight, bias), **options)

    def torchs(x, w):
        return F.conv2d(x, w, bias.to(x), **options).relu()

    merged = (size, filters, options) in MERGED
    check_model(actual, torchs, image, weight, mode, options.get("groups", 1), merged)


#: Several tiles of pixels for each of several teams, of which some have one more; pixels behind the last window; two
#: column tiles of 64 and of 96; runs that begin at odd halves, in both copies of a patch; sums of one chunk.
STAYING = [
    ((3, 3, 39, 38), (96, 3, 7, 7), {"stride": 2, "padding": 1}),
    ((2, 3, 39, 36), (64, 3, 11, 11), {"stride": 4, "padding": 2}),
    ((3, 5, 12, 13), (192, 5, 5, 2), {"dilation": (2, 1)}),
    ((2, 3, 20, 19), (100, 3, 3, 3), {"padding": 1}),
    ((1, 3, 16, 150), (20, 3, 1, 3), {"padding": 1}),
]


@pytest.fixture(params=[(86, 1), (80, 1), (90, 2)], ids=["99 KiB", "163 KiB", "227 KiB"])
def few_processors(request, emulator, monkeypatch):
    """GPUs with more tiles than processors, whose shared memory holds weights and one, two or three teams."""
    for name, value in zip(("arch", "processors"), request.param, strict=True):
        monkeypatch.setattr(emulator, name, value)


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@AND_IEEE
@pytest.mark.parametrize(("size", "filters", "options"), STAYING, ids=str)
def test_weights_that_stay(backend, mode, few_processors, size, filters, options):
    image, weight, bias = normal(*size), normal(*filters, seed=1), normal(filters[0], seed=2)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight, bias), **options)

    def torchs(x, w):
        return F.conv2d(x, w, bias.to(x), **options).relu()

    check_model(actual, torchs, image, weight, mode, merged=True)


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@AND_IEEE
@pytest.mark.parametrize("after", ["pool", "norm", "maximum"])
@pytest.mark.parametrize(("size", "filters", "options"), STAYING, ids=str)
def test_pools_of_weights_that_stay(backend, mode, few_processors, after, size, filters, options):
    """The same bits as of a convolution and what follows it."""
    image, weight, bias = normal(*size), normal(*filters, seed=1), normal(filters[0], seed=2)
    tensors = placed(mode, backend.device, image, weight, bias)
    pool = {"pool_kernel_size": 3, "pool_stride": 2}
    maps = ops.conv2d_relu(*tensors, **options)
    pooled, switches = ops.max_pool2d(maps, 3, 2)
    if after == "norm":
        fused = ops.conv2d_relu_max_pool2d_norm(*tensors, **options, **pool, norm_size=5, norm_alpha=1e-2)
        expected = (ops.local_response_norm(pooled, 5, alpha=1e-2), switches)
    elif after == "maximum":
        fused = ops.conv2d_relu_max_pool2d_maximum(*tensors, **options, **pool)
        expected = (pooled, switches, *ops.map_maximum(maps, pooled, switches, 3, 2))
    else:
        fused, expected = ops.conv2d_relu_max_pool2d(*tensors, **options, **pool), (pooled, switches)
    for one, other in zip(fused, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_contiguous_tensors_are_worth_copies(backend):
    """The second layer of the paper in half precision: the same bits, of the tensor cores; see test_nchw.py."""
    image, weight = (normal(*size).to(backend.device, torch.float16) for size in ((32, 96, 55, 55), (256, 96, 5, 5)))
    expected = ops.conv2d_relu(image.to(memory_format=torch.channels_last), weight, stride=2)
    assert torch.equal(ops.conv2d_relu(image, weight, stride=2), expected)


@CUDA
@AND_IEEE
def test_a_merged_row_reads_its_own_pixels_alone(backend, mode):
    """NaN beside a window is not in it, though the piece that brings the window's last pixel reaches over it."""
    image = torch.zeros(1, 3, 6, 9)
    image[0, :, 2, 4] = float("nan")
    weight = torch.ones(32, 3, 3, 3)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight), padding=1)
    assert torch.equal(actual.isnan().cpu(), F.conv2d(image, weight, padding=1).isnan())


DOWN = [
    ((2, 4, 5, 4), (4, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((1, 12, 4, 5), (12, 20, 3, 2), {"padding": (2, 0), "dilation": (2, 3)}),
    ((1, 8, 4, 4), (8, 2, 3, 3), {"groups": 2}),
    ((1, 20, 6, 5), (20, 70, 4, 2), {"stride": (3, 1)}),  # phases of 2, 1 and 1 taps
    ((1, 24, 4, 5), (24, 3, 1, 1), {}),
    ((1, 4, 3, 3), (4, 17, 1, 1), {"stride": 3}),  # pixels that no tap reaches
    ((0, 4, 5, 4), (4, 3, 3, 3), {}),
    ((1, 6, 4, 4), (6, 4, 3, 3), {}),
    ((1, 8, 5, 4), (8, 40, 3, 3), {"stride": 2}),
    ((1, 64, 13, 13), (64, 40, 3, 3), {"padding": 1}),
    ((1, 32, 13, 13), (32, 9, 5, 5), {"stride": 2, "padding": 1}),
    ((1, 40, 3, 70), (40, 20, 2, 3), {}),
    ((1, 16, 5, 4), (16, 96, 5, 5), {"stride": 2}),  # three times 32 columns
    ((1, 32, 4, 5), (32, 95, 3, 3), {"groups": 2}),
    ((1, 8, 5, 6), (8, 190, 3, 2), {}),
    ((9, 32, 2, 1), (32, 20, 3, 3), {}),
    ((1, 16, 3, 4), (16, 5, 17, 5), {"dilation": (1, 2)}),
]


@CUDA
@AND_IEEE
def test_a_patch_that_fits_no_block(backend, mode):
    image, weight = normal(1, 3, 92, 31), normal(17, 3, 90, 30, seed=1)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight))
    by_fma = mode if mode in HALVES else "by FMA"
    check_model(actual, lambda x, w: F.conv2d(x, w).relu(), image.float(), weight, by_fma)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("gate", ["none", "deconvnet", "backprop", "guided"])
@pytest.mark.parametrize(("size", "filters", "options"), DOWN, ids=[f"{f} {o}" for _, f, o in DOWN])
def test_transposed_convolution(backend, mode, gate, size, filters, options):
    signal, weight = normal(*size), normal(*filters, seed=1)
    bias = normal(filters[1] * options.get("groups", 1), seed=2)
    gated = {"gate": gate}
    if gate in ("backprop", "guided"):
        forward = normal(*size, seed=3).relu()
        (gated["forward"],) = placed(mode, backend.device, forward)
    actual = ops.deconv2d(*placed(mode, backend.device, signal, weight, bias), **options, **gated)
    if gate in ("deconvnet", "guided"):
        signal = signal.relu()
    if gate in ("backprop", "guided"):
        signal = signal * (forward > 0)

    def torchs(x, w):
        return F.conv_transpose2d(x, w, bias.to(x), **options)

    check_model(actual, torchs, signal, weight, mode, groups=options.get("groups", 1))


@CUDA
@IN_EACH_MODE
def test_transposed_convolution_whose_taps_no_halo_holds(backend, mode):
    signal, weight = normal(1, 16, 3, 4), normal(16, 5, 30, 9, seed=1)
    actual = ops.deconv2d(*placed(mode, backend.device, signal, weight), gate="none")
    by_fma = mode if mode in HALVES else "by FMA"
    check_model(actual, lambda x, w: F.conv_transpose2d(x, w), signal.float(), weight, by_fma)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("gate", ["none", "guided"])
@pytest.mark.parametrize("overlap", ["sum", "overwrite"])
@pytest.mark.parametrize(("channels", "columns"), [(8, 5), (6, 5), (8, 40), (8, 96)])
def test_unpooled_transposed_convolution(backend, mode, gate, overlap, channels, columns):
    above, switches = reference.max_pool2d(normal(2, channels, 7, 6), 3, 2, ceil_mode=True)
    signal = normal(*above.shape, seed=3)
    weight = normal(channels, columns, 3, 3, seed=1)
    options = {"stride": 2, "padding": 1, "output_padding": 1}
    pool = {"kernel_size": 3, "stride": 2, "output_size": (7, 6)}
    gated = {"gate": gate}
    masked = signal.to(HALVES.get(mode, torch.float32)).float()
    if gate == "guided":
        (gated["forward"],) = placed(mode, backend.device, above)
        masked = masked * (above > 0)
    tensors = placed(mode, backend.device, signal, weight)
    where = switches.to(backend.device, memory_format=torch.channels_last)
    actual = ops.unpool_relu_deconv2d(
        tensors[0], where, tensors[1], **options, **gated, overlap=overlap, **{f"pool_{k}": v for k, v in pool.items()}
    )
    maps = reference.max_unpool2d(masked, switches, **pool, overlap=overlap)  # sums are rounded once, in check_model
    maps = maps.relu() if gate == "guided" else maps

    def torchs(x, w):
        return F.conv_transpose2d(x, w, None, **options)

    check_model(actual, torchs, maps, weight, mode)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize(
    ("channels", "maps", "options", "pool"),
    [
        (16, 20, {"padding": 1}, {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}),
        (3, 96, {"stride": 2, "padding": 1}, {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}),
        (3, 64, {"padding": 1}, {"pool_kernel_size": 2}),
        (64, 20, {"padding": 1}, {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}),
        (64, 9, {"padding": 1}, {"pool_kernel_size": 3, "pool_stride": 2, "pool_ceil_mode": True}),
        (16, 70, {"stride": 2}, {"pool_kernel_size": 2, "pool_stride": 3, "pool_padding": 1}),
        (16, 6, {"groups": 2}, {"pool_kernel_size": (3, 2), "pool_stride": 1, "pool_dilation": (1, 2)}),
        (16, 8, {}, {"pool_kernel_size": (12, 11)}),  # windows of 132 pixels, in no block
    ],
    ids=str,
)
def test_convolution_and_pool(backend, request, monkeypatch, mode, channels, maps, options, pool):
    """The sums are those of a convolution that is not split, term by term: maxima and switches are the same bits."""
    if backend.name == "simt":
        monkeypatch.setattr(request.getfixturevalue("emulator"), "processors", 1)
    elif channels > 16:
        pytest.skip("a GPU may split sums of so many channels")
    image = normal(2, channels, 14, 13)
    weight, bias = normal(maps, channels // options.get("groups", 1), 3, 3, seed=1), normal(maps, seed=2)
    tensors = placed(mode, backend.device, image, weight, bias)
    fused = ops.conv2d_relu_max_pool2d(*tensors, **options, **pool)
    single = {name.removeprefix("pool_"): value for name, value in pool.items()}
    for one, other in zip(fused, ops.max_pool2d(ops.conv2d_relu(*tensors, **options), **single), strict=True):
        assert torch.equal(one, other)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("pooled", [False, True])
def test_windows(backend, mode, pooled):
    """A weight that is packed once computes in the mode in which it was packed."""
    dtype = HALVES.get(mode, torch.float32)
    signal, weight = normal(5, 2, 2, 8).to(dtype), normal(8, 4, 3, 3, seed=1)
    origins = torch.zeros(5, 2, dtype=torch.int64)
    options = {"gate": "deconvnet"}
    maps = signal.float().relu().movedim(3, 1)
    if pooled:
        switches = torch.randint(0, 9, signal.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        options["switches"] = switches.to(backend.device)
        maps = reference.max_unpool2d(signal.float().movedim(3, 1), switches.movedim(3, 1), 3, 2, 0, 1, (5, 5)).relu()
    tensors = [t.to(backend.device) for t in (signal, origins)]
    step = ops.WindowDeconv2d(
        weight.to(backend.device, dtype), (2, 2), 2, windows=5, pool=(3, 2, 1) if pooled else None
    )
    with zfcuda.set_fp32_precision("ieee"):
        actual = step(*tensors, (99, 99), **options)

    def torchs(x, w):
        return F.conv_transpose2d(x, w, None, 2).movedim(1, 3)

    check_model(actual, torchs, maps, weight, mode)


@CUDA
@pytest.mark.parametrize("mode", ["tf32", *HALVES], indirect=True)
def test_many_pixels_down(backend, mode):
    """Likewise the transposed convolution, of a signal and of an unpooled one."""
    weight = normal(8, 128, 1, 1, seed=1)

    def torchs(x, w):
        return F.conv_transpose2d(x, w)

    signal = normal(1, 8, 132, 131)
    check_model(ops.deconv2d(*placed(mode, backend.device, signal, weight)), torchs, signal.relu(), weight, mode)
    above, switches = reference.max_pool2d(signal, 2)
    values, filters = placed(mode, backend.device, above, weight)
    where = switches.to(backend.device, memory_format=torch.channels_last)
    actual = ops.unpool_relu_deconv2d(values, where, filters, pool_kernel_size=2, pool_output_size=(132, 131))
    maps = reference.max_unpool2d(above, switches, 2, output_size=(132, 131)).relu()
    check_model(actual, torchs, maps, weight, mode)


@CUDA
@pytest.mark.parametrize("mode", ["ieee", "tf32", *HALVES], indirect=True)
def test_many_pixels(backend, mode):
    """Enough blocks for the largest tile; more chunks than there are buffers."""
    image, weight = normal(1, 8, 132, 131), normal(128, 8, 3, 3, seed=1)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight))
    check_model(actual, lambda x, w: F.conv2d(x, w).relu(), image, weight, mode)


@CUDA
@OF_FLOAT32
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}], ids=str)
def test_whole_numbers_are_exact(backend, mode, options):
    """Eleven bits hold them, and gradients of every order run in the mode, too."""
    tensors = [whole_numbers(2, 8, 6, 5), whole_numbers(8, 8 // options.get("groups", 1), 3, 3, seed=1)]
    sample = Sample([*tensors, whole_numbers(8, seed=2)], options)
    check_exact(ops.conv2d_relu, lambda *args, **more: F.conv2d(*args, **more).relu(), sample, backend)


@CUDA
@IN_EACH_MODE
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite(backend, mode, value):
    """It reaches the results that it reaches by torch, and no other; 3xtf32 makes NaN of infinities."""
    image, weight = normal(1, 8, 6, 6), normal(4, 8, 3, 3, seed=1)
    image[0, 2, 3, 1] = float(value)
    actual = ops.deconv2d(*placed(mode, backend.device, image, weight.transpose(0, 1).flip(2, 3)), padding=1)
    expected = F.conv2d(image.relu(), weight, padding=1)
    if mode == "3xtf32":
        expected[~expected.isfinite()] = float("nan")
    rtol = 2**-6  # two roundings to eight bits, and some
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=rtol * 20, equal_nan=True)


@CUDA
@IN_EACH_MODE
def test_misaligned_memory(backend, mode):
    """What 16-byte copies cannot read is multiplied by FMA, or copied before."""
    dtype = HALVES.get(mode, torch.float32)
    memory = torch.empty(1 * 5 * 5 * 8 + 1, device=backend.device, dtype=dtype)
    image = memory[1:].view(1, 5, 5, 8).movedim(3, 1).copy_(normal(1, 8, 5, 5))
    weight = normal(4, 8, 3, 3, seed=1).to(backend.device, dtype)
    check_model(ops.conv2d_relu(image, weight), lambda x, w: F.conv2d(x, w).relu(), image.cpu(), weight.cpu(), "by FMA")
    windows = memory[1:].view(1, 5, 5, 8)
    origins = torch.zeros(1, 2, dtype=torch.int64, device=backend.device)
    weight = weight.transpose(0, 1).contiguous()
    aligned = ops.window_deconv2d(windows.clone(), weight, origins, (9, 9))
    assert torch.equal(ops.window_deconv2d(windows, weight, origins, (9, 9)), aligned)


@CUDA
def test_ieee_is_more_exact_than_3xtf32_and_that_than_tf32(backend):
    """The modes differ, so each was chosen."""
    image, weight = normal(1, 32, 8, 8), normal(8, 32, 3, 3, seed=1)
    exact = F.conv2d(image.float().double(), weight.float().double()).relu()
    error = {}
    for name in ("ieee", *MODES):
        with zfcuda.set_fp32_precision(name):
            actual = ops.conv2d_relu(*placed(name, backend.device, image, weight))
        error[name] = float((actual.cpu().double() - exact).abs().max() / exact.max())
    assert error["tf32"] > 1e-4 and error["3xtf32"] < 1e-6 and error["ieee"] < 1e-6
    assert error["3xtf32"] != error["ieee"]


@pytest.mark.parametrize("backend", ["simt"], indirect=True)
@IN_EACH_MODE
def test_turing(backend, mode, emulator, monkeypatch):
    """sm_75 has tensor cores for float16 alone: the emulator stops at an instruction that the architecture has not."""
    image, weight = normal(1, 8, 5, 5), normal(4, 8, 3, 3, seed=1)
    monkeypatch.setattr(emulator, "arch", 75)
    actual = ops.conv2d_relu(*placed(mode, backend.device, image, weight))
    by_fma = mode if mode in HALVES else "ieee"
    check_model(actual, lambda x, w: F.conv2d(x, w).relu(), image, weight, by_fma)


# ---------------------------------------------------------------- which mode


def test_it_follows_torch_unless_set(monkeypatch):
    def mode() -> str:
        return {number: name for name, number in core.PRECISIONS.items()}[core.cuda_precision()]

    with zfcuda.set_fp32_precision(None):
        assert mode() == "tf32"  # as torch's convolutions
        with torch.backends.cudnn.flags(allow_tf32=False):
            assert mode() == "ieee"
            with zfcuda.set_fp32_precision("3xtf32"):
                assert mode() == "3xtf32"
                zfcuda.set_fp32_precision("tf32")
                assert mode() == "tf32"
            assert mode() == "ieee"
        assert mode() == "tf32"


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since torch 2.9")
def test_it_follows_torchs_newer_setting():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cudnn.conv.fp32_precision = setting
            with zfcuda.set_fp32_precision(None):
                assert core.cuda_precision() == core.PRECISIONS[expected]
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_refuses():
    with pytest.raises(ValueError, match="mode is 'high'; it must be one of 'ieee', '3xtf32', 'tf32'"):
        zfcuda.set_fp32_precision("high")


def test_the_cpu_has_one_mode():
    image, weight = normal(1, 8, 6, 6).float(), normal(4, 8, 3, 3, seed=1).float()
    expected = ops.conv2d_relu(image, weight)
    with zfcuda.set_fp32_precision("tf32"):
        assert torch.equal(ops.conv2d_relu(image, weight), expected)


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_repeated_calls_see_a_change(backend):
    """Those that a memo repeats, and those of a compiled graph."""
    tensors = placed("tf32", backend.device, normal(1, 32, 8, 8), normal(8, 32, 3, 3, seed=1))
    compiled = torch.compile(ops.conv2d_relu, backend="aot_eager")
    for function in (ops.conv2d_relu, compiled):
        results = []
        for name in ("ieee", "tf32", "ieee", "tf32"):
            with zfcuda.set_fp32_precision(name):
                results.append([function(*tensors) for _ in range(3)])
        ieee, tf32, *again = results
        assert torch.equal(torch.stack(ieee), torch.stack(again[0])) and not torch.equal(ieee[0], tf32[0])
        assert torch.equal(torch.stack(tf32), torch.stack(again[1])) and torch.equal(tf32[0], tf32[2])
