"""A run's log: one JSON object a line in metrics.jsonl, the same numbers as TensorBoard events."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorboardX

from molt_jax.config import UserError


class Logbook:
  """Appends to `metrics.jsonl` and TensorBoard events; on resume, lines after the restored step are taken back."""

  def __init__(self, workdir: pathlib.Path, *, step: int):
    path = workdir / 'metrics.jsonl'
    _keep_until(path, step)
    self._file = path.open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'events'), purge_step=step + 1 if step else None)

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Logs one line: `kind` is 'train' or 'validation'; lists and nested mappings are allowed."""
    self._file.write(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in flatten(values, kind):
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._events.close()


class NoLogbook:
  """Stands in for the logbook in processes that do not write one."""

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def flatten(values: Any, prefix: str) -> Iterator[tuple[str, float]]:
  """Yields (path, number) over nested mappings and lists."""
  items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
  if items is None:
    yield prefix, float(values)
    return
  for key, value in items:
    yield from flatten(value, f'{prefix}/{key}')


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl; a last line cut short by a kill is left out.

  Raises:
    UserError: another line is damaged.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  try:
    lines = path.read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  whole = [line for line in lines if line.endswith(b'\n')]
  return [_parse(path, number, line) for number, line in enumerate(whole, start=1)]


def _parse(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    values = json.loads(line.decode('utf-8'))
  except (ValueError, RecursionError):
    values = None
  is_line = isinstance(values, dict) and isinstance(values.get('kind'), str)
  if not (is_line and isinstance(values.get('step'), int) and _are_numbers(values)):
    raise UserError(f'{path} line {number} is damaged (no line of a log); delete that line')
  return values


def _are_numbers(values: Any, depth: int = 0) -> bool:
  """Whether a line holds numbers, in lists and objects a few levels deep, and its kind alone."""
  if isinstance(values, dict):
    inner = [value for key, value in values.items() if depth or key != 'kind']
    return depth < 9 and all(_are_numbers(value, depth + 1) for value in inner)
  if isinstance(values, list):
    return depth < 9 and all(_are_numbers(value, depth + 1) for value in values)
  return values is None or isinstance(values, int | float)


def _keep_until(path: pathlib.Path, step: int) -> None:
  if path.exists():
    kept = [line for line in read(path.parent) if line['step'] <= step]
    write_atomically(path, ''.join(json.dumps(line) + '\n' for line in kept))


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a whole file under a temporary name, then renames it."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
