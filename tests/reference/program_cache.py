"""Where the tests keep compiled programs between sessions, so that only the first one compiles.

Compiled CPU code may use any instruction of the processor that compiled it, and JAX's own key says
nothing of that: the folder's name does. JAX's own bound, `jax_compilation_cache_max_size`, looks
at every entry whenever it adds one: 0.1 s at 3,500 entries, where compiling takes less. `tidy`
does so once a session.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import time
import uuid
import zlib

LIMIT = 512 * 2**20  # Bytes in a folder; the whole suite leaves some 120 MB, a change adds its own.
MAX_AGE = 30 * 24 * 3600  # Seconds without a session, after which a folder is of no use.
BEING_WRITTEN = 60  # Seconds; a younger entry may not be whole yet.
STAMP = 'last_session'  # A file whose time says when.
CPUINFO = pathlib.Path('/proc/cpuinfo')
IDENTIFYING = (
  'vendor_id',
  'cpu family',
  'model',
  'stepping',
  'flags',  # x86
  'CPU implementer',
  'CPU variant',
  'CPU part',
  'Features',  # ARM
)


def processor() -> str:
  """Equal on machines that run each other's code; without /proc, of this machine alone."""
  if not CPUINFO.exists():
    return f'{platform.machine()} {uuid.getnode()}'
  found = set()
  for line in CPUINFO.read_text().splitlines():
    if line.split(':')[0].strip() in IDENTIFYING:
      found.add(' '.join(line.split()))
  return '\n'.join([platform.machine(), *sorted(found)])


def root() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(base):  # As its specification says.
    base = os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'molt_jax' / 'tests'


def folder(xla_flags: str) -> pathlib.Path:
  """One for each jaxlib, Python (they compress differently), XLA flags and processor."""
  jaxlib = importlib.metadata.version('jaxlib')
  rest = hashlib.sha256(f'{xla_flags}\n{processor()}'.encode()).hexdigest()[:12]
  return root() / f'{jaxlib}-py{sys.version_info[0]}.{sys.version_info[1]}-{rest}'


def _is_whole(path) -> bool:
  """A killed process may leave a part, which JAX would warn of at each use and never replace."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return True
  if data[:1] != b'\x78':  # Not zlib's: JAX found zstandard, whose frames have no cheap check.
    return bool(data)
  stream = zlib.decompressobj()
  try:
    stream.decompress(data)
  except zlib.error:
    return False
  return stream.eof


def tidy(path: pathlib.Path):
  """Before a session: removes folders long unused, broken entries, and the oldest over `LIMIT`.

  Another session may be doing the same, or be writing an entry: what is gone or young is let be.
  """
  path.mkdir(parents=True, exist_ok=True)
  now, checked = time.time(), _last_session(path) - BEING_WRITTEN
  (path / STAMP).touch()
  for other in path.parent.iterdir():
    if now - max(other.stat().st_mtime, _last_session(other)) > MAX_AGE:
      shutil.rmtree(other, ignore_errors=True)
  excess = -LIMIT
  for entry, stat in sorted(_entries(path), key=lambda pair: _age(pair[1]), reverse=True):
    excess += stat.st_size
    is_new = checked <= stat.st_mtime < now - BEING_WRITTEN
    if excess > 0 or (is_new and not _is_whole(entry)):
      entry.unlink(missing_ok=True)


def _last_session(path) -> float:
  return (path / STAMP).stat().st_mtime if (path / STAMP).exists() else 0.0


def _entries(path):
  for entry in path.glob('*-cache'):
    with contextlib.suppress(FileNotFoundError):
      yield entry, entry.stat()


def _age(stat) -> float:
  return max(stat.st_atime, stat.st_mtime)
