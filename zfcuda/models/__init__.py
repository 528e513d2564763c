"""The paper's network and its variants, weights from files, and networks by name."""

from zfcuda.models.load import LoadedModel, load_model
from zfcuda.models.weights import load_weights, read_weights
from zfcuda.models.zfnet import ZFNet, zfnet
from zfcuda.models.zfnet512 import zfnet512

__all__ = ["LoadedModel", "ZFNet", "load_model", "load_weights", "read_weights", "zfnet", "zfnet512"]
