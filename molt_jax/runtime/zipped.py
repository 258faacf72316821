"""Folders within a zip file, read where they are: nothing is written to the disk.

Zip files are written by others: the list of members is checked before any of them is read, and what
is unpacked is bounded by the size that the list promises, which the checksum then confirms.
"""

import contextlib
import dataclasses
import fnmatch
import pathlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO

from molt_jax.errors import UserError
from molt_jax.runtime import files

MAX_MEMBERS = 10_000
# Of a member that is compressed, which is unpacked in memory; others are read where they lie.
MAX_UNPACKED_BYTES = 1 << 31
METHODS = {zipfile.ZIP_STORED: 'stored', zipfile.ZIP_DEFLATED: 'deflated'}
ENCRYPTED = 1  # Bit of the flags.
LOCAL_HEADER = struct.Struct('<4s22x2H')  # Signature; lengths of the name and of what follows it.
# What the library raises on damaged archives.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  EOFError,
  KeyError,
  NotImplementedError,
  OSError,
  OverflowError,
  RuntimeError,
  ValueError,
)


@dataclasses.dataclass(frozen=True, order=True)
class ZipPath(files.Enclosed):
  """A place in a zip file; it has what a `pathlib.Path` has, as far as a model's folder needs it.

  Attributes:
    archive: the zip file.
    inner: the place in it, '' for its top.
    members: name -> description of all files in it.
  """

  archive: pathlib.Path
  inner: str
  members: Mapping[str, zipfile.ZipInfo] = dataclasses.field(compare=False, repr=False)

  def __truediv__(self, name: str) -> 'ZipPath':
    return dataclasses.replace(self, inner=f'{self.inner}/{name}'.removeprefix('/'))

  def __str__(self) -> str:
    return str(self.archive / self.inner)

  @property
  def name(self) -> str:
    return self.inner.rpartition('/')[2]

  @property
  def parent(self) -> 'ZipPath':
    return dataclasses.replace(self, inner=self.inner.rpartition('/')[0])

  @property
  def size(self) -> int:
    """Bytes of a file."""
    return self._info.file_size

  @property
  def _info(self) -> zipfile.ZipInfo:
    if self.inner not in self.members:
      raise UserError(f'{files.printable(self)} cannot be read (No such file in the zip)')
    return self.members[self.inner]

  def exists(self) -> bool:
    """Whether there is a file."""
    return self.inner in self.members

  def glob(self, pattern: str) -> list['ZipPath']:
    """Returns the files of a folder whose names match."""
    start = f'{self.inner}/'.removeprefix('/')
    names = [name.removeprefix(start) for name in self.members if name.startswith(start)]
    return [self / name for name in fnmatch.filter(names, pattern) if '/' not in name]

  @contextlib.contextmanager
  def open(self) -> Iterator[IO[bytes]]:
    """Opens a file; its checksum is compared when all of it has been read.

    Raises:
      UserError: it is not there, or it is damaged, also while it is read.
    """
    name = self._info.filename
    try:
      with zipfile.ZipFile(self.archive) as archive, archive.open(name) as file:
        yield file
    except _DAMAGE as error:
      raise self._damaged(error) from error

  def reader(self) -> Callable[[int, int], bytes]:
    """Returns what reads a file from one byte to another.

    A stored file is read where it lies. One that is compressed is unpacked in memory by the first
    call, and kept as long as the function.

    Raises:
      UserError: it is not there, too large to be unpacked in memory, or damaged, also when it is
        called.
    """
    info = self._info
    if info.compress_type == zipfile.ZIP_STORED:
      return self._read_stored
    if info.file_size > MAX_UNPACKED_BYTES:
      raise UserError(
        f'{files.printable(self)} is compressed and has {info.file_size} bytes, more than the '
        f'{MAX_UNPACKED_BYTES} that are unpacked in memory: unzip it and give the folder'
      )
    unpacked = []

    def read(start: int, stop: int) -> bytes:
      if not unpacked:
        with self.open() as file:
          unpacked.append(file.read())
      return unpacked[0][start:stop]

    return read

  def _read_stored(self, start: int, stop: int) -> bytes:
    try:
      with open(self.archive, 'rb') as file:
        file.seek(self._info.header_offset)
        signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        if signature != zipfile.stringFileHeader:
          raise zipfile.BadZipFile('Bad magic number for file header')
        file.seek(sum(lengths) + start, 1)
        content = file.read(stop - start)
    except _DAMAGE as error:
      raise self._damaged(error) from error
    if len(content) < stop - start:
      raise self._damaged(EOFError('it is cut short'))
    return content

  def _damaged(self, error: Exception) -> UserError:
    return UserError(
      f'{files.printable(self)} cannot be read ({files.reason(error)}): the zip is damaged; '
      'download it again'
    )


Place = pathlib.Path | ZipPath  # A folder or a file, on the disk or in a zip.


def folder(path: pathlib.Path) -> ZipPath:
  """Returns the top of a zip file, after a look at the list of its members.

  Raises:
    UserError: it cannot be read, is no zip, is damaged, has too many members, one twice, one that
      lies outside, is a link, is encrypted, or is compressed by another method than `METHODS`.
  """
  files.check_file(path)
  where = files.printable(path)
  try:
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
  except _DAMAGE as error:
    raise UserError(
      f'{where} is no zip, or damaged ({files.reason(error)}): download it again'
    ) from error
  if len(infos) > MAX_MEMBERS:
    raise UserError(f'{where} has {len(infos)} members, more than the {MAX_MEMBERS} that are read')
  members = {}
  for info in infos:
    if fault := _fault(info):
      raise UserError(f'{where}: the member {files.shown(info.orig_filename)} {fault}')
    if info.filename in members:
      raise UserError(
        f'{where} has the member {files.shown(info.filename)} twice: which of the two is meant is '
        'not known'
      )
    members[info.filename] = info
  return ZipPath(path, '', {n: info for n, info in members.items() if not info.is_dir()})


def _fault(info: zipfile.ZipInfo) -> str:
  """What is wrong with a member, or ''."""
  name = info.orig_filename
  parts = name.removesuffix('/').split('/')
  if not name.isprintable() or '\\' in name or ':' in parts[0] or {'', '.', '..'} & set(parts):
    return 'lies outside, or has a name that no file of a model has: the zip is damaged or hostile'
  if stat.S_ISLNK(info.external_attr >> 16):
    return 'is a link: zip the files themselves'
  if info.flag_bits & ENCRYPTED:
    return 'is encrypted: unzip it with its password and give the folder'
  if info.compress_type not in METHODS:
    return (
      f'is compressed by method {info.compress_type}; implemented: {", ".join(METHODS.values())}'
    )
  return ''
