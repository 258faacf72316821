#!/usr/bin/env bash
# Environment with test extras, linter, tests but for those marked slow, which --all runs too.
# Further arguments go to pytest:
#   [PYTHON=python3.12] bash tools/test.sh [--all] tests/modules -x
set -euo pipefail
selected=(-m 'not slow')
if [[ ${1-} == --all ]]; then
  selected=(--kills=20)
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment quickstart,test

ruff check .
ruff format --check .
# What XLA says when it aborts, pytest would swallow: one operation under the tests' settings first.
if ! PYTHONPATH=tests/reference python -c 'import runpy
runpy.run_path("tests/conftest.py")["jax"].numpy.ones(2).sum().block_until_ready()'; then
  echo 'error: JAX does not run under the settings of tests/conftest.py; see above' >&2
  exit 1
fi
python -m pytest -n 2 --dist=loadfile "${selected[@]}" --durations=10 "$@"
