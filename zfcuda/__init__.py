"""See what a convolutional network has learned: Zeiler & Fergus (2013) for PyTorch."""

__version__ = "0.1.0"
