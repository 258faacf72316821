"""Busy seconds of the devices by part of the step, from a trace of the profiler."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax

_SCOPES = {
  'image_tower': r'\bVisionTransformer\b',
  'text_tower': r'\b(Decoder|Bert|ClipText|SiglipText)\b',
  'cca': r'\bcca\b',
  'optimizer': r'\boptimizer\b',
}
_INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = .*?\b([a-z][a-z0-9-]*)\(.*?metadata=\{[^}]*?op_name="([^"]*)"',
  re.MULTILINE,
)
# Their time is that of the operations inside, which have events of their own.
_CONTAINERS = ('while', 'conditional', 'call')


def part_of(op_name: str) -> str:
  """The part of the step that an operation belongs to, by the scopes in its name."""
  return next((part for part, scope in _SCOPES.items() if re.search(scope, op_name)), 'head')


def trace_parts(directory: str | pathlib.Path, program: str, *, steps: int) -> dict[str, float]:
  """Busy seconds of the devices per step, by part, from a trace of `jax.profiler`.

  Args:
    directory: where the trace is.
    program: text of the compiled program, `compiled.as_text()`, which says what part an operation
      belongs to.
    steps: how often it ran in the trace.
  """
  known = {}
  for name, opcode, op_name in _INSTRUCTION.findall(program):
    known[name] = opcode, part_of(op_name)
  total = dict.fromkeys(('image_tower', 'text_tower', 'head', 'cca', 'optimizer', 'unknown'), 0.0)
  for event, operation in _operations(directory):
    opcode, part = known.get(operation, ('', 'unknown'))
    if opcode not in _CONTAINERS and not operation.startswith(_CONTAINERS):
      total[part] += event.duration_ns / 1e9 / steps
  return total


def _operations(directory: str | pathlib.Path) -> Iterator[tuple[Any, str]]:
  for file in sorted(pathlib.Path(directory).rglob('*.xplane.pb')):
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      for line in plane.lines:
        for event in line.events:
          operation = dict(event.stats).get('hlo_op')
          if operation and not event.name.startswith('end: '):
            yield event, operation
