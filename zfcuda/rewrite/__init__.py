"""Models rewritten to run on this library's operators: :func:`zfcuda.rewrite.optimize.optimize`."""
