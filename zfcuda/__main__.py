"""``python -m zfcuda``, for launchers such as torchrun."""

from zfcuda.cli import main

main(prog_name="zfcuda")
