#!/usr/bin/env bash
# Both README commands on each Python: a fresh clone of the last commit, a fresh environment with
# the newest versions that setup.cfg allows, and one line of results.
#
#   [OUT=FOLDER] [TESTS='tests/data tests/test_train.py'] bash tools/pythons.sh [PYTHON ...]
#
# PYTHON: names or paths of interpreters; by default each Python 3.11 to 3.14 on PATH or of pyenv.
# OUT gets the logs (default: a temporary folder); clones and environments are removed. TESTS: these
# instead of all. Needs some 25 minutes of processor time a Python.
set -uo pipefail
unset PYTHONPATH  # Nothing from elsewhere.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${OUT:-$(mktemp -d)}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"

found() {
  local version candidate pyenv="${PYENV_ROOT:-$HOME/.pyenv}"
  for version in 3.11 3.12 3.13 3.14; do
    for candidate in "python$version" "$pyenv/versions/$version".*/bin/python; do
      if "$candidate" -c '' 2>/dev/null; then
        echo "$candidate"
        break
      fi
    done
  done
}

# The line of one Python, from what its two commands left in the current folder.
line() {
  .venv/bin/python - "$1" "$2" <<'PY'
import importlib.metadata, json, pathlib, platform, sys
tests, quickstart = sys.argv[1:]
packages = ('jax', 'flax', 'orbax-checkpoint', 'numpy')
versions = ' '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)
scores = pathlib.Path('runs/quickstart/evaluation.json')
if scores.exists():
  results = json.loads(scores.read_text())['results'].values()
  quickstart = ' / '.join(f'{100 * r["accuracy"]:.1f}' for r in results)
size = sum(path.lstat().st_size for path in pathlib.Path('.venv').rglob('*')) / 1e9
print(f'Python {platform.python_version()}: {versions}; {size:.2f} GB; '
      f'tests: {tests}; quickstart: {quickstart}')
PY
}

try() {
  local python="$1" folder="$2" status=0
  git clone --quiet "$root" "$folder" && cd "$folder" || return 1
  # Prepared data and stored features lie in the home: a fresh one, so that this Python makes its
  # own. What the environment needs of the real one (pip's settings) comes before.
  for extras in quickstart quickstart,test; do
    PYTHON="$python" bash -c "source tools/environment.sh; environment $extras" || return 1
  done >"$folder.environment.log" 2>&1
  mkdir -p "$folder.home"
  export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$HOME/.cache}" PYTHON="$python"
  # shellcheck disable=SC2086
  HOME="$folder.home" bash tools/test.sh ${TESTS:-} >"$folder.test.log" 2>&1 || status=1
  HOME="$folder.home" bash tools/quickstart.sh >"$folder.quickstart.log" 2>&1 || status=1
  line "$(tail -n 1 "$folder.test.log")" "$(tail -n 1 "$folder.quickstart.log")" || status=1
  return $status
}

[ $# -gt 0 ] || mapfile -t pythons < <(found)
[ $# -eq 0 ] || pythons=("$@")
failed=0
for i in "${!pythons[@]}"; do
  if ! (try "${pythons[$i]}" "$out/$i"); then
    echo "${pythons[$i]}: failed; see $out/$i.*.log"
    failed=1
  fi
  rm -rf "$out/$i" "$out/$i.home"
done
echo "logs in $out"
exit $failed
