#!/usr/bin/env bash
# One built wheel, untouched, under several releases of torch: builds it once, installs it beside each in an
# environment of its own, and runs the operators' tests there on the installed package. The record is docs/torches.md.
#
#   tests/two_torches.sh build/torches 2.6.0 2.13.0      # a folder to work in, releases of torch
#
# PIP_INDEX_URL, PIP_FIND_LINKS and the like choose where torch comes from; with environments that exist already
# (FOLDER/RELEASE), torch is not installed again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
shift
python=${PYTHON:-python3}
mkdir -p "$folder"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheel" .
wheel=$(ls "$folder"/wheel/zfcuda-*.whl)
rm -rf "$folder/tree"
mkdir "$folder/tree"
cp -r tests csrc pyproject.toml docs "$folder/tree" # no zfcuda: it must come from the wheel
for release in "$@"; do
    environment=$folder/$release
    if [ ! -e "$environment" ]; then
        "$python" -m venv "$environment"
        "$environment/bin/pip" install --quiet "torch==$release"
    fi
    "$environment/bin/pip" install --quiet numpy pytest pytest-xdist hypothesis filelock pybind11 ninja setuptools
    "$environment/bin/pip" install --quiet --no-deps --force-reinstall "$wheel"
    sha256sum "$wheel" | cut -c1-16,65- | xargs -n2 basename -a | paste -sd' '
    cd "$folder/tree"
    "$environment/bin/python" -c "import torch, zfcuda; print('torch', torch.__version__, zfcuda.__file__)"
    "$environment/bin/python" -m pytest -q -n "${JOBS:-2}" -k "not simt" -r fE \
        tests/test_contract.py tests/test_{conv2d_relu,deconv2d,max_pool2d,max_unpool2d,local_response_norm}.py \
        tests/test_{relu_max_pool2d,conv2d_relu_max_pool2d,unpool_relu_deconv2d,switch_gather,window_deconv2d}.py \
        tests/test_{conv2d_relu_max_pool2d_maximum,conv2d_relu_max_pool2d_norm,map_maximum}.py \
        tests/test_{crop_windows,renormalize_filters}.py |
        tail -4
    cd - >/dev/null
done
