#!/usr/bin/env bash
# Runs the tests of benchmarks/versions.py on other versions than the pinned ones: each corner below is installed into a
# folder of its own, which comes before the environment's packages. Outcomes go to benchmarks/results/.
#
#     scripts/versions.sh [-k] [CORNER ...]      corners by number, from 1; all by default
#
# -k keeps the folders, under $VERSIONS (default: build/versions). PYTHON is the interpreter (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."

# What it is about, and what pip installs without dependencies: the environment has those.
CORNERS=(
  "deepspeed deepspeed==0.18.4" # the oldest
  "deepspeed deepspeed==0.18.6"
  "deepspeed deepspeed==0.18.9"
  "deepspeed deepspeed==0.19.0"
  "deepspeed deepspeed==0.19.8" # pinned, and the newest
)

keep=false
if [ "${1:-}" = -k ]; then keep=true; shift; fi
folder=${VERSIONS:-build/versions}
python=${PYTHON:-python}
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
if [ $# = 0 ]; then set -- $(seq ${#CORNERS[@]}); fi
for each in "$@"; do
  read -r package specs <<<"${CORNERS[each - 1]}"
  target=$folder/${specs//[ =]/-}
  # shellcheck disable=SC2086  # several packages are several words
  [ -d "$target" ] || "$python" -m pip install -q --no-deps --no-build-isolation --target "$target" $specs
  PYTHONPATH=$(realpath "$target") "$python" benchmarks/versions.py "$package"
  $keep || rm -r "$target"
done
"$python" benchmarks/readme.py
