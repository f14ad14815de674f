#!/usr/bin/env bash
# Builds, links and loads csrc/cuda where no GPU is, with a CUDA build of torch in an environment of its own, and lists
# the ops and what they were compiled for:
#   bash scripts/cuda_build.sh [FOLDER]
# It fetches about 5 GB, takes about ten minutes, and needs nvcc (12.8 or newer) on the path. FOLDER keeps environment
# and library; without it both are deleted. PYTHON names the interpreter, TORCH the version (default: the one that the
# tests run on).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v nvcc > /dev/null || { echo "cuda_build: there is no nvcc on the path: install the CUDA toolkit" >&2; exit 2; }
version=${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}
if [ $# -eq 0 ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
else
    folder=$(mkdir -p "$1" && cd "$1" && pwd)
fi
[ -x "$folder/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/venv"
# Three signs: a build for the CPU, 2.13.0+cpu, is no match.
"$folder/venv/bin/python" -m pip install --quiet "torch===$version"
began=$SECONDS
BUCKETMOO_BUILD_DIR=$folder/build "$folder/venv/bin/python" - << 'END'
import os
import re
import subprocess

import torch
import triton

from bucketmoo_ds.ops import build

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
library = build.cuda_library()
torch.ops.load_library(library)
print(f"{os.path.basename(library)}: {os.path.getsize(library) / 2**20:.1f} MiB")
tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
for what, how in (("machine code", "-lelf"), ("PTX", "-lptx")):
    listed = subprocess.run([tool, how, library], capture_output=True, text=True, check=True).stdout
    found = {name: listed.count(name) for name in set(re.findall(r"sm_[0-9]+", listed))}
    print(f"{what}: {', '.join(f'{name} ({count} files)' for name, count in sorted(found.items()))}")
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("bucketmoo_ds_cuda::"):
        print(schema)
END
echo "cuda_build: built, linked and loaded in $((SECONDS - began)) s"
