"""Maps the folders of the repository to packages, and builds the compiled backends into a wheel; everything else stands
in pyproject.toml.

``kernels/`` is installed as ``bucketmoo_ds.kernels`` and never as a top-level ``kernels``: Hugging Face ships a
package of that name, and transformers looks for it. ``csrc/`` goes along as ``bucketmoo_ds/csrc``: where no library was
built into the wheel (no torch or no compiler in sight, as in pip's isolated builds), it is built on first use. An
editable install always builds on first use.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_BUILD = Path(__file__).parent / "bucketmoo_ds" / "ops" / "build.py"
_spec = importlib.util.spec_from_file_location("bucketmoo_build", _BUILD)
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)


class BuildWithLibraries(build_py):
    """Puts the libraries that can be built here into the wheel, and says in one line each which."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for line in build.build_into(Path(self.build_lib) / "bucketmoo_ds" / build.FOLDER):
                print(line)


class ForOnePlatform(Distribution):
    """Says that there is compiled code, where it can be built here: a wheel's files then lie where pip puts them."""

    def has_ext_modules(self):
        return build.can_build()


class WheelWithLibraries(bdist_wheel):
    """The libraries are for one platform, but for every Python and, by the stable ABI, every torch from 2.11 on."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    distclass=ForOnePlatform,
    packages=[
        *find_packages(include=["bucketmoo_ds", "bucketmoo_ds.*"]),
        "bucketmoo_ds.kernels",
        "bucketmoo_ds.csrc.common",
        "bucketmoo_ds.csrc.cpu",
        "bucketmoo_ds.csrc.cuda",
    ],
    package_dir={
        "bucketmoo_ds": "bucketmoo_ds",
        "bucketmoo_ds.kernels": "kernels",
        "bucketmoo_ds.csrc.common": "csrc/common",
        "bucketmoo_ds.csrc.cpu": "csrc/cpu",
        "bucketmoo_ds.csrc.cuda": "csrc/cuda",
    },
    package_data={
        "bucketmoo_ds": ["py.typed"],
        "bucketmoo_ds.apps.monitor": ["*.html"],
        "bucketmoo_ds.csrc.common": ["*.h"],
        "bucketmoo_ds.csrc.cpu": ["*.h", "*.cpp"],
        "bucketmoo_ds.csrc.cuda": ["*.h", "*.cpp", "*.cu", "*.cuh"],
    },
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelWithLibraries},
)
