"""Files and folders that are there whole or not at all, after a kill, a full disk or a power cut.

Each is written under a temporary name in the same folder, synchronised and renamed. What a killed
process left under such a name is removed by the next one that writes to the folder.
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from molt_jax import errors

STALE_SECONDS = 86400.0  # Of another machine, nothing but its age tells whether its process lives.
TRIAL_BYTES = 1 << 16
_NAME = re.compile(r'\.tmp-([0-9a-f]{8})-([0-9]+)-[0-9a-f]+')


def write(path: pathlib.Path, content: str | bytes, *, tried: str = '') -> None:
  """Writes a whole file; text in UTF-8, what that cannot hold (half a surrogate pair) escaped.

  Args:
    path: where to.
    content: what to write.
    tried: begins the error's sentence; default: that the file cannot be written.

  Raises:
    UserError: it cannot be written; an older file of that name is as it was.
  """
  with writing(path, tried=tried) as file:
    is_text = isinstance(content, str)
    file.write(content.encode('utf-8', 'backslashreplace') if is_text else content)


@contextlib.contextmanager
def writing(path: pathlib.Path, *, tried: str = '') -> Iterator[BinaryIO]:
  """As `write`, of what the block writes to the file that it is given."""
  temporary = _temporary(path.parent)
  with errors.explained(tried or f'{path} cannot be written'):
    remove_leftovers(path.parent)
    try:
      with open(temporary, 'xb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
      _sync(path.parent)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives the block an empty folder, which then replaces the one at `path`.

  Raises:
    UserError: it cannot be written; an older folder of that name is as it was.
  """
  temporary, old = _temporary(path.parent), _temporary(path.parent)
  with errors.explained(f'{path} cannot be written'):
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    try:
      temporary.mkdir()
      yield temporary
      for part in (*temporary.rglob('*'), temporary):
        _sync(part)
      if path.exists():  # Only an empty folder can be renamed over.
        os.replace(path, old)
      os.replace(temporary, path)
      _sync(path.parent)
    finally:
      for part in (temporary, old):
        shutil.rmtree(part, ignore_errors=True)


def try_out(path: pathlib.Path, *, tried: str) -> None:
  """Writes a file of some size to a folder and removes it; `tried` begins the error's sentence.

  Raises:
    UserError: that cannot be done.
  """
  temporary = _temporary(path)
  with errors.explained(tried):
    remove_leftovers(path)
    try:
      with open(temporary, 'xb') as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())
    finally:
      temporary.unlink(missing_ok=True)


def remove_leftovers(path: pathlib.Path) -> None:
  """Removes from a folder what processes that are no more left under temporary names."""
  with contextlib.suppress(OSError):  # What cannot be removed is in nobody's way.
    for name in os.listdir(path):
      if name.startswith('.tmp-') and _is_left_over(path / name):
        _remove(path / name)


def _temporary(path: pathlib.Path) -> pathlib.Path:
  return path / f'.tmp-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}'


def _machine() -> str:
  return f'{zlib.crc32(socket.gethostname().encode()):08x}'


def _is_left_over(path: pathlib.Path) -> bool:
  match = _NAME.fullmatch(path.name)
  if match is None:
    return False
  if match[1] == _machine():
    return not _lives(int(match[2]))
  return time.time() - path.lstat().st_mtime > STALE_SECONDS


def _lives(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # Another user's.
    pass
  return True


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()


def _sync(path: pathlib.Path) -> None:
  """Brings a file or a folder to disk. That of a folder, not every file system can do."""
  is_folder = path.is_dir()
  descriptor = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
      os.fsync(descriptor)
  finally:
    os.close(descriptor)
