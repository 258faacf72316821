"""Messages and progress for the person at the terminal: on stderr, so that stdout holds results."""

import contextlib
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.text

from molt_jax.runtime import terminal

PLAIN_SECONDS = 15.0  # Between two messages of progress where there is no terminal.
_CONSOLE = rich.console.Console(stderr=True, emoji=False)  # :cat: in a name is no emoji.


def log(message: str) -> None:
  """Prints a message in one line."""
  _CONSOLE.print(terminal.clean(message), markup=False, highlight=False, soft_wrap=True)


def be_silent() -> None:
  """Turns off `log` and `progress`: of several processes only the main one prints."""
  _CONSOLE.quiet = True


class Progress:
  """Counts work: a bar with rate and time left on a terminal, otherwise a message now and then."""

  def __init__(self, title: str, total: int, unit: str, *, done: int = 0):
    self.title, self.total, self.unit, self.done = title, total, unit, done
    self._start, self._first, self._last = time.monotonic(), done, time.monotonic()
    self._bar = _bar(unit) if _CONSOLE.is_terminal else None
    if self._bar:
      self._bar.start()
      self._task = self._bar.add_task(title, total=total, completed=done, note='')

  def advance(self, amount: int = 1, note: str = '') -> None:
    """Adds finished work; `note` is shown beside it."""
    self.done += amount
    if self._bar:
      self._bar.update(self._task, completed=self.done, note=note)
    elif time.monotonic() - self._last >= PLAIN_SECONDS:
      self._last = time.monotonic()
      log(self._message(note))

  def _message(self, note: str) -> str:
    rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
    left = (self.total - self.done) / rate if rate else 0
    parts = [
      f'{self.title}: {self.done}/{self.total} {self.unit}',
      f'{rate:.3g} {self.unit}/s',
      f'{int(left) // 60}:{int(left) % 60:02d} left',
      note,
    ]
    return ', '.join(part for part in parts if part)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def _bar(unit: str) -> rich.progress.Progress:
  p = rich.progress
  return p.Progress(
    p.TextColumn('{task.description}'),
    p.BarColumn(),
    p.MofNCompleteColumn(),
    p.TextColumn(unit),
    _Rate(unit),
    p.TimeRemainingColumn(),
    p.TextColumn('{task.fields[note]}'),
    console=_CONSOLE,
    transient=True,
  )


class _Rate(rich.progress.ProgressColumn):
  def __init__(self, unit: str):
    super().__init__()
    self.unit = unit

  def render(self, task):
    return rich.text.Text(f'{task.speed:.3g} {self.unit}/s' if task.speed else '')


@contextlib.contextmanager
def progress(title: str, total: int, unit: str, *, done: int = 0) -> Iterator[Progress]:
  """Shows progress over a block."""
  bar = Progress(title, total, unit, done=done)
  try:
    yield bar
  finally:
    bar.close()
