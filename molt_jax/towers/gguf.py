"""GGUF files: metadata and dequantised tensors.

The header is read here, in one pass over the bytes: `gguf.GGUFReader` builds an array object for
every string of the vocabulary, which takes seconds. Types, block sizes and dequantisation are those
of the `gguf` package. No number in a header is believed before it is compared with the file's size.
"""

import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.towers import gguf_keys, keys

# GGUF value type -> struct code
SCALARS = {
  0: 'B',
  1: 'b',
  2: 'H',
  3: 'h',
  4: 'I',
  5: 'i',
  6: 'f',
  7: '?',
  10: 'Q',
  11: 'q',
  12: 'd',
}
STRING, ARRAY = 8, 9
IMPLEMENTED = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q6_K')
MOST_DIMENSIONS = 4
MOST_NESTED = 4  # Arrays of arrays.
# Bytes that the shortest entry takes: key "", type, one byte; name "", one dimension, type, offset.
LEAST_KEY, LEAST_TENSOR = 13, 32
SPLIT_NAME = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf', re.S)


class Tensor(NamedTuple):
  """Where a tensor is: its type, its shape in row-major order, and its bytes."""

  type: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  offset: int
  file: '_File'

  def part(self, first: int, rows: int) -> 'Tensor':
    """Some rows of it, as a tensor."""
    before = _num_bytes(self.type, (first, *self.shape[1:]))
    return self._replace(shape=(rows, *self.shape[1:]), offset=self.offset + before)

  def read(self) -> np.ndarray:
    """Returns it as float32."""
    raw = np.frombuffer(self.file.data, np.uint8, _num_bytes(self.type, self.shape), self.offset)
    view = {'F32': np.float32, 'F16': np.float16}.get(self.type.name, np.uint8)
    rows = raw.view(view).reshape(*self.shape[:-1], -1)
    found = gguf.quants.dequantize(rows, self.type)
    return found.astype(np.float32, copy=False).reshape(self.shape)


