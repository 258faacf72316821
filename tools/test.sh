#!/usr/bin/env bash
# Environment with test extras, linter, tests. Further arguments go to pytest: bash tools/test.sh tests/modules -x
# A machine without a GPU can spare itself gigabytes by installing the CPU build of PyTorch (used by tests only) into .venv first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment quickstart,test

ruff check .
python -m pytest -n 2 --dist=loadfile "$@"
