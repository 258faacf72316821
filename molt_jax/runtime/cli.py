"""What every command line shares: flags, one-line errors, progress."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import rich.console
import rich.progress
import rich.text

from molt_jax import errors
from molt_jax.errors import UserError
from molt_jax.runtime import terminal

PLAIN_LINE_SECONDS = 15.0
MOST_OF_AN_ERROR = 4_000  # Characters: it may quote a value of any length.


class Flag(NamedTuple):
  """One command-line flag `--name`.

  `many`: its value is a list, of several words, words joined by commas, or the flag given again.
  `switch`: it has no value; the result is whether it is given.
  """

  name: str
  meaning: str
  default: str | None = None
  required: bool = False
  many: bool = False
  switch: bool = False


class Together(Protocol):
  """The other processes of a run, when a command fails in this one."""

  def explain(self, error: BaseException) -> None:
    """Ends the process if the error comes of another process that is gone."""

  def leave(self, code: int) -> None:
    """Ends the process so that the others notice."""


together: Together | None = None  # Set by `processes` where there are others.
DEVICE_MEMORY = (
  'give smaller batches (train.batch_size, eval.batch_size), train.accumulate, '
  'backbones.dtype=bfloat16 or backbones.quantization, or more devices'
)


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[[Sequence[str]], int]:
  """Wraps `main(argv) -> exit code`: what user or machine can mend becomes one line and code 2.

  That is a `UserError`, and whatever the operating system or the memory refused that no place
  nearer to it has explained. Other exceptions are mistakes of ours and keep their traceback.
  """

  @functools.wraps(main)
  def wrapped(argv):
    _prepare_streams()
    try:
      code = main(argv) or 0
      sys.stdout.flush()
      return code
    except KeyboardInterrupt:
      line, code = 'interrupted', 128 + signal.SIGINT
    except Exception as error:
      if together and not isinstance(error, UserError):
        together.explain(error)
      line, code = _explain(error)
      if not code:
        if not together:
          raise
        line, code = ''.join(traceback.format_exception(error)).rstrip(), 1
    _last_words(line)
    if together:
      together.leave(code)
    return code

  return wrapped


def _explain(error: Exception) -> tuple[str, int]:
  """Returns (the line of an exception, exit code), the code 0 where it is a mistake of ours."""
  if isinstance(error, UserError):
    return f'error: {terminal.clean(error, MOST_OF_AN_ERROR)}', 2
  if isinstance(error, OSError) and (stream := _broken_stream()):
    if isinstance(error, BrokenPipeError):  # As of `| head`: who reads has read enough.
      return '', 128 + signal.SIGPIPE
    return f'error: {stream} cannot be written: {errors.line(error)}', 2
  if type(error).__name__ == 'JaxRuntimeError':
    if 'RESOURCE_EXHAUSTED' in str(error):
      return f'error: not enough memory on the device; {DEVICE_MEMORY}', 2
    return '', 0
  line = errors.line(error)
  return (f'error: {terminal.clean(line, MOST_OF_AN_ERROR)}', 2) if line else ('', 0)


def _prepare_streams() -> None:
  """Sees to it that messages can be printed: in any encoding, and where a stream was closed."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    elif isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _last_words(line: str) -> None:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    if line:
      print(line, file=sys.stderr, flush=True)


def _broken_stream() -> str:
  """Returns the name of the stream that can no longer be written, '' where both can.

  What waits in it is given up, so that Python does not complain of it at its end.
  """
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    try:
      stream.flush()
    except OSError:
      with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
      return name
  return ''


class _Parser(argparse.ArgumentParser):
  """argparse whose mistakes are one line."""

  def error(self, message):
    raise UserError(f'{message}; see {self.prog} --help')


