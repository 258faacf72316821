"""Messages and progress for the person at the terminal: on stderr, so that stdout holds results."""

import contextlib
import threading
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.text

from molt_jax.runtime import terminal

PLAIN_SECONDS = 15.0  # Between two messages of progress where there is no terminal.
COMPILE_SECONDS = 5.0  # After which it is said there that the first step compiles.
# :cat: in a name is no emoji. A notebook gets lines, as any other place that is no terminal.
_CONSOLE = rich.console.Console(stderr=True, emoji=False, force_jupyter=False)


def log(message: str) -> None:
  """Prints a message in one line."""
  _CONSOLE.print(terminal.clean(message), markup=False, highlight=False, soft_wrap=True)


def be_silent() -> None:
  """Turns off `log` and `progress`: of several processes only the main one prints."""
  _CONSOLE.quiet = True


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """`log` and `progress` say nothing in this context, as what they say is said again."""
  before, _CONSOLE.quiet = _CONSOLE.quiet, True
  try:
    yield
  finally:
    _CONSOLE.quiet = before


class Progress:
  """Counts work: a bar with rate and time left on a terminal, otherwise a message now and then.

  What is done first does not count for the rate: it may have been compiled.
  """

  def __init__(self, title: str, total: int, unit: str, *, done: int = 0, compiles: bool = False):
    self.title, self.total, self.unit, self.done = title, total, unit, done
    self._start, self._first, self._last = 0.0, -1, time.monotonic()
    self._bar = _bar(unit) if _CONSOLE.is_terminal else None
    self._announcement = None
    if self._bar:
      self._bar.start()
      note = 'compiling' if compiles else ''
      self._task = self._bar.add_task(title, total=total, completed=done, note=note)
    elif compiles:
      self._announcement = threading.Timer(COMPILE_SECONDS, log, [f'{title}: compiling, once'])
      self._announcement.daemon = True
      self._announcement.start()

  def advance(self, amount: int = 1, note: str = '') -> None:
    """Adds finished work; `note` is shown beside it."""
    self.done += amount
    if self._first < 0:
      self._start, self._first = time.monotonic(), self.done
      self._hush()
    if self._bar:
      self._bar.update(self._task, completed=self.done, note=note)
    elif time.monotonic() - self._last >= PLAIN_SECONDS:
      self._last = time.monotonic()
      log(self._message(note))

  def exclude(self, seconds: float) -> None:
    """Takes time out of the rate: something else was done, or compiled."""
    self._start += seconds

  def _message(self, note: str) -> str:
    parts = [f'{self.title}: {self.done}/{self.total} {self.unit}']
    rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
    if rate > 0:
      left = int((self.total - self.done) / rate)
      parts += [f'{rate:.3g} {self.unit}/s', f'{left // 60}:{left % 60:02d} left']
    return ', '.join(part for part in [*parts, note] if part)

  def _hush(self) -> None:
    if self._announcement:
      self._announcement.cancel()

  def close(self) -> None:
    self._hush()
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
def progress(
  title: str, total: int, unit: str, *, done: int = 0, compiles: bool = False
) -> Iterator[Progress]:
  """Shows progress over a block; `compiles`: its first step may, which is said where it takes
  long.
  """
  bar = Progress(title, total, unit, done=done, compiles=compiles)
  try:
    yield bar
  finally:
    bar.close()
