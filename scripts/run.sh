#!/usr/bin/env bash
# Sets everything up in a virtual environment of its own and runs one of the two commands of the README:
#   bash scripts/run.sh quickstart [arguments of `bucketmoo quickstart`]
#   bash scripts/run.sh test [arguments of pytest]
# BUCKETMOO_VENV names the environment (default .venv); PYTHON the interpreter (default python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command=${1:-}
case "$command" in
    quickstart) extras=train ;;
    test) extras=test ;;
    *) echo "usage: bash scripts/run.sh quickstart|test [arguments]" >&2; exit 2 ;;
esac
shift

venv=${BUCKETMOO_VENV:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "constraints.txt is of Python 3.11 or newer; name one: PYTHON=/path/to/python3.12 bash scripts/run.sh $command" >&2
    exit 2
}
wanted="$extras $(cat constraints.txt pyproject.toml setup.py | sha256sum)"
if [ "$(cat "$venv/.bucketmoo-$extras" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing into $venv ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # torch by itself and first: a plain `torch` asked for by another package may fetch gigabytes of another build.
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch setuptools wheel
    # DeepSpeed's own build imports what it finds, so it must not be built in isolation from torch.
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$extras]"
    echo "$wanted" > "$venv/.bucketmoo-$extras"
fi

case "$command" in
    quickstart) exec "$venv/bin/bucketmoo" quickstart "$@" ;;
    # Two files of tests at a time; `-n 0` runs them one by one, in this process.
    test) exec "$venv/bin/pytest" -m "not slow and not nightly" -n 2 --dist loadfile --no-loadscope-reorder "$@" ;;
esac
