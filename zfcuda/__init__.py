"""See what a convolutional network has learned: Zeiler & Fergus (2013) as compiled PyTorch operators."""

from zfcuda import models, nn, ops

__all__ = ["models", "nn", "ops"]
