"""A run's log: one JSON object a line in metrics.jsonl, the same numbers as TensorBoard events."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from molt_jax import errors
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console


class Logbook:
  """Appends to `metrics.jsonl` and TensorBoard events.

  On resume, lines after the restored step are taken back. All is written in the caller's thread, so
  that an error comes out where it happens: a writer thread that dies of one is waited for without
  end.

  Raises:
    UserError: of all methods: a file cannot be written.
  """

  def __init__(self, workdir: pathlib.Path, *, step: int):
    self._path, self._folder = workdir / 'metrics.jsonl', workdir / 'events'
    _keep_until(self._path, step)
    with self._explained(self._path):
      self._file = self._path.open('a', encoding='utf-8')
    with self._explained(self._folder):
      self._folder.mkdir(exist_ok=True)
      # Whoever reads a logbook alone need not wait for it.
      with _unimportable('torch'):
        from tensorboardX import event_file_writer
      from tensorboardX.proto import event_pb2

      # Calls within a second would otherwise share a file.
      suffix = f'.{os.getpid()}'
      self._events = event_file_writer.EventsWriter(str(self._folder / 'events'), suffix)
      if step:
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=step + 1, session_log=begin)

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Logs one line: `kind` is 'train' or 'validation'; lists and nested mappings are allowed."""
    with self._explained(self._path):
      self._file.write(to_json({'kind': kind, 'step': step, **values}) + '\n')
      self._file.flush()
    from tensorboardX import summary

    with self._explained(self._folder):
      for name, value in flatten(values, kind):
        self._add_event(step=step, summary=summary.scalar(name, value))
      if kind == 'validation':  # Brings the file to disk, which takes its time.
        self._events.flush()

  def close(self) -> None:
    with self._explained(self._path):
      self._file.close()
    with self._explained(self._folder):
      self._events.close()

  def _add_event(self, **what: Any) -> None:
    from tensorboardX.proto import event_pb2

    self._events.write_event(event_pb2.Event(wall_time=time.time(), **what))

  def _explained(self, path: pathlib.Path):
    return errors.explained(f'{path} cannot be written', GOES_ON)


@contextlib.contextmanager
def _unimportable(package: str) -> Iterator[None]:
  """For what imports a large package where it is installed, and does without where it is not."""
  if package in sys.modules:
    yield
    return
  sys.modules[package] = None
  try:
    yield
  finally:
    del sys.modules[package]


# What to say of a run whose files cannot be written any more.
GOES_ON = 'then the same command goes on from the last checkpoint'


class NoLogbook:
  """Stands in for the logbook in processes that do not write one."""

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def flatten(values: Any, prefix: str) -> Iterator[tuple[str, float]]:
  """Yields (path, number) over nested mappings and lists; what is not finite is left out."""
  items = (
    values.items()
    if isinstance(values, Mapping)
    else enumerate(values)
    if isinstance(values, list)
    else None
  )
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
  if fault := _fault(values):
    raise UserError(f'{path}, line {number}, is damaged ({fault}); delete that line')
  return values


def _fault(values: Any) -> str:
  """Returns what is wrong with a line, '' where it can be one; a report looks at the rest."""
  if not isinstance(values, dict):
    return 'no JSON object'
  if not isinstance(values.get('kind'), str):
    return 'its kind is no string'
  return '' if type(values.get('step')) is int else 'its step is no number'


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
  console.log(f'{path} is damaged: it is written anew')
  return {}


def _keep_until(path: pathlib.Path, step: int) -> None:
  if path.exists():
    kept = [line for line in read(path.parent) if line['step'] <= step]
    atomic.write(path, ''.join(to_json(line) + '\n' for line in kept))
