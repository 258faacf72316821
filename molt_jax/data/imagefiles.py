"""Image files that a cell names: whether one is there."""

import os
import re
import stat

NO_FILE = 'no such file'


def why_no_file(path: str) -> str | None:
  """Returns why there is no regular file at `path`, None where there is one."""
  try:
    mode = os.stat(path).st_mode
  except OSError as error:
    return NO_FILE if isinstance(error, FileNotFoundError) else _lower(error)
  except ValueError:  # A zero character, or half of a surrogate pair.
    return 'no legal path'
  if stat.S_ISREG(mode):
    return None
  kinds = {stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a pipe', stat.S_IFSOCK: 'a socket'}
  return kinds.get(stat.S_IFMT(mode), 'a device')


def _lower(error: OSError) -> str:
  return (error.strerror or str(error)).lower()


def looks_like_address(text: str) -> bool:
  """Whether a string is a URL."""
  return re.match(r'[A-Za-z][A-Za-z0-9+.-]+://|data:', text) is not None
