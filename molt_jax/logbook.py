"""A run's log: one JSON object a line in metrics.jsonl, the same numbers as TensorBoard events."""

import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from molt_jax import atomic, errors

write_atomically = atomic.write


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
      # Calls within a second would otherwise share a file.
      suffix = f'.{os.getpid()}'
      self._events = event_file_writer.EventsWriter(str(self._folder / 'events'), suffix)
      if step:
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=step + 1, session_log=begin)

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Logs one line: `kind` is 'train' or 'validation'; lists and nested mappings are allowed."""
    with self._explained(self._path):
      self._file.write(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
      self._file.flush()
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
    self._events.write_event(event_pb2.Event(wall_time=time.time(), **what))

  def _explained(self, path: pathlib.Path):
    return errors.explained(f'{path} cannot be written', GOES_ON)


# What to say of a run whose files cannot be written any more.
GOES_ON = 'then the same command goes on from the last checkpoint'


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
  """Returns the lines of metrics.jsonl; a last line cut short by a kill is left out."""
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines(keepends=True) if line.endswith('\n')] if path.exists() else []


def _keep_until(path: pathlib.Path, step: int) -> None:
  if path.exists():
    kept = [line for line in read(path.parent) if line['step'] <= step]
    atomic.write(path, ''.join(json.dumps(line) + '\n' for line in kept))
