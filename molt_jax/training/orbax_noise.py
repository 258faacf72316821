"""What goes wrong while Orbax saves or reads, as one line.

Orbax and TensorStore work in many threads. On a full disk, or where files are damaged, each of them
logs its traceback, and what is then abandoned prints its own when it ends, where nobody can catch
it; the error itself comes out of the next call of Orbax. So the first goes nowhere, and the second
becomes the line.
"""

import contextlib
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from molt_jax import errors
from molt_jax.errors import UserError

_SOURCES = ('/orbax/', '/tensorstore/', '/asyncio/')
# What abandoned work says when their event loop, or Python, has ended before them.
_ABANDONED = ('Event loop is closed', 'Python is likely shutting down')


@contextlib.contextmanager
def explained(folder: pathlib.Path) -> Iterator[None]:
  """Turns what Orbax raises where files cannot be written into a `UserError` of one line.

  Args:
    folder: of the checkpoints that are written.

  Raises:
    UserError: they cannot be written; what was saved before is as it was.
  """
  _silence_threads()
  also = 'then the same command goes on from the last one that is whole'
  with errors.explained(f'--workdir: a checkpoint cannot be written to {folder}', also):
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      first = _first(error)
      if first is None or first is error:
        raise
      raise first from error


def _first(error: BaseException) -> BaseException | None:
  """Returns the exception of a chain that tells why files cannot be written."""
  seen, link = set(), error
  while link is not None and id(link) not in seen:
    if errors.cause(link) is not None:
      return link
    seen.add(id(link))
    link = link.__cause__ or link.__context__
  return None


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """Keeps Orbax from logging, at length, what it also raises."""
  _silence_threads()
  disabled = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(disabled)


def _silence_threads() -> None:
  """Keeps threads of Orbax from logging and printing their tracebacks."""
  for name in ('absl', 'asyncio'):
    logger = logging.getLogger(name)
    if _is_wanted not in logger.filters:
      logger.addFilter(_is_wanted)
  if getattr(sys.unraisablehook, '__module__', None) != __name__:
    sys.unraisablehook = _Hook(sys.unraisablehook)


def _is_wanted(record: logging.LogRecord) -> bool:
  from_thread = any(part in record.pathname.replace('\\', '/') for part in _SOURCES)
  return not from_thread or record.levelno > logging.ERROR


class _Hook:
  """A `sys.unraisablehook` that leaves abandoned work of Orbax out."""

  def __init__(self, before: Any):
    self._before = before

  def __call__(self, unraisable: Any) -> None:
    text = str(unraisable.exc_value)
    code = getattr(unraisable.object, 'cr_code', None)
    of_orbax = code is not None and 'orbax' in code.co_filename
    if not of_orbax and not any(part in text for part in _ABANDONED):
      self._before(unraisable)
