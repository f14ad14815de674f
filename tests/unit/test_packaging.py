"""What an installation looks like from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_belong_to_the_package_and_not_to_the_top_level(tmp_path: Path) -> None:
    """Hugging Face ships a package named `kernels`, and transformers looks for it."""
    code = (
        "import importlib.util, bucketmoo_ds.kernels\n"
        "top = importlib.util.find_spec('kernels')\n"
        "assert top is None or top.origin != bucketmoo_ds.kernels.__file__, top\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_sources_belongs_to_the_package(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    listed = next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().splitlines()
    sources = {path.relative_to(root).as_posix() for path in root.glob("csrc/*/*") if path.suffix != ".md"}
    assert any(path.startswith("csrc/common/") for path in sources)
    assert sources <= set(listed)


def test_import_is_light(tmp_path: Path) -> None:
    """DeepSpeed takes seconds to import, so that importing this package must not."""
    code = "import sys, bucketmoo_ds\nassert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import bucketmoo_ds, deepspeed",
        # As all workers of tests/distributed:
        pytest.param("import deepspeed, bucketmoo_ds", marks=pytest.mark.nightly),
        pytest.param("from deepspeed import initialize; import bucketmoo_ds", marks=pytest.mark.nightly),
    ],
)
def test_deepspeed_is_wrapped_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    code = (
        f"{order}\nfrom deepspeed.runtime.engine import DeepSpeedEngine\n"
        "assert hasattr(DeepSpeedEngine.__init__, \"_bucket_moo_wrapper\")\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_deepspeed_a_window_is_resolved_and_what_needs_it_says_so(tmp_path: Path) -> None:
    """Nothing but torch is there, not even numpy: as on a bare machine with a checkout."""
    code = """
import sys
for name in ("deepspeed", "transformers", "accelerate", "wrapt", "numpy", "yaml", "rich"):
    sys.modules[name] = None
import torch, bucketmoo_ds as bm
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
config = bm.BucketMOOConfig(languages=["de", "fr"], granularity="parameter")
session = bm.single.register(model, config, micro_steps=2, bucket_size=12)
for language in config.languages:
    with session.language(language):
        loss = model(torch.randn(6, 4)).square().mean()
    (loss / 2).backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert torch.allclose(session.last.weights.sum(1), torch.ones(4, dtype=torch.float64))
bm.fsdp2.register, bm.ddp.register
try:
    bm.initialize
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bucketmoo_ds.initialize needs deepspeed, which is not installed" in done.stdout
    assert 'pip install "bucketmoo-ds[deepspeed]"' in done.stdout
    assert "bucketmoo" not in done.stderr


def test_commands_do_without_deepspeed_what_they_can(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["deepspeed"] = None
from bucketmoo_ds.apps.cli.main import main
plan = "plan --world-size 4 --ranks-per-node 2 --languages 2"
for words in ("doctor", f"{plan} --framework deepspeed --stage 2", plan, f"train {sys.argv[1]}"):
    try:
        main(words.split())
    except SystemExit as done:
        print(f"= {done.code}", flush=True, file=sys.stderr)
"""
    config = Path(__file__).parents[2] / "configs" / "train.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    found = re.findall(r"(.*?)= (\d)\n", done.stderr, re.DOTALL)
    assert [status for _, status in found] == ["0", "0", "0", "2"], done.stderr
    doctor, zero, fsdp2, train = (said for said, _ in found)
    assert re.search(r"DeepSpeed adapter\)\W+not installed\W+pip install 'bucketmoo-ds\[deepspeed\]'", done.stdout)
    assert doctor == fsdp2 == ""
    assert 'pip install "bucketmoo-ds[deepspeed]"' in zero
    assert "pip install 'bucketmoo-ds[train]'" in train
