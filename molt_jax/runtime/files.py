"""Files that others wrote, read within bounds; what is wrong with one is one line (UserError)."""

import abc
import json
import os
import pathlib
import reprlib
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import IO, Any

from molt_jax.errors import UserError

MAX_JSON_BYTES = 1 << 26
LFS_POINTER = b'version https://git-lfs.github.com/spec/'
KINDS = {
  stat.S_IFDIR: 'a folder',
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
  stat.S_IFSOCK: 'a socket',
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = 4
_SHORT.maxlevel = 3


class Enclosed(abc.ABC):
  """A file within another file, such as a member of a zip; `str` of it is its path for errors.

  Attributes:
    size: its bytes.
    archive: the file that it is in.
  """

  size: int
  archive: pathlib.Path

  @abc.abstractmethod
  def open(self) -> AbstractContextManager[IO[bytes]]:
    """Opens it; what goes wrong, also while it is read, is a UserError."""


Path = str | os.PathLike | Enclosed


def open_binary(path: Path) -> AbstractContextManager[IO[bytes]]:
  """Opens a file to be read, wherever it lies."""
  return path.open() if isinstance(path, Enclosed) else open(path, 'rb')


def version(path: Path) -> tuple[int, ...]:
  """Returns what changes when a file, or the one it is in, is written again."""
  found = os.stat(path.archive if isinstance(path, Enclosed) else path)
  return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_file(path: Path) -> int:
  """Looks at a file before it is opened: a pipe would be waited for, a device never end.

  Returns:
    Its size in bytes, at least 1.

  Raises:
    UserError: it is not there, cannot be read, is no regular file, is empty, or a Git LFS pointer.
  """
  size = path.size if isinstance(path, Enclosed) else _size(path)
  try:
    with open_binary(path) as file:
      head = file.read(len(LFS_POINTER))
  except OSError as error:
    raise UserError(f'{printable(path)} cannot be read ({reason(error)})') from error
  if not head:
    raise UserError(f'{printable(path)} is empty: download or write it again')
  if head == LFS_POINTER:
    raise UserError(
      f'{printable(path)} is a Git LFS pointer in the place of the file: run "git lfs pull" in '
      f'{printable(pathlib.Path(str(path)).parent)}, or download the file itself'
    )
  return size


def _size(path: str | os.PathLike) -> int:
  """Returns the size of a regular file."""
  try:
    found = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: the path has a NUL.
    raise UserError(f'{printable(path)} cannot be read ({reason(error)})') from error
  if not stat.S_ISREG(found.st_mode):
    kind = KINDS.get(stat.S_IFMT(found.st_mode), 'something else')
    raise UserError(f'{printable(path)} is {kind}, not a file: put the file itself there')
  return found.st_size


def read_bytes(path: Path, *, limit: int) -> bytes:
  """Reads a file of at most `limit` bytes.

  Raises:
    UserError: as `check_file`, or it is larger.
  """
  size = check_file(path)
  if size > limit:
    raise UserError(
      f'{printable(path)} has {size} bytes, more than the {limit} that are read of such a file'
    )
  try:
    with open_binary(path) as file:
      return file.read(limit)
  except OSError as error:
    raise UserError(f'{printable(path)} cannot be read ({reason(error)})') from error


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
  """Reads a JSON file that holds one object.

  Raises:
    UserError: as `read_bytes`, or it is no UTF-8, no JSON, nested too deeply, names a key twice
      (which of the two is meant is not known), or is no object.
  """
  return parse_json(read_bytes(path, limit=limit), printable(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
  """As `read_json`, of bytes; `where` names them in errors."""
  try:
    found = json.loads(content.decode('utf-8'), object_pairs_hook=_object)
  except UnicodeDecodeError as error:
    raise UserError(f'{where} is not UTF-8 (byte {error.start}): it is damaged') from error
  except RecursionError as error:
    raise UserError(f'{where} is not valid JSON of its kind: it is nested too deeply') from error
  except ValueError as error:
    raise UserError(f'{where} is not valid JSON: {reason(error)}') from error
  if not isinstance(found, dict):
    raise UserError(f'{where} holds {shown(found)}, expected an object {{"key": value, ...}}')
  return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f'the key {shown(twice)} is there twice')
  return found


def shown(value: Any) -> str:
  """Returns a value as errors show it: short, on one line, of printable characters."""
  text = _SHORT.repr(value)
  return text if text.isprintable() else ascii(text)[1:-1]


def printable(path: Path) -> str:
  """Returns a path as errors show it."""
  text = str(path) if isinstance(path, Enclosed) else os.fsdecode(path)
  return text if text.isprintable() else ascii(text)


def reason(error: BaseException) -> str:
  """Returns what an exception says, on one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return ' '.join(str(error).split())[:200] or type(error).__name__


def listed(names: Iterable[str], most: int = 5) -> str:
  """Returns names in a row: the first `most` of them, and how many more there are."""
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
