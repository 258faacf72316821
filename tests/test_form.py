"""The form that the linter cannot hold: functions that fit a screen."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('molt_jax', 'configs', 'experiments', 'tools')
MOST_LINES = 50

# 'file: function', those that are longer and may be.
LONGER = {
  'experiments/latent_structure.py: main',
  'experiments/table1.py: lines',
  'experiments/table2.py: figure',
  'molt_jax/evaluate.py: run',
  'molt_jax/methods/parts/attention.py: attend',
  'molt_jax/predict.py: predict',
  'molt_jax/towers/stack.py: run_layers',
  'molt_jax/towers/tokenizer.py: wrap',
  'tools/bench_backbone.py: main',
  'tools/bench_store.py: measure',
  'tools/fuzzing/gguf.py: _structure',
  'tools/fuzzing/report.py: write_run',
  'tools/profile_step.py: measure',
}


def _longer():
  for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES:
          yield f'{path.relative_to(ROOT).as_posix()}: {node.name}'


def test_functions_fit_a_screen():
  assert sorted(set(_longer()) - LONGER) == []
