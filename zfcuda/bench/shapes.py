"""The shapes of ZFNet's layers and of other networks' grouped ones, once, for every benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """A square convolution: input channels and size, maps, kernel, stride, padding, groups."""

    name: str
    channels: int
    size: int
    maps: int
    kernel: int
    stride: int
    padding: int
    groups: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def output_padding(self) -> int:
        """What the transposed convolution needs to return to ``size``."""
        return self.size - ((self.out_size - 1) * self.stride - 2 * self.padding + self.kernel)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.maps, self.channels // self.groups, self.kernel, self.kernel

    @property
    def weights(self) -> int:
        return self.maps * self.channels // self.groups * self.kernel**2

    def inputs(self, batch: int) -> int:
        return batch * self.channels * self.size**2

    def elements(self, batch: int) -> int:
        """Of input, weight and maps."""
        return self.inputs(batch) + self.weights + batch * self.maps * self.out_size**2

    def flops(self, batch: int) -> int:
        return 2 * batch * self.out_size**2 * self.weights


@dataclass(frozen=True)
class Map:
    """The channels and the size of a map that is pooled (3x3, stride 2, ceil) or normalised."""

    name: str
    channels: int
    size: int

    @property
    def pooled_size(self) -> int:
        return -(-(self.size - 3) // 2) + 1


CONVOLUTIONS = (
    Conv("conv1", 3, 224, 96, 7, 2, 1),
    Conv("conv2", 96, 55, 256, 5, 2, 0),
    Conv("conv3", 256, 13, 384, 3, 1, 1),
    Conv("conv4", 384, 13, 384, 3, 1, 1),
    Conv("conv5", 384, 13, 256, 3, 1, 1),
)
#: Groups as other networks have them, and their first and second layers.
GROUPED = (
    Conv("depthwise 32 at 112", 32, 112, 32, 3, 1, 1, 32),
    Conv("depthwise 96 at 112 stride 2", 96, 112, 96, 3, 2, 1, 96),
    Conv("depthwise 144 at 56", 144, 56, 144, 3, 1, 1, 144),
    Conv("depthwise 384 at 14", 384, 14, 384, 3, 1, 1, 384),
    Conv("depthwise 7x7 96 at 28", 96, 28, 96, 7, 1, 3, 96),
    Conv("32 groups of 4 at 56", 128, 56, 128, 3, 1, 1, 32),
    Conv("32 groups of 8 at 28", 256, 28, 256, 3, 1, 1, 32),
    Conv("8 groups of 16 at 28", 128, 28, 128, 3, 1, 1, 8),
    Conv("2 groups 96 to 256 at 27", 96, 27, 256, 5, 1, 2, 2),
    Conv("3 to 64 at 224", 3, 224, 64, 3, 1, 1),
    Conv("64 to 64 at 56", 64, 56, 64, 3, 1, 1),
)
POOLS = (Map("pool1", 96, 110), Map("pool2", 256, 26), Map("pool5", 256, 13))
NORMS = (Map("norm1", 96, 55), Map("norm2", 256, 13))
#: The convolutions that a pool follows, with its input; and those with a normalisation behind that.
POOLED = {conv: pool for conv in CONVOLUTIONS for pool in POOLS if conv.name[4:] == pool.name[4:]}
NORMED = [conv for conv in CONVOLUTIONS for norm in NORMS if conv.name[4:] == norm.name[4:]]
