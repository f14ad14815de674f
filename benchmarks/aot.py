"""What Triton makes of every launch of the kernels: registers, stacks and widths of loads, without a GPU.

python benchmarks/aot.py --out benchmarks/results/aot.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bucketmoo_ds.apps.bench import provenance
from bucketmoo_ds.kernels import aot


def main() -> None:
    """Writes the report, and exits with 1 if a kernel has a stack: its registers did not do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    options = parser.parse_args()
    kernels = aot.report(options.workers or 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    head = provenance.describe(("torch", "triton"))
    lines = ",\n".join(f"    {json.dumps(kernel)}" for kernel in kernels)
    options.out.write_text(f'{{\n  "made_by": {json.dumps(head)},\n  "kernels": [\n{lines}\n  ]\n}}\n')
    bad = [f"{kernel['launch']} sm_{kernel['architecture']}" for kernel in kernels if kernel["stack_bytes"]]
    print(f"{len(kernels)} kernels, {len(bad)} with a stack{': ' if bad else ''}{', '.join(bad)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
