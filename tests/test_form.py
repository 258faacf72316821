"""The form that the linter cannot hold: functions that fit a screen."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('molt_jax', 'configs', 'experiments', 'tools')
MOST_LINES = 50

# 'file: function', those that are longer and may be.
LONGER = {
  'molt_jax/evaluate.py: run',
  'molt_jax/predict.py: predict',
  'molt_jax/towers/stack.py: run_layers',
  'tools/fuzzing/gguf.py: _structure',
}


def _longer():
  for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES:
          yield f'{path.relative_to(ROOT).as_posix()}: {node.name}'


def test_functions_fit_a_screen():
  assert set(_longer()) == LONGER