class Reader:
  """An open GGUF file, or all files of a model that llama.cpp has split.

  Attributes:
    paths: the files.
    metadata: key -> value; arrays of numbers are NumPy arrays. Of several files, the first one's.
    tensors: GGUF name -> `Tensor`.

  Raises:
    UserError: not a GGUF file of version 2 or 3, damaged, cut short, with metadata that are not in
      `gguf_keys.GGUF`, with tensors of types that are not implemented, or parts of it are missing.
  """

  def __init__(self, path: str | os.PathLike):
    path = pathlib.Path(path)
    first = _File(path)
    parts = [first, *(_File(part) for part in _other_parts(path, first.metadata))]
    self.paths, self.metadata = [part.path for part in parts], first.metadata
    self.tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
      if part.metadata.get('split.no', 0) != number:
        raise UserError(
          f'{part.path} has split.no = {part.metadata.get("split.no")}, expected {number}: it is '
          'a part of another model'
        )
      if twice := self.tensors.keys() & part.tensors.keys():
        raise UserError(f'{part.path} holds {files.shown(min(twice))}, as does a part before it')
      self.tensors |= part.tensors
    total = first.metadata.get('split.tensors.count', len(self.tensors))
    if len(parts) > 1 and total != len(self.tensors):
      raise UserError(
        f'{path} promises {total} tensors (split.tensors.count), its {len(parts)} parts hold '
        f'{len(self.tensors)}: they do not belong together'
      )

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor as float32."""
    return self.tensors[name].read()


def _other_parts(path: pathlib.Path, metadata: Mapping[str, Any]) -> list[pathlib.Path]:
  """The second and further files of a model that is split; they are found by their names."""
  count = metadata.get('split.count', 0)
  if count <= 1:
    return []
  name = SPLIT_NAME.fullmatch(path.name)
  if not name or int(name[3]) != count:
    raise UserError(
      f'{path} is one of {count} parts of a model; parts are found by names such as '
      f'MODEL-00001-of-{count:05d}.gguf: give it its name back'
    )
  parts = [path.with_name(f'{name[1]}-{i + 1:05d}-of-{name[3]}.gguf') for i in range(count)]
  if metadata.get('split.no') != 0 or path != parts[0]:
    raise UserError(f'{path} is not the first of {count} parts of a model: give {parts[0].name}')
  if missing := [part.name for part in parts if not part.exists()]:
    raise UserError(f'{path} is one of {count} parts; {files.listed(missing)} is not beside it')
  return parts[1:]


class _File:
  """One GGUF file: its header, and its bytes in memory's address space."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._size = files.check_file(path)
    with open(path, 'rb') as f:
      if f.read(4) != b'GGUF':
        raise UserError(f'{path} is not a GGUF file')
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    self._at = 4
    try:
      num_tensors, num_keys = self._counts()
      self.metadata = self._metadata(num_keys)
      infos = self._infos(num_tensors)
    except struct.error as e:
      raise UserError(f'{path} is damaged, or ends within its header: download it again') from e
    keys.check(self.metadata, gguf_keys.gguf(self.metadata.get('general.architecture')), str(path))
    self.tensors = self._place(infos)

  def _counts(self) -> tuple[int, int]:
    version, num_tensors, num_keys = self._unpack('IQQ')
    if version not in (2, 3):
      swapped = version in (2 << 24, 3 << 24)
      raise UserError(
        f'{self.path} is GGUF {"big-endian" if swapped else f"version {version}"}; '
        'implemented: versions 2 and 3, little-endian'
      )
    room = self._size - self._at
    if num_tensors > room // LEAST_TENSOR or num_keys > room // LEAST_KEY:
      raise UserError(
        f'{self.path} is damaged, or ends within its header: it promises {num_tensors} tensors '
        f'and {num_keys} keys in {self._size} bytes; download it again'
      )
    return num_tensors, num_keys

  def _metadata(self, count: int) -> dict[str, Any]:
    found = {}
    for _ in range(count):
      key = self._string('a key')
      if key in found:
        raise UserError(f'{self.path} has the key {files.shown(key)} twice: it is damaged')
      found[key] = self._value(self._unpack('I')[0], key)
    return found

  def _infos(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """Returns name -> (type, shape in GGUF's order, offset)."""
    found = {}
    for _ in range(count):
      name = self._string('the name of a tensor')
      (num_dimensions,) = self._unpack('I')
      if name in found or not 1 <= num_dimensions <= MOST_DIMENSIONS:
        raise UserError(
          f'{self.path} has the tensor {files.shown(name)} twice, or with {num_dimensions} '
          f'dimensions; legal: 1 to {MOST_DIMENSIONS}'
        )
      shape = self._unpack(f'{num_dimensions}Q')
      found[name] = (*self._unpack('I'), shape, *self._unpack('Q'))
    return found

  def _place(self, infos: Mapping[str, tuple[int, tuple[int, ...], int]]) -> dict[str, Tensor]:
    """Finds the bytes of each tensor: one after the other, in the order of the header."""
    if unknown := {_type_name(kind) for kind, _, _ in infos.values()} - set(IMPLEMENTED):
      raise UserError(
        f'{self.path} holds tensors of type {", ".join(sorted(unknown))}; '
        f'implemented: {", ".join(IMPLEMENTED)}'
      )
    alignment = self.metadata.get('general.alignment', 32)
    start = end = _padded(self._at, alignment)
    found = {}
    for name, (number, shape, offset) in infos.items():
      kind = gguf.GGMLQuantizationType(number)
      if 0 in shape or shape[0] % gguf.GGML_QUANT_SIZES[kind][0] or start + offset != end:
        raise UserError(
          f'{self.path} is damaged: {files.shown(name)} of shape {shape[::-1]} and type '
          f'{kind.name} is said to be at byte {offset}, where it cannot be'
        )
      found[name] = Tensor(kind, shape[::-1], end, self)
      last = end + _num_bytes(kind, shape)
      end = _padded(last, alignment)
      if last > self._size:
        raise UserError(
          f'{self.path} is cut short: {self._size} bytes of {last}; download it again'
        )
    if self._size > end:
      raise UserError(
        f'{self.path} is damaged: {self._size - end} bytes follow the last tensor, which nothing '
        'in its header explains'
      )
    return found

  def _unpack(self, code: str) -> tuple:
    values = struct.unpack_from('<' + code, self.data, self._at)
    self._at += struct.calcsize('<' + code)
    return values

  def _string(self, what: str) -> str:
    (size,) = self._unpack('Q')
    if self._at + size > self._size:
      raise struct.error
    self._at += size
    try:
      return self.data[self._at - size : self._at].decode('utf-8')
    except UnicodeDecodeError as error:
      raise self._not_utf8(what) from error

  def _strings(self, count: int, what: str) -> list[str]:
    """An array of strings, without a call for each: a tokenizer has a hundred thousand."""
    size_of, data, at, found = struct.Struct('<Q').unpack_from, self.data, self._at, []
    for _ in range(count):
      (size,) = size_of(data, at)
      at += 8
      found.append(data[at : at + size])
      at += size
    if at > self._size:
      raise struct.error
    self._at = at
    try:
      return [string.decode('utf-8') for string in found]
    except UnicodeDecodeError as error:
      raise self._not_utf8(what) from error

  def _not_utf8(self, what: str) -> UserError:
    return UserError(f'{self.path} is damaged: {what} is not UTF-8')

  def _value(self, kind: int, key: str, depth: int = 0) -> Any:
    if kind == STRING:
      return self._string(files.shown(key))
    if kind in SCALARS:
      return self._unpack(SCALARS[kind])[0]
    if kind != ARRAY or depth >= MOST_NESTED:
      raise UserError(
        f'{self.path} is damaged: {files.shown(key)} has a value of type {kind}, '
        f'{depth} arrays deep'
      )
    kind, size = self._unpack('IQ')
    least = struct.calcsize('<' + SCALARS[kind]) if kind in SCALARS else 8
    if size > (self._size - self._at) // least:
      raise struct.error
    if kind == STRING:
      return self._strings(size, files.shown(key))
    if kind not in SCALARS:
      return [self._value(kind, key, depth + 1) for _ in range(size)]
    self._at += size * least
    return np.frombuffer(self.data, '<' + SCALARS[kind], size, self._at - size * least)


def _type_name(kind: int) -> str:
  known = {t.value: t.name for t in gguf.GGMLQuantizationType}
  return known.get(kind, f'number {kind}')


def _padded(size: int, alignment: int) -> int:
  return -(-size // alignment) * alignment


def _num_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
  block, size = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // block * size
