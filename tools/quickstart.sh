#!/usr/bin/env bash
# From a fresh machine to a trained and evaluated classifier: environment, data, training, evaluation with each modality absent, predictions, report.
# Usage: bash tools/quickstart.sh [WORKDIR]      (PYTHON=python3.12 bash tools/quickstart.sh picks another interpreter)
set -euo pipefail
workdir="${1:-runs/quickstart}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment quickstart

python -m molt_jax.train --config=configs/quickstart.py --workdir="$workdir"

echo
echo 'A text without a picture, "slice of pizza":'
python -m molt_jax.predict --workdir="$workdir" --text='slice of pizza' --top_k=3
echo
echo "A picture without a text, the emoji of a clock ($workdir/clock.png):"
python tools/save_emoji.py '🕐' "$workdir/clock.png"
python -m molt_jax.predict --workdir="$workdir" --image="$workdir/clock.png" --top_k=3
echo
echo "Use it: python -m molt_jax.predict --workdir=$workdir [--image=FILE] [--text=STRING]"
echo "Scores: $workdir/evaluation.json. Report, to open in a browser:"
python -m molt_jax.report --workdir="$workdir"
