"""The deconvnet: what in the image caused an activation."""

from zfcuda.deconv.deconvnet import DeconvNet, Record, Strongest
from zfcuda.deconv.local import Crops
from zfcuda.deconv.mined import Mined, MinedLayer, Preprocessing, Skipped, Source
from zfcuda.deconv.mining import mine, mining_memory
from zfcuda.deconv.notebook import show
from zfcuda.deconv.projections import Projections
from zfcuda.deconv.receptive_field import Box, Layer

__all__ = [
    "Box",
    "Crops",
    "DeconvNet",
    "Layer",
    "Mined",
    "MinedLayer",
    "Preprocessing",
    "Projections",
    "Record",
    "Skipped",
    "Source",
    "Strongest",
    "mine",
    "mining_memory",
    "show",
]
