"""Maps the folders of the repository to packages; everything else stands in pyproject.toml.

``kernels/`` is installed as ``bucketmoo_ds.kernels`` and never as a top-level ``kernels``: Hugging Face ships a
package of that name, and transformers looks for it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bucketmoo_ds", "bucketmoo_ds.*"]), "bucketmoo_ds.kernels"],
    package_dir={"bucketmoo_ds": "bucketmoo_ds", "bucketmoo_ds.kernels": "kernels"},
    package_data={"bucketmoo_ds": ["py.typed"], "bucketmoo_ds.monitor": ["*.html"]},
)
