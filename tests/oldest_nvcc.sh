#!/usr/bin/env bash
# The CUDA kernels by the oldest nvcc that the build takes, 12.4. pip has none of it; Debian 13 has (non-free). Fetches its
# packages into a folder, lays them out as NVIDIA's toolkit, builds a wheel with it and says what is in. Needs no root.
# The record is docs/toolkits.md.
#
#   tests/oldest_nvcc.sh build/nvcc-12.4
#
# DEBIAN chooses a mirror.
set -euo pipefail
cd "$(dirname "$0")/.."
mirror=${DEBIAN:-http://deb.debian.org/debian}
python=${PYTHON:-python3}
mkdir -p "$1"
folder=$(realpath "$1")

fetch() { # component package: the newest of Debian 13, checked, unpacked into $folder/root
    local entry path sum
    entry=$(curl -fsS "$mirror/dists/trixie/$1/binary-amd64/Packages.xz" | xz -dc | sed -n "/^Package: $2\$/,/^\$/p")
    path=$(sed -n 's/^Filename: //p' <<<"$entry")
    sum=$(sed -n 's/^SHA256: //p' <<<"$entry")
    [ -e "$folder/$2.deb" ] || curl -fsS -o "$folder/$2.deb" "$mirror/$path"
    sha256sum --quiet --check <<<"$sum  $folder/$2.deb"
    dpkg-deb -x "$folder/$2.deb" "$folder/root"
}

if [ ! -x "$folder/cuda/bin/nvcc" ]; then
    for package in nvidia-cuda-toolkit nvidia-cuda-dev libnvvm4; do fetch non-free "$package"; done
    fetch main 'libcu++-dev' # <nv/target>, which cuda_fp16.h includes
    cuda=$folder/cuda usr=$folder/root/usr
    rm -rf "$cuda"
    mkdir -p "$cuda"/{bin,nvvm/bin,lib64}
    cp "$usr"/bin/{bin2c,cudafe++,cuobjdump,fatbinary,nvdisasm,nvlink,ptxas} "$cuda/bin"
    cp -r "$usr/lib/nvidia-cuda-toolkit/bin/crt" "$cuda/bin"
    cp "$usr/lib/nvidia-cuda-toolkit/bin/cicc" "$cuda/nvvm/bin"
    cp -r "$usr/lib/nvidia-cuda-toolkit/libdevice" "$cuda/nvvm"
    cp -rL "$usr/include" "$cuda/include"
    cp "$usr"/lib/x86_64-linux-gnu/{libcudart_static.a,libcudadevrt.a,libnvvm.so.4} "$cuda/lib64"
    cat >"$cuda/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
LD_LIBRARY_PATH += $(TOP)/lib64:
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
    cp "$usr/lib/nvidia-cuda-toolkit/bin/nvcc" "$cuda/bin" # last: whoever finds it finds all
fi
export CUDA_HOME=$folder/cuda ZFCUDA_CUDA=on
"$CUDA_HOME/bin/nvcc" --version | grep release
rm -rf "$folder/tree" "$folder/wheel"
mkdir "$folder/tree"
cp -r csrc zfcuda pyproject.toml setup.py README.md LICENSE MANIFEST.in "$folder/tree" # what is built here stays
rm -f "$folder"/tree/zfcuda/core/*.so
"$python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$folder/wheel" --log "$folder/build.log" \
    "$folder/tree" >/dev/null
if grep -E "[0-9)]: warning" "$folder/build.log"; then
    echo "The build warns"
    exit 1
fi
"$python" -m zipfile -e "$folder"/wheel/zfcuda-*.whl "$folder/wheel"
module=$(ls "$folder"/wheel/zfcuda/core/_cuda*.so)
for arch in $("$CUDA_HOME/bin/cuobjdump" --list-elf "$module" | grep -o 'sm_[0-9]*' | sort -u); do
    "$CUDA_HOME/bin/cuobjdump" -res-usage -arch "$arch" "$module" 2>&1 | sed -n 's/.*STACK:\([0-9]*\).*LOCAL:\([0-9]*\).*/\1 \2/p' |
        awk -v arch="$arch" '{ n++; if ($1 + $2 > 0) bad++ } END { print arch ": " n " kernels, " bad + 0 " with a stack" }'
done
