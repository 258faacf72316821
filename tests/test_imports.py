"""Import layers: a module imports only from layers above its own."""

import ast
import pathlib
import subprocess
import sys

from molt_jax.commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[1] / 'molt_jax'

# From what stands on nothing to what a user types; those of one line may import each other.
LAYERS = (
  ('errors',),
  ('config', 'objectives'),
  ('runtime',),
  ('data', 'towers'),
  ('features',),
  ('methods', 'pairs'),
  ('training',),
  ('evaluation',),
  ('profiling', 'reporting', 'exporting', 'serving'),
  ('commands', 'estimator', *COMMANDS),
  ('__init__', '__main__'),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _folder(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).with_suffix('').parts[0]


def _imported(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'molt_jax':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('molt_jax.'):
      yield node.module.split('.')[1]
    elif isinstance(node, ast.Import):
      yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('molt_jax.'))


def test_imports_go_one_way():
  wrong = []
  for path in sorted(ROOT.rglob('*.py')):
    folder = _folder(path)
    assert folder in LEVEL, f'{path.name}: a new folder or command; give it a place in LAYERS'
    wrong += [
      f'{path.relative_to(ROOT)} imports {other}'
      for other in _imported(path)
      if LEVEL[other] > LEVEL[folder]
    ]
  assert wrong == []


def test_importing_package_and_commands_does_not_import_jax():
  code = 'import sys, molt_jax, molt_jax.commands; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_training_logs_without_importing_pytorch(tmp_path):
  """TensorBoard's writer imports it where it is installed, which takes a second."""
  code = f"""
import importlib.util, pathlib, sys
from molt_jax.runtime import logbook
log = logbook.Logbook(pathlib.Path({str(tmp_path)!r}), step=0)
log.write('train', 1, {{'loss': 1.0}})
log.close()
assert 'torch' not in sys.modules
if importlib.util.find_spec('torch'):  # Whoever wants it afterwards gets it.
  import torch
"""
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
  assert list((tmp_path / 'events').iterdir())
