"""What a library deprecates is an error where a line of ours uses it, before it is gone.

What a library uses of another is theirs to mend. A warning names the module that uses the
deprecated thing; a log line is traced back to who called the library that wrote it.
"""

import logging
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
CATEGORIES = ('DeprecationWarning', 'PendingDeprecationWarning', 'FutureWarning')
SCRIPTS = ('configs', 'experiments', 'tools', 'tests/reference')  # Imported by their bare names.


def filters() -> list[str]:
  """Lines of pytest's `filterwarnings`."""
  ours = ['molt_jax', 'tests', *SCRIPTS[:3]]
  ours += sorted(path.stem for folder in SCRIPTS for path in (ROOT / folder).glob('*.py'))
  return [f'error::{category}:({"|".join(ours)})(\\.|$)' for category in CATEGORIES]


def _library(file: str) -> str:
  """The package a file belongs to: 'orbax', say; '' for files outside of site-packages."""
  return file.partition('site-packages/')[2].split('/')[0]


class LogFilter(logging.Filter):
  """For absl's logger, by which Orbax and others warn; added before any that drops their lines."""

  def filter(self, record):
    if record.levelno < logging.WARNING or 'deprecat' not in record.getMessage().lower():
      return True
    between, frame = {'', 'absl', _library(record.pathname)}, sys._getframe(1)
    while frame and not self._is_ours(frame) and _library(frame.f_code.co_filename) in between:
      frame = frame.f_back
    if frame and self._is_ours(frame):
      raise DeprecationWarning(record.getMessage())
    return True

  def _is_ours(self, frame) -> bool:
    file = pathlib.Path(frame.f_code.co_filename)
    return file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / '.venv')
