"""Image files that a cell names: whether one is there, and its bytes."""

import os
import re
import stat

# Bytes of an image file: more than the largest image that is decoded takes without compression.
MOST_FILE = 1 << 29
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


def read_file(path: str) -> bytes:
  """Reads an image file.

  Raises:
    OSError: it cannot be read, is no regular file, or has more than MOST_FILE bytes.
  """
  # A pipe that has taken the place of a file would be waited for without end.
  handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
  try:
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
      raise OSError(0, 'not a file but a folder, pipe or device')
    if about.st_size > MOST_FILE:
      raise OSError(0, f'a file of more than {MOST_FILE:,} bytes')
    with open(handle, 'rb', closefd=False) as stream:
      return stream.read(about.st_size)
  finally:
    os.close(handle)


def looks_like_address(text: str) -> bool:
  """Whether a string is a URL."""
  return re.match(r'[A-Za-z][A-Za-z0-9+.-]+://|data:', text) is not None
