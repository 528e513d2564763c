"""The deconvnet: what in the image caused an activation."""

from zfcuda.deconv.deconvnet import DeconvNet, Record, Strongest
from zfcuda.deconv.mined import Mined, MinedLayer, Preprocessing, Skipped, Source
from zfcuda.deconv.notebook import show
from zfcuda.deconv.receptive_field import Box, Layer

__all__ = [
    "Box",
    "DeconvNet",
    "Layer",
    "Mined",
    "MinedLayer",
    "Preprocessing",
    "Record",
    "Skipped",
    "Source",
    "Strongest",
    "show",
]
