"""Command lines: flags and overrides of the config are read, and mistakes become one line."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from molt_jax import errors
from molt_jax.config.schema import Schema
from molt_jax.errors import UserError
from molt_jax.runtime import help_text, terminal
from molt_jax.runtime.flags import Flag, choice, value_of

__all__ = ['Flag', 'choice', 'command', 'parse']

MOST_OF_AN_ERROR = 4_000  # Characters: it may quote a value of any length.


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
      message, code = 'interrupted', 128 + signal.SIGINT
    except Exception as error:
      if together and not isinstance(error, UserError):
        together.explain(error)
      message, code = _explain(error)
      if not code:
        if not together:
          raise
        message, code = ''.join(traceback.format_exception(error)).rstrip(), 1
    _last_words(message)
    if together:
      together.leave(code)
    return code

  return wrapped


def _explain(error: Exception) -> tuple[str, int]:
  """Returns (the one-line message of an exception, exit code); a mistake of ours has the code 0."""
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
  message = errors.line(error)
  if not message:
    return '', 0
  return f'error: {terminal.clean(message, MOST_OF_AN_ERROR)}', 2


def _prepare_streams() -> None:
  """Sees to it that messages can be printed: in any encoding, and where a stream was closed."""
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    elif isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _last_words(message: str) -> None:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    if message:
      print(message, file=sys.stderr, flush=True)


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
  """argparse whose mistakes are one line and whose help is ours."""

  help_text = ''

  def error(self, message):
    raise UserError(f'{message}; see {self.prog} --help')

  def format_help(self):
    return self.help_text


def parse(
  prog: str,
  purpose: str,
  flags: Sequence[Flag],
  argv: Sequence[str],
  *,
  schema: Schema | None = None,
) -> tuple[argparse.Namespace, dict[str, str]]:
  """Reads a command line; `--help` prints every flag and field and exits.

  Args:
    prog: what the user types before the flags.
    purpose: one sentence for `--help`.
    flags: of the command.
    argv: the words after `prog`.
    schema: of the config; None: the command takes no `--config.FIELD`.

  Returns:
    The flags' values, each of its type, and the `--config.FIELD=VALUE` overrides.

  Raises:
    UserError: a required flag is missing, a flag is unknown, a value is not legal.
  """
  for word in argv:
    if '\0' in word:
      raise UserError(f'{word!r} has a NUL character, which no file and no value has; leave it out')
  parser = _Parser(prog=prog, allow_abbrev=False)
  parser.help_text = help_text.render(prog, purpose, flags, schema)
  for flag in flags:
    how = {'action': 'store_true'} if flag.switch else {}
    if flag.many:
      how = {'nargs': '+', 'action': 'extend'}
    required = flag.required and not flag.bare
    parser.add_argument(f'--{flag.name}', required=required, **how)
  many = [flag.name for flag in flags if flag.many]
  words = []
  for word in argv:
    words += _apart(word, many)
  known, rest = parser.parse_known_args(words)
  for flag in flags:
    if flag.bare:
      rest = _take_bare(parser, flag, known, rest)
  for flag in flags:
    if not flag.switch:
      setattr(known, flag.name, value_of(flag, getattr(known, flag.name)))
  names = [f'--{flag.name}' for flag in flags]
  return known, dict(_overrides(rest, names, schema is not None))


def _take_bare(
  parser: _Parser, flag: Flag, known: argparse.Namespace, rest: Sequence[str]
) -> list[str]:
  """Gives a flag the word that stands by itself; returns the others."""
  words = list(rest)
  for place, word in enumerate(rest):
    # `--config.FIELD VALUE` is a flag that argparse does not know, and its value.
    is_value = place and rest[place - 1].startswith('--') and '=' not in rest[place - 1]
    if not word.startswith('-') and not is_value and getattr(known, flag.name) is None:
      setattr(known, flag.name, words.pop(place))
  if flag.required and getattr(known, flag.name) is None:
    parser.error(f'the following arguments are required: {flag.name.upper()}')
  return words


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
      raise UserError(f'unknown argument {word!r}; {_suggest(name, names, takes_config)}')
    if not equals:
      value = next(words, None)
      if value is None:
        raise UserError(f'{name}: no value; write {name}=VALUE')
    yield name.removeprefix('--config.'), value


def _suggest(name: str, names: Sequence[str], takes_config: bool) -> str:
  near = difflib.get_close_matches(name, names, n=1)
  if near:
    return f'did you mean {near[0]}?'
  known = [*names, '--config.FIELD=VALUE'] if takes_config else names
  return f'known: {", ".join(known)}'
