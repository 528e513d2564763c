"""The paper's network and its variants."""

from zfcuda.models.zfnet import ZFNet, zfnet

__all__ = ["ZFNet", "zfnet"]
