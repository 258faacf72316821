"""A run's log: one JSON object a line in metrics.jsonl, the same numbers as TensorBoard events."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorboardX

from molt_jax import cli


class Logbook:
  """Appends to `metrics.jsonl` and TensorBoard events; on resume, lines after the restored step are taken back."""

  def __init__(self, workdir: pathlib.Path, *, step: int):
    path = workdir / 'metrics.jsonl'
    _keep_until(path, step)
    self._file = path.open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'events'), purge_step=step + 1 if step else None)

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Logs one line: `kind` is 'train' or 'validation'; lists and nested mappings are allowed."""
    self._file.write(to_json({'kind': kind, 'step': step, **values}) + '\n')
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
  """Yields (path, number) over nested mappings and lists; what is not finite is left out."""
  items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
  if items is None:
    if values is not None and math.isfinite(values):
      yield prefix, float(values)
    return
  for key, value in items:
    yield from flatten(value, f'{prefix}/{key}')


def to_json(value: Any, **how: Any) -> str:
  """Returns JSON without NaN and infinities, which are no numbers there: a mapping leaves such a
  value out, a list has null in its place. `how` goes to `json.dumps`.
  """
  return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(x) for key, x in value.items() if not _is_no_number(x)}
  if isinstance(value, list | tuple):
    return [None if _is_no_number(x) else _finite(x) for x in value]
  return value


def _is_no_number(value: Any) -> bool:
  return isinstance(value, float) and not math.isfinite(value)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl; a last line cut short by a kill is left out."""
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines(keepends=True) if line.endswith('\n')] if path.exists() else []


def kept(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object there, {} where there is none; a file without one, which is said, has
  nothing to keep.
  """
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError):  # No JSON, no UTF-8, too long a number; too deep.
    value = None
  if isinstance(value, dict):
    return value
  cli.say(f'{path} is damaged: it is written anew')
  return {}


def _keep_until(path: pathlib.Path, step: int) -> None:
  if path.exists():
    kept = [line for line in read(path.parent) if line['step'] <= step]
    write_atomically(path, ''.join(to_json(line) + '\n' for line in kept))


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a whole file under a temporary name, then renames it."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
