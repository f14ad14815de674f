#!/usr/bin/env bash
# What only a GPU can show, in at most nine minutes: builds csrc/cuda for the device, runs the drawn part of tests/gpu,
# and measures; one JSON file a part goes into a folder that is given:
#   bash scripts/gpu_check.sh FOLDER
# It takes this checkout, a PyTorch with CUDA (2.11 or newer), triton, pytest and nvcc; nothing is installed or fetched.
# compute-sanitizer is used where it is. PYTHON names the interpreter. BUCKETMOO_CHECK_DEVICE=cpu runs all of it on
# tiny data, to test it. The exit status is 0 if all parts passed, 1 if one failed, 2 without a device.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/gpu_check.sh FOLDER" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: there is no ${PYTHON:-python3}" >&2; exit 2; }
device=${BUCKETMOO_CHECK_DEVICE:-cuda}
seconds=530

# The checkout as a package, without an installation: kernels/ belongs into it.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/bucketmoo_ds"
ln -s "$root"/bucketmoo_ds/* "$root/kernels" "$site/bucketmoo_ds/"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1
cd "$site" || exit 2

passed=() failed=()
# NAME LIMIT COMMAND...: runs a part for at most so many seconds; whatever becomes of it, the next one runs.
part() {
    local name=$1 limit=$(($2 < seconds - SECONDS ? $2 : seconds - SECONDS))
    shift 2
    if [ "$limit" -lt 10 ]; then
        failed+=("$name (no time was left)")
        return
    fi
    local began=$SECONDS status=0
    timeout --kill-after=5 "$limit" "$@" > "$out/gpu-$name.log" 2>&1 || status=$?
    case $status in
        0) passed+=("$name") ;;
        2) if grep -q "finds no CUDA device" "$out/gpu-$name.log"; then cat "$out/gpu-$name.log"; exit 2; fi
           failed+=("$name (status 2)") ;;
        124 | 137) failed+=("$name (more than $limit s)") ;;
        *) failed+=("$name (status $status)") ;;
    esac
    echo "gpu_check: $name: status $status after $((SECONDS - began)) s; gpu-$name.log"
    [ "$status" = 0 ] || tail -n 5 "$out/gpu-$name.log"
}
check=("$python" "$root/benchmarks/gpu_check.py" --device "$device" --out "$out")

part build 170 "${check[@]}" build
part tests 110 "${check[@]}" tests
part window 45 "${check[@]}" window
part kernels 80 "${check[@]}" kernels
part resolve 30 "${check[@]}" resolve
part fsdp2 60 "${check[@]}" fsdp2
sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$(command -v nvcc || echo /nowhere/nvcc)")/compute-sanitizer" 2> /dev/null)
if [ "$device" = cpu ]; then
    part once 45 "${check[@]}" once
elif [ -n "$sanitizer" ]; then
    part once 90 "$sanitizer" --tool racecheck --error-exitcode 9 --print-limit 20 "${check[@]}" once
else
    echo "gpu_check: no compute-sanitizer: races are not looked for"
fi

IFS=,
echo "gpu_check: passed: ${passed[*]:-nothing}; failed: ${failed[*]:-nothing}; $SECONDS s; results in $out"
[ ${#failed[@]} -eq 0 ]
