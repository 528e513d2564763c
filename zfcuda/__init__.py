"""See what a convolutional network has learned: Zeiler & Fergus (2013) for PyTorch."""

from zfcuda import attr, models, nn, ops
from zfcuda.deconv import DeconvNet, show

__version__ = "0.1.0"
__all__ = ["DeconvNet", "__version__", "attr", "models", "nn", "ops", "show"]
