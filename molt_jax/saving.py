"""What goes wrong while Orbax saves, as one line.

Orbax and TensorStore write in many threads. On a full disk each of them logs its traceback, and
writes that are then abandoned print theirs when they end; the error itself comes out of the next
call of Orbax. So the first goes nowhere, and the second becomes the line.
"""

import contextlib
import logging
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from molt_jax import errors
from molt_jax.config import UserError

_NUMBER = re.compile(r'os[_ ]error\D{0,10}(\d+)', re.IGNORECASE)
_SOURCES = ('/orbax/', '/tensorstore/', '/asyncio/')
# What abandoned writes say when their event loop, or Python, has ended before them.
_ABANDONED = ('Event loop is closed', 'Python is likely shutting down')


@contextlib.contextmanager
def explained(folder: pathlib.Path) -> Iterator[None]:
  """Turns what Orbax raises where files cannot be written into a `UserError` of one line.

  Args:
    folder: of the checkpoints that are written.

  Raises:
    UserError: they cannot be written; what was saved before is as it was.
  """
  _silence_writers()
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # TensorStore raises ValueError for all that an OSError is.
    cause = _cause(error)
    if cause is None:
      raise
    why, remedy = errors.reason(cause)
    raise UserError(
        f'--workdir: a checkpoint cannot be written to {folder} ({why}); {remedy}; then the same '
        'command goes on from the one before, which is as it was') from error


def _cause(error: BaseException | None) -> BaseException | None:
  """Returns the error of the operating system or of memory behind an exception, None without."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno or isinstance(error, MemoryError):
      return error
    if found := _NUMBER.search(str(error)):
      return OSError(int(found[1]), '')
    error = error.__cause__ or error.__context__
  return None


def _silence_writers() -> None:
  """Keeps threads that write checkpoints from logging and printing their tracebacks."""
  for name in ('absl', 'asyncio'):
    logger = logging.getLogger(name)
    if _is_wanted not in logger.filters:
      logger.addFilter(_is_wanted)
  if getattr(sys.unraisablehook, '__module__', None) != __name__:
    sys.unraisablehook = _Hook(sys.unraisablehook)


def _is_wanted(record: logging.LogRecord) -> bool:
  from_writer = any(part in record.pathname.replace('\\', '/') for part in _SOURCES)
  return not from_writer or record.levelno > logging.ERROR


class _Hook:
  """A `sys.unraisablehook` that leaves abandoned writes out."""

  def __init__(self, before: Any):
    self._before = before

  def __call__(self, unraisable: Any) -> None:
    text = str(unraisable.exc_value)
    if not any(part in text for part in _ABANDONED):
      self._before(unraisable)
