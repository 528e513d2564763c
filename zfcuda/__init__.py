"""See what a convolutional network has learned: Zeiler & Fergus (2013) as compiled PyTorch operators."""

from zfcuda import models, nn, ops
from zfcuda.deconv import DeconvNet, show

__all__ = ["DeconvNet", "models", "nn", "ops", "show"]

__version__ = "0.1.0"
