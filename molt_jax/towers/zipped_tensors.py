"""Tensors of a safetensors file within a zip.

The library maps files; here there is none to map, so the header is read and checked as the library
checks it: tensors lie one behind the other, without gaps, to the end of the file.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import ZipPath

MAX_HEADER_BYTES = 1 << 25
# Type as safetensors names it -> of NumPy; those that a tower can have, and others of known size.
TYPES = {
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F64': np.float64,
  'BOOL': np.bool_,
  'I8': np.int8,
  'U8': np.uint8,
  'I16': np.int16,
  'U16': np.uint16,
  'I32': np.int32,
  'U32': np.uint32,
  'I64': np.int64,
  'U64': np.uint64,
}
_KEYS = {'dtype', 'shape', 'data_offsets'}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is: its file and its name there, its type (as safetensors names it), its shape,
  its first byte, and what reads the file's bytes.
  """

  file: ZipPath
  name: str
  dtype: str
  shape: tuple[int, ...]
  start: int
  read_bytes: Callable[[int, int], bytes]

  def part(self, first: int, rows: int) -> 'Tensor':
    """Some rows of it, as a tensor."""
    before = math.prod((first, *self.shape[1:])) * np.dtype(TYPES[self.dtype]).itemsize
    return dataclasses.replace(self, shape=(rows, *self.shape[1:]), start=self.start + before)

  def block(self, index: int, count: int) -> 'Tensor':
    """Returns one of `count` equal blocks of its rows."""
    rows = self.shape[0] // count
    return self.part(index * rows, rows)

  def read(self) -> np.ndarray:
    """Reads it."""
    kind = TYPES[self.dtype]
    stop = self.start + math.prod(self.shape) * np.dtype(kind).itemsize
    return np.frombuffer(self.read_bytes(self.start, stop), kind).reshape(self.shape)


def header(path: ZipPath) -> tuple[dict[str, Any], list[Tensor]]:
  """Reads the header of one file.

  Returns:
    (its metadata, its tensors).

  Raises:
    UserError: it is damaged or cut short, or holds tensors of a type that is not in `TYPES`.
  """
  where = files.printable(path)
  with path.open() as file:
    length = int.from_bytes(file.read(8), 'little')
    content = file.read(min(length, MAX_HEADER_BYTES))
  if length != len(content):
    raise UserError(f'{where} is damaged or cut short (its header); download the zip again')
  found = files.parse_json(content, f'the header of {where}')
  metadata = found.pop('__metadata__', {})
  if not isinstance(metadata, Mapping):
    raise UserError(f'{where} is damaged: its metadata are {files.shown(metadata)}')
  rows = [_row(name, described, where) for name, described in found.items()]
  start, end = 8 + length, 0
  read, tensors = path.reader(), []
  for name, dtype, shape, (first, last) in sorted(rows, key=lambda row: row[3]):
    if first != end or last - first != math.prod(shape) * np.dtype(TYPES[dtype]).itemsize:
      raise UserError(
        f'{where} is damaged: {files.shown(name)} of type {dtype} and shape {files.shown(shape)} '
        f'is said to be at bytes {first} to {last}, where it cannot be; download the zip again'
      )
    end = last
    tensors.append(Tensor(path, name, dtype, shape, start + first, read))
  if start + end != path.size:
    raise UserError(
      f'{where} is damaged or cut short: {path.size} bytes instead of {start + end}; download the '
      'zip again'
    )
  return metadata, tensors


def _row(name: str, described: Any, where: str) -> tuple[str, str, tuple[int, ...], list[int]]:
  """What a header says of one tensor: name, type, shape, [first byte, last byte + 1]."""
  if not isinstance(described, Mapping) or described.keys() != _KEYS:
    raise UserError(f'{where} is damaged: it describes {files.shown(name)} in another way')
  dtype, shape, offsets = described['dtype'], described['shape'], described['data_offsets']
  if not isinstance(dtype, str) or dtype not in TYPES:
    raise UserError(
      f'{where}: {files.shown(name)} has the type {files.shown(dtype)}, which is not read in a '
      f'zip; read are {", ".join(TYPES)}'
    )
  if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
    raise UserError(f'{where} is damaged: sizes of {files.shown(name)} are no whole numbers')
  return name, dtype, tuple(shape), offsets


def _are_sizes(value: Any) -> bool:
  return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
