"""What an installation looks like from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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


def test_deepspeed_is_wrapped_whichever_is_imported_first(tmp_path: Path) -> None:
    for first, second in (("bucketmoo_ds", "deepspeed"), ("deepspeed", "bucketmoo_ds")):
        code = (
            f"import {first}\nimport {second}\n"
            "from deepspeed.runtime.engine import DeepSpeedEngine\n"
            "assert hasattr(DeepSpeedEngine.__init__, \"_bucket_moo_wrapper\")\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
