"""Maps the folders to packages. Everything else stands in pyproject.toml.

The folder kernels/ has no __init__.py and is installed as nirvana.kernels: a top-level module `kernels` belongs to
another distribution, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nirvana", "nirvana.*"]), "nirvana.kernels"],
    package_dir={"nirvana": "nirvana", "nirvana.kernels": "kernels"},
)
