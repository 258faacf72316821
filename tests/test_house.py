"""The stairs of the house: a module imports only from rooms above its own."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / 'molt_jax'

# Rooms that all may import.
GROUND = ('errors', 'atomic', 'saving', 'lost')
# Room -> rooms it may import from, beside itself.
SERVICES = ('processes', 'sharding', 'train_state', 'checkpoint', 'metrics', 'model', 'cli', 'diagnostics',
            'logbook', 'records', 'terminal')
ROOMS = {
    '__init__': ('predict',),
    'config': (),
    'files': ('config',),
    'errors': ('config',),
    'atomic': ('errors',),
    'lost': (),
    'saving': ('config', 'errors'),
    'workdir': ('config', 'errors', 'atomic', 'cli'),
    'presets': ('config',),
    'data': ('config', 'files', 'cli', 'terminal'),
    'data.describe': ('config', 'data', 'backbones', *SERVICES),
    'backbones': ('config', 'files'),
    'modules': ('config', 'backbones'),
    'objectives': (),
    **dict.fromkeys(
        SERVICES, ('config', 'files', 'data', 'backbones', 'modules', 'objectives', *SERVICES)),
    'terminal': (),
    'records': ('config', 'data', 'logbook', 'terminal'),
    'report': ('config', 'cli', 'data', 'logbook', 'records', 'terminal', 'trained', 'workdir'),
    'trained': ('config', 'data', *SERVICES),
    'pair_metrics': ('config', 'objectives'),
    'loop': ('config', *SERVICES, 'trained', 'workdir'),
    'fill': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES),
    'evaluate': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES, 'fill', 'trained', 'workdir'),
    'predict': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES, 'trained'),
    'profiling': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES, 'step'),
    'step': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES),
    'translate': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES, 'step'),
    'dual': ('config', 'data', 'backbones', 'objectives', *SERVICES),
    'train': ('config', 'data', 'backbones', 'modules', 'objectives', *SERVICES, 'loop', 'fill', 'evaluate', 'step', 'trained', 'translate'),
    'pretrain': ('config', 'data', 'backbones', 'objectives', *SERVICES, 'loop', 'dual', 'pair_metrics', 'trained'),
    'pair_evaluation': ('config', 'data', 'backbones', 'objectives', *SERVICES, 'dual', 'pair_metrics', 'pretrain', 'trained', 'workdir'),
}


def _room(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts) if '.'.join(parts) in ROOMS else parts[0]


def _imported_rooms(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'molt_jax':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('molt_jax.'):
      yield node.module.split('.')[1]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split('.')[1] for alias in node.names if alias.name.startswith('molt_jax.'))


def test_imports_go_one_way():
  wrong = []
  for path in sorted(ROOT.rglob('*.py')):
    room = _room(path)
    assert room in ROOMS, f'{path.name}: a new room; give it a row in ROOMS'
    wrong += [f'{path.relative_to(ROOT)} imports {other}' for other in _imported_rooms(path)
              if other not in (room, *GROUND, *ROOMS[room])]
  assert wrong == []


def test_importing_the_package_alone_does_not_import_jax():
  import subprocess
  import sys
  code = 'import sys, molt_jax, molt_jax.config; sys.exit("jax" in sys.modules or "torch" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
