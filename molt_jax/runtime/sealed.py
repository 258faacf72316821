"""Files of a whole model: a zip of which every byte is compared with a checksum before it is used.

Members are stored as they are. The last of them, `manifest.json`, has the size and the SHA-256 of
each of the others; the comment of the zip, which is its end, has the SHA-256 of all bytes before.
So a byte that is not as it was written is found wherever it is: in a member, between members, in
the list of them, or in the checksum. That guards against damage, and not against forgery: who
writes such a file writes its checksums too, so nothing in it is executed, and what is in it is
checked as what others wrote.
"""

import builtins
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime import atomic, files, zipped

SUFFIX = '.molt'
MANIFEST = 'manifest.json'
MARK = b'sha256:'
DIGITS = 64
SEAL = len(MARK) + DIGITS  # Bytes of the comment, the end of the file.
REMEDY = 'copy or download it again, or export it again'


@dataclasses.dataclass(frozen=True)
class Sealed:
  """A file whose bytes are those that were written.

  Attributes:
    path: the file.
    manifest: what its writer says of it, without the list of members.
    top: its members, as places to read from.
  """

  path: pathlib.Path
  manifest: Mapping[str, Any]
  top: zipped.ZipPath

  def __contains__(self, name: str) -> bool:
    return name in self.top.members

  def place(self, name: str) -> zipped.ZipPath:
    """Returns where a member is; one that is not there is a UserError when it is read."""
    return self.top / name

  def read(self, name: str) -> bytes:
    """Returns the bytes of a member."""
    place = self.place(name)
    return place.reader()(0, place.size)

  def json(self, name: str) -> dict[str, Any]:
    """Returns the object in a member.

    Raises:
      UserError: there is none, or it is no JSON object.
    """
    return files.read_json(self.place(name))


# ---- Writing -------------------------------------------------------------------------------------


def write(path: pathlib.Path, members: Iterable[tuple[str, bytes]], about: Mapping[str, Any]):
  """Writes a file, whole or not at all; one member at a time is in memory.

  Args:
    path: where to.
    members: (name, content) of each.
    about: what the manifest says beside the list of members.

  Raises:
    UserError: it cannot be written.
  """
  with atomic.writing(path) as file:
    listed = {}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
      for name, content in members:
        _add(archive, name, content)
        listed[name] = {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
      manifest = json.dumps({**about, 'members': listed}, indent=1) + '\n'
      _add(archive, MANIFEST, manifest.encode())
      archive.comment = MARK + b'0' * DIGITS
    file.flush()
    digest = _digest(pathlib.Path(file.name), 0, os.path.getsize(file.name) - SEAL)
    file.seek(-DIGITS, os.SEEK_END)
    file.write(digest.encode())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
  """Adds a member of a fixed date, so that the same content is the same file."""
  archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


# ---- Reading -------------------------------------------------------------------------------------


def is_one(path: str | os.PathLike) -> bool:
  """Whether a path is to be read as such a file: a file, whatever its name and content."""
  try:
    return pathlib.Path(path).is_file()
  except (OSError, ValueError):
    return False


def open(path: str | os.PathLike) -> Sealed:
  """Opens a file after all of its bytes were compared with their checksums.

  A file that has not changed since is compared once in a process.

  Raises:
    UserError: it cannot be read, is no such file, is damaged, or has a member that lies outside, is
      compressed, encrypted, a link, there twice, or not listed.
  """
  path = pathlib.Path(path)
  files.check_file(path)
  found = path.stat()
  return _opened(path.absolute(), found.st_mtime_ns, found.st_size, found.st_ino)


@functools.lru_cache(maxsize=4)
def _opened(path: pathlib.Path, *version: int) -> Sealed:
  del version  # Of the file, which may be replaced.
  where = files.printable(path)
  try:
    intact = _is_intact(path)
  except OSError as error:
    raise UserError(f'{where} cannot be read ({files.reason(error)}); {REMEDY}') from error
  if intact is None:
    raise UserError(f'{where} is no {SUFFIX} file, or its end is damaged; {REMEDY}')
  if not intact:
    raise UserError(f'{where} is damaged: {_damage(path)} not what was written; {REMEDY}')
  top = zipped.folder(path)
  manifest = files.read_json(top / MANIFEST)
  listed = manifest.pop('members', None)
  wrong = _unlisted(top, listed)
  if not wrong:
    wrong = [name for name in listed if not _is_listed(top / name, listed[name])]
  if wrong:
    raise UserError(
      f'{where}: the member {files.shown(wrong[0])} is not as its manifest lists it; {REMEDY}'
    )
  return Sealed(path, manifest, top)


def _is_intact(path: pathlib.Path) -> bool | None:
  """Whether a file is what was written; None: it does not say what that was."""
  size = os.path.getsize(path)
  with builtins.open(path, 'rb') as file:
    file.seek(max(0, size - SEAL))
    seal = file.read(SEAL)
  if len(seal) < SEAL or not seal.startswith(MARK):
    return None
  return _digest(path, 0, size - SEAL).encode() == seal.removeprefix(MARK)


def _digest(path: pathlib.Path, start: int, stop: int) -> str:
  """Returns the SHA-256 of the bytes from one to another."""
  digest = hashlib.sha256()
  with builtins.open(path, 'rb') as file:
    file.seek(start)
    while start < stop:
      part = file.read(min(1 << 20, stop - start))
      if not part:
        break
      digest.update(part)
      start += len(part)
  return digest.hexdigest()


def _damage(path: pathlib.Path) -> str:
  """Names what is damaged in a file that is, as the beginning of '... not what was written'."""
  try:
    top = zipped.folder(path)
    listed = files.read_json(top / MANIFEST)['members']
    wrong = [name for name in listed if not _is_listed(top / name, listed[name])]
  except (UserError, KeyError, TypeError, AttributeError):
    wrong = []
  return f'{files.shown(wrong[0])} in it is' if wrong else 'its bytes are'


def _unlisted(top: zipped.ZipPath, listed: Any) -> list[str]:
  """Returns members that the manifest does not have, or that it alone has."""
  names = set(top.members) - {MANIFEST}
  if not isinstance(listed, Mapping):
    return sorted(names) or [MANIFEST]
  return sorted(names ^ set(listed))


def _is_listed(place: zipped.ZipPath, described: Any) -> bool:
  """Whether a member is what the manifest says of it."""
  info = place.members.get(place.inner)
  stored = info is not None and info.compress_type == zipfile.ZIP_STORED
  if not stored or not isinstance(described, Mapping) or info.file_size != described.get('size'):
    return False
  read, digest = place.reader(), hashlib.sha256()
  for start in range(0, info.file_size, 1 << 20):
    digest.update(read(start, min(start + (1 << 20), info.file_size)))
  return digest.hexdigest() == described.get('sha256')
