"""Hidden states of a frozen tower on disk: each input computed once, every byte checked when read.

  STORE/<sha256 of spec.json>/spec.json                            what was computed: tower,
  preprocessing, layers, stored type
                              <sha256 of its header>.safetensors   a shard: one tensor an input,
                              named by the hash of the input

A folder is named by the hash of its spec.json, a shard by the hash of its header, and the header
holds the place and the CRC-32 of every entry. So a byte that changed is noticed, features of
another tower or preprocessing are never found, and whoever writes the same shard twice writes the
same file. Files appear whole, by renaming; there is no other index. Any number of processes may
read and write at once.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from molt_jax import errors
from molt_jax.errors import UserError
from molt_jax.runtime import atomic

# Part of every key: raise it when the layout, the preprocessing or the arithmetic of the towers
# changes.
FORMAT = 1
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 30.0  # A shard is written at the latest after this time: what a kill may cost.
ADVICE = 'delete it, and what it held is computed again'


@dataclasses.dataclass(frozen=True)
class Codec:
  """How hidden states [L, T, D] are stored: the type on disk, the type that comes out, and the way
  there and back.
  """

  stored: np.dtype
  read: np.dtype
  encode: Callable[[np.ndarray], np.ndarray]
  decode: Callable[[np.ndarray], np.ndarray]

  def stored_bytes(self, layers: int, tokens: int, width: int) -> int:
    """Bytes of one entry."""
    return self.encode(np.zeros((1, 1, width), np.float32)).nbytes * layers * tokens


def _quantize(x_ltd: np.ndarray) -> np.ndarray:
  """Symmetric int8 with one float32 scale a token and layer, whose four bytes are appended to the
  token: int8[L, T, D + 4].
  """
  scale_lt1 = (np.max(np.abs(x_ltd), axis=-1, keepdims=True) / 127).astype(np.float32)
  with np.errstate(
    invalid='ignore'
  ):  # What is not finite comes out as NaN, and training stops on it.
    code_ltd = np.rint(x_ltd / np.where(scale_lt1 == 0, 1, scale_lt1)).astype(np.int8)
  return np.concatenate([code_ltd, scale_lt1.view(np.int8)], axis=-1)


def _dequantize(code_ltx: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore'):
    return code_ltx[..., :-4] * np.ascontiguousarray(code_ltx[..., -4:]).view(np.float32)


def _plain(dtype: Any) -> Codec:
  dtype = np.dtype(dtype)
  return Codec(dtype, dtype, lambda x_ltd: x_ltd.astype(dtype), lambda x_ltd: x_ltd)


CODECS = {
  'float32': _plain(np.float32),
  'bfloat16': _plain(ml_dtypes.bfloat16),
  'int8': Codec(np.dtype(np.int8), np.dtype(np.float32), _quantize, _dequantize),
}


def make_root(directory: str | os.PathLike, field: str = 'features.store') -> None:
  """Makes the folder of a store unless it is there; tried before anything is loaded.

  Raises:
    UserError: it cannot be made.
  """
  root = pathlib.Path(directory).expanduser()
  with errors.explained(f'config.{field}: {str(root)!r} cannot be used'):
    root.mkdir(parents=True, exist_ok=True)


class _Entry(NamedTuple):
  shard: pathlib.Path
  offset: int
  shape: tuple[int, int, int]
  crc32: int


class FeatureStore:
  """The hidden states of one tower: key of an input -> [L, T, D], real tokens only. Reading is
  thread-safe; one thread writes.

  Args:
    directory: the store, shared by all towers, runs and data sets; made if need be.
    spec: all that the states depend on beside the input; JSON types. The type they are stored in
      belongs to it.
    dtype: 'float32', 'bfloat16', or 'int8' with one scale per token and layer.
    field: of the config that names the directory, for errors.

  Raises:
    UserError: the directory holds something else, cannot be written, or a file in it is damaged.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    spec: Mapping[str, Any],
    dtype: str,
    *,
    field: str = 'features.store',
  ):
    self._field = field
    self.root = pathlib.Path(directory).expanduser()
    self.codec = CODECS[dtype]
    content = json.dumps(
      {'format': FORMAT, **spec, 'dtype': dtype}, indent=1, sort_keys=True
    ).encode()
    self.folder = self.root / hashlib.sha256(content).hexdigest()
    self._entries: dict[str, _Entry] = {}
    self._shards: set[str] = set()
    self._pending: dict[str, np.ndarray] = {}
    self._pending_bytes, self._pending_since = 0, 0.0
    self._lock = threading.Lock()
    with errors.explained(f'config.{self._field}: {str(self.root)!r} cannot be used'):
      self._open(content)
      self.refresh()

  def _open(self, content: bytes) -> None:
    make_root(self.root, self._field)
    foreign = sorted(
      p.name for p in self.root.iterdir() if not re.fullmatch(r'[0-9a-f]{64}|\..*', p.name)
    )
    if foreign:
      raise UserError(
        f'config.{self._field}: {str(self.root)!r} is no feature store, it holds '
        f'{", ".join(foreign[:3])}; give a new or empty folder'
      )
    self.folder.mkdir(exist_ok=True)
    atomic.remove_leftovers(self.folder)
    path = self.folder / 'spec.json'
    if not path.exists():
      atomic.write(path, content, tried=self._failed())
    elif path.read_bytes() != content:
      raise UserError(f'{path} is damaged (its hash is not the name of its folder); {ADVICE}')

  def __contains__(self, key: str) -> bool:
    return key in self._entries or key in self._pending

  def __len__(self) -> int:
    return len(self._entries)

  @property
  def stored_bytes(self) -> int:
    """Size of the entries on disk."""
    with self._lock:
      return sum(self._length(entry) for entry in self._entries.values())

  def refresh(self) -> None:
    """Takes in the shards that this or another process has finished since."""
    with self._lock:
      new = [path for path in self.folder.glob('*.safetensors') if path.name not in self._shards]
      for path in sorted(new, key=lambda p: (p.stat().st_mtime_ns, p.name)):
        for key, entry in self._index(path).items():
          self._entries.setdefault(
            key, entry
          )  # The oldest of two stays, so that a resumed run reads the same bits.
        self._shards.add(path.name)

  def read(self, key: str) -> np.ndarray:
    """Returns the states of one input, [L, T, D] in `codec.read`.

    Raises:
      UserError: the entry on disk is not what was written, or its file is gone.
    """
    entry = self._entries[key]
    try:
      raw = _read(entry.shard, entry.offset, self._length(entry))
    except OSError as error:
      raise UserError(
        f'{entry.shard} can no longer be read ({error.strerror}); start again, and what it held '
        'is '
        'computed again'
      ) from error
    if zlib.crc32(raw) != entry.crc32:
      raise UserError(
        f'{entry.shard} is damaged (the checksum of entry {key[:12]} does not fit); {ADVICE}'
      )
    return self.codec.decode(np.frombuffer(raw, self.codec.stored).reshape(entry.shape))

  def num_tokens(self, key: str) -> int:
    """Returns T of one input without reading it."""
    return self._entries[key].shape[1]

  def add(self, key: str, x_ltd: np.ndarray) -> None:
    """Takes the states of one input; they are on disk after the next `flush`, which comes by itself
    every SHARD_BYTES or SHARD_SECONDS.
    """
    if not self._pending:
      self._pending_bytes, self._pending_since = 0, time.monotonic()
    self._pending[key] = code = self.codec.encode(x_ltd)
    self._pending_bytes += code.nbytes
    if (
      self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since >= SHARD_SECONDS
    ):
      self.flush()

  def flush(self) -> None:
    """Writes a shard of what was added and is not on disk yet.

    Raises:
      UserError: it cannot be written.
    """
    self.refresh()
    new = {key: x for key, x in self._pending.items() if key not in self._entries}
    if new:
      crc32 = {key: zlib.crc32(x.tobytes()) for key, x in new.items()}
      content = safetensors.numpy.save(new, metadata={'crc32': json.dumps(crc32)})
      name = hashlib.sha256(content[: _header_bytes(content)]).hexdigest()
      atomic.write(self.folder / f'{name}.safetensors', content, tried=self._failed())
      self.refresh()
    self._pending = {}

  def try_out(self) -> None:
    """Raises UserError unless shards can be written. A store that is complete need not be tried."""
    atomic.try_out(self.folder, tried=self._failed())

  def _failed(self) -> str:
    return f'config.{self._field}: {str(self.folder)!r} cannot be written'

  def _index(self, path: pathlib.Path) -> dict[str, _Entry]:
    """Reads the header of a shard and checks it and the file's length."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
      head = file.read(8)
      head += file.read(max(min(_header_bytes(head), size) - 8, 0))
    if hashlib.sha256(head).hexdigest() != path.stem:
      raise UserError(f'{path} is damaged (the hash of its header is not its name); {ADVICE}')
    header = json.loads(head[8:])
    crc32 = json.loads(header.pop('__metadata__')['crc32'])
    if size != len(head) + max(entry['data_offsets'][1] for entry in header.values()):
      raise UserError(
        f'{path} is damaged (it has {size} bytes, its header promises another number); {ADVICE}'
      )
    return {
      key: _Entry(path, len(head) + e['data_offsets'][0], tuple(e['shape']), crc32[key])
      for key, e in header.items()
    }

  def _length(self, entry: _Entry) -> int:
    return math.prod(entry.shape) * self.codec.stored.itemsize


class MemoryStore:
  """As `FeatureStore`, in memory and for one process."""

  root = None
  codec = CODECS['float32']

  def __init__(self):
    self._entries: dict[str, np.ndarray] = {}

  def __contains__(self, key: str) -> bool:
    return key in self._entries

  def add(self, key: str, x_ltd: np.ndarray) -> None:
    """Takes the features of one input."""
    self._entries[key] = np.array(x_ltd)

  def read(self, key: str) -> np.ndarray:
    """Returns the features of one input."""
    return self._entries[key]

  def refresh(self) -> None:
    """Nothing: no other process adds to it."""

  def flush(self) -> None:
    """Nothing: it is not kept."""


def _read(path: pathlib.Path, offset: int, size: int) -> bytes:
  """Reads a part of a file without Python's file objects, whose making takes longer than the
  reading.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    return os.pread(
      descriptor, size, offset
    )  # The rest of a file that was cut off is missing, which the checksum tells.
  finally:
    os.close(descriptor)


def _header_bytes(head: bytes) -> int:
  """Bytes of a safetensors header: its length in the first eight, then JSON."""
  return 8 + int.from_bytes(head[:8], 'little')


def key_of(content: bytes) -> str:
  """Returns the key of an input: the hash of what the tower is given."""
  return hashlib.sha256(content).hexdigest()
