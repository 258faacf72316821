"""The packages; everything else about the distribution is in setup.cfg.

`configs/` at the top of the repository is where people look for presets, and a wheel has the same
files as `molt_jax/presets`. There is one copy: a link would be lost on file systems and in archives
without links, and one-line imports would hide what a preset sets. setup.cfg cannot add a package
with a folder of its own to those it finds, hence this file.
"""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=['molt_jax*']), 'molt_jax.presets'],
  package_dir={'molt_jax.presets': 'configs'},
)
