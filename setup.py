"""The packages of the wheel; all else is in pyproject.toml.

The flag files in experiments/ are installed as fame_jax/experiments/, which pyproject.toml can say
only next to a full list of packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['fame_jax', 'fame_jax.*']), 'fame_jax.experiments'],
    package_dir={'fame_jax.experiments': 'experiments'},
)