def parse(
  prog: str, purpose: str, flags: Sequence[Flag], argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
  """Returns the flags' values and the `--config.FIELD=VALUE` overrides.

  Raises:
    UserError: a required flag is missing or a flag is unknown.
  """
  for word in argv:
    if '\0' in word:
      raise UserError(f'{word!r} has a NUL character, which no file and no value has; leave it out')
  parser = _Parser(prog=f'python -m {prog}', description=purpose, allow_abbrev=False)
  for flag in flags:
    how = {'nargs': '+', 'action': 'extend'} if flag.many else {}
    how |= {'action': 'store_true', 'default': False} if flag.switch else {'default': flag.default}
    parser.add_argument(f'--{flag.name}', required=flag.required, help=flag.meaning, **how)
  takes_config = any(flag.name == 'config' for flag in flags)
  if takes_config:
    parser.epilog = (
      'Any field of the config: --config.FIELD=VALUE (fields, meanings, legal values: '
      'molt_jax/config/schema.py). '
      f'{", ".join(SHORTHANDS)}: the field of that name.'
    )
  many = [flag for flag in flags if flag.many]
  known, rest = parser.parse_known_args(
    [part for word in argv for part in _apart(word, [flag.name for flag in many])]
  )
  for flag in flags:
    if flag.required and getattr(known, flag.name) == '':
      raise UserError(f'--{flag.name}: empty; give {flag.meaning}')
  for flag in many:
    values = [part for word in getattr(known, flag.name) or () for part in word.split(',') if part]
    if flag.required and not values:
      raise UserError(f'--{flag.name}: empty; give {flag.meaning}')
    setattr(known, flag.name, values)
  names = [f'--{flag.name}' for flag in flags]
  return known, dict(_overrides(rest, names, takes_config))


def whole_number(flags: argparse.Namespace, name: str) -> int:
  """Returns a flag's value as an int >= 1, or raises UserError."""
  value = getattr(flags, name)
  if not value.isdecimal() or not int(value):
    raise UserError(f'--{name}: {value!r} is not legal; give a whole number >= 1')
  return int(value)


# Flags that stand for a field of the config; without a value they set it.
SHORTHANDS = {'--allow_count_mismatch': '--config.dataset.allow_count_mismatch'}


def _apart(word: str, many: Sequence[str]) -> list[str]:
  """Takes --name=VALUE apart where more values may follow; argparse would end the list there."""
  name, equals, value = word.partition('=')
  return [name, value] if equals and name.removeprefix('--') in many else [word]


def _overrides(
  rest: Sequence[str], names: Sequence[str], takes_config: bool
) -> Iterator[tuple[str, str]]:
  words = iter(rest)
  for word in words:
    name, equals, value = word.partition('=')
    if takes_config and name in SHORTHANDS:
      name, equals, value = SHORTHANDS[name], '=', value or 'true'
    if not (takes_config and name.startswith('--config.')):
      near = difflib.get_close_matches(name, names, n=1)
      hint = (
        f'did you mean {near[0]}?'
        if near
        else f'known: {", ".join(names)}' + (', --config.FIELD=VALUE' if takes_config else '')
      )
      raise UserError(f'unknown argument {word!r}; {hint}')
    if not equals:
      value = next(words, None)
      if value is None:
        raise UserError(f'{name}: no value; write {name}=VALUE')
    yield name.removeprefix('--config.'), value


def say(message: str) -> None:
  """Prints one line for the reader on stderr, so that stdout holds results only."""
  _CONSOLE.print(terminal.clean(message), markup=False, highlight=False, soft_wrap=True)


_CONSOLE = rich.console.Console(stderr=True, emoji=False)  # :cat: in a name is no emoji.


def be_silent() -> None:
  """Turns off what `say` and `progress` print: in a run of several processes one speaks."""
  _CONSOLE.quiet = True


class Progress:
  """Counts work: a bar with rate and time left on a terminal, a plain line every now and then
  otherwise.
  """

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
    elif time.monotonic() - self._last >= PLAIN_LINE_SECONDS:
      self._last = time.monotonic()
      say(self._line(note))

  def _line(self, note: str) -> str:
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
