#!/usr/bin/env bash
# Builds the source distribution and the wheel, looks into both, and tries the wheel as a new user would: beside a plain
# torch, without a compiler on the path:
#   bash scripts/wheel.sh [FOLDER]
# The two files are left in FOLDER (default dist). The wheel holds the compiled CPU library where this machine has g++;
# it is built against the torch that the tests run on, and serves 2.11 and newer (the stable ABI). PYTHON names the
# interpreter; TORCH another version of torch to install the wheel beside. About 300 MB are fetched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
dist=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pinned=$(sed -n 's/^torch==//p' constraints.txt)

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build twine "setuptools>=77" wheel "torch==$pinned"
# From a copy of what is committed or about to be: no build/ or egg-info of an earlier day gets in.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -c | tar -x -C "$work/source"
rm -f "$dist"/bucketmoo_ds-*
"$work/build/bin/python" -m build --no-isolation --sdist --outdir "$work/dist" "$work/source" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
# Of the source distribution, which has to hold all that a wheel is made of.
mkdir "$work/unpacked"
tar -xf "$work"/dist/*.tar.gz -C "$work/unpacked" --strip-components=1
"$work/build/bin/python" -m build --no-isolation --wheel --outdir "$work/dist" "$work/unpacked" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
grep "^bucketmoo_ds:" "$work/log"
"$work/build/bin/python" -m twine check --strict "$work"/dist/*

"$work/build/bin/python" - "$work/source" "$work"/dist/*.whl "$work"/dist/*.tar.gz << 'END'
"""Every source file of the checkout that belongs to the package is in the wheel, and in the source distribution."""
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

source, wheel, sdist = (Path(each) for each in sys.argv[1:])
held = set(zipfile.ZipFile(wheel).namelist())
unpacked = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in tarfile.open(sdist).getnames()}
places = {"bucketmoo_ds": "bucketmoo_ds", "kernels": "bucketmoo_ds/kernels", "csrc": "bucketmoo_ds/csrc"}
files = [(folder, path) for folder in places for path in (source / folder).rglob("*") if path.is_file()]
missing = []
for folder, path in files:
    within = path.relative_to(source / folder).as_posix()
    if path.suffix != ".md":
        missing += [f"{wheel.name}: {places[folder]}/{within}"] * (f"{places[folder]}/{within}" not in held)
        missing += [f"{sdist.name}: {folder}/{within}"] * (f"{folder}/{within}" not in unpacked)
missing += [f"{wheel.name}: LICENSE"] * (not any(name.endswith(".dist-info/licenses/LICENSE") for name in held))
missing += [f"{sdist.name}: LICENSE"] * ("LICENSE" not in unpacked)
library = "bucketmoo_ds/lib/libbucketmoo_cpu.so"
if shutil.which("g++") and library not in held:
    missing.append(f"{wheel.name}: {library}")
foreign = sorted(name for name in held if not name.startswith(("bucketmoo_ds/", "bucketmoo_ds-")))
if missing or foreign:
    sys.exit("\n".join(["missing:", *missing, "of the top level:", *foreign]))
size = {path.name: f"{path.stat().st_size / 2**20:.1f} MiB" for path in (wheel, sdist)}
print(f"wheel: {len(files)} files of the checkout are in both; {size}")
END

"$python" -m venv "$work/user"
"$work/user/bin/python" -m pip install --quiet "torch==${TORCH:-$pinned}"
"$work/user/bin/python" -m pip list --format=freeze > "$work/before"
"$work/user/bin/python" -m pip install --quiet "$work"/dist/*.whl
"$work/user/bin/python" -m pip list --format=freeze > "$work/after"
echo "wheel: what came with it: $(comm -13 <(sort "$work/before") <(sort "$work/after") | tr '\n' ' ')"
! grep -iE "^(deepspeed|transformers|accelerate|datasets)==" "$work/after" || { echo "wheel: an extra was pulled" >&2; exit 1; }
cd "$work"
# COMMAND...: as a user who has no compiler, and has built nothing yet.
alone() { env PATH="$work/user/bin:/nowhere" HOME="$work" BUCKETMOO_BUILD_DIR="$work/built" "$@"; }
cat > try.py << 'END'
import sys

import torch

import bucketmoo_ds as bm

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
session = bm.single.register(model, bm.BucketMOOConfig(languages=["de", "fr"], granularity="parameter"), micro_steps=2)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    for language in ("de", "fr"):
        with session.language(language):
            loss = model(torch.randn(6, 8)).square().mean()
        (loss / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
assert torch.allclose(session.last.weights.sum(1), torch.ones(4, dtype=torch.float64))
backend = bm.ops.choose_backend()
assert backend == sys.argv[1], backend
print(f"wheel: torch {torch.__version__}, no compiler: 3 windows resolved by the backend {backend}")
END
library=$(echo "$work"/user/lib/python3.*/site-packages/bucketmoo_ds/lib/libbucketmoo_cpu.so)
if [ -e "$library" ]; then
    alone python try.py cpu
    mv "$library" away
fi
# And with a wheel that was made where no compiler was: the reference runs, and a warning says why.
alone python try.py reference 2> said
grep -q "there is no C++ compiler g++" said || { echo "wheel: no warning:" >&2; cat said >&2; exit 1; }
[ ! -e away ] || mv away "$library"
alone bucketmoo doctor
cp "$work"/dist/* "$dist"
echo "wheel: the two files are in $dist"
