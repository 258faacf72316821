"""Tensors of a directory as `save_pretrained` writes it, on the disk or within a zip: which files
hold them, their headers.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place, ZipPath
from molt_jax.towers import keys, zipped_tensors
from molt_jax.towers.keys import OBJECT, Table, neutral

INDEX_KEYS: Table = {'weight_map': OBJECT, **neutral('metadata')}

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('*.bin', '*.pt', '*.pth', '*.ckpt')
MAX_HEADER_BYTES = 1 << 25
MAX_SIZE = 1 << 59  # Of an array: NumPy counts its bytes in 63 bits.
FORMATS = (None, 'pt', 'np', 'mlx')  # Of TensorFlow and Flax, matrices are transposed.


class Tensor(NamedTuple):
  """Where a tensor is: its file and its name there, its type (as safetensors names it), shape, and
  the first of its rows where it is a block of one.
  """

  file: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  first_row: int | None = None

  def part(self, first_row: int, rows: int) -> 'Tensor':
    """Some rows of it, as a tensor."""
    return self._replace(shape=(rows, *self.shape[1:]), first_row=first_row)

  def block(self, index: int, count: int) -> 'Tensor':
    """Returns one of `count` equal blocks of its rows."""
    rows = self.shape[0] // count
    return self.part(index * rows, rows)

  def read(self) -> np.ndarray:
    """Reads it; its file is opened anew, so that pages already copied are given back."""
    try:
      with safetensors.safe_open(self.file, framework='np') as f:
        if self.first_row is None:
          return f.get_tensor(self.name)
        return f.get_slice(self.name)[self.first_row : self.first_row + self.shape[0]]
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f'{self.file} can no longer be read ({files.reason(error)})') from error


# Of a file on the disk, or within a zip.
AnyTensor = Tensor | zipped_tensors.Tensor


def find(directory: Place) -> dict[str, AnyTensor]:
  """Returns the tensors of a directory by name; headers are read, no weights.

  Where there is a whole file beside an index with shards, the whole file is what transformers
  loads; it is read here if the shards hold the same.

  Raises:
    UserError: there are no safetensors, a file is missing, damaged or no file, a tensor is in two
      files, or a whole file and shards differ.
  """
  index, single = directory / INDEX, directory / SINGLE
  if not index.exists():
    if not single.exists():
      raise UserError(_what_else(directory))
    return headers([single])
  weight_map = _read_index(index)
  shards = [directory / name for name in sorted(set(weight_map.values()))]
  if not single.exists():
    return _read_shards(index, shards, weight_map)
  whole = headers([single])
  there = any(shard.exists() for shard in shards if shard != single)
  if there and not _equal(whole, _read_shards(index, shards, weight_map)):
    raise UserError(
      f'{directory} holds {SINGLE} and, listed in {INDEX}, other weights in '
      f'{files.listed(shard.name for shard in shards)}: remove those that are out of date'
    )
  return whole


def _what_else(directory: Place) -> str:
  pickled = [p.name for pattern in PICKLED for p in sorted(directory.glob(pattern))]
  if pickled:
    return (
      f'{directory} holds only pickled weights ({files.listed(pickled, 3)}), which can run code '
      'when they are read: convert them with transformers, '
      'model.save_pretrained(DIR, safe_serialization=True)'
    )
  return f'{directory} holds no {SINGLE} and no {INDEX}'


def _read_index(index: Place) -> dict[str, str]:
  """Returns tensor -> name of its file, a plain one."""
  found = files.read_json(index)
  keys.check(found, INDEX_KEYS, str(index))
  weight_map = found.get('weight_map')
  if not weight_map:
    raise UserError(f'{index} lists no tensors (weight_map): download it again, or remove it')
  for tensor, name in weight_map.items():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or '\0' in name:
      raise UserError(
        f'{index} says that {files.shown(tensor)} is in {files.shown(name)}; legal is the name '
        'of a file beside it'
      )
    if not name.endswith('.safetensors'):
      raise UserError(
        f'{index} says that {files.shown(tensor)} is in {files.shown(name)}; only .safetensors '
        f'files are read'
      )
  return weight_map


def _read_shards(
  index: Place,
  shards: list[Place],
  weight_map: Mapping[str, str],
) -> dict[str, AnyTensor]:
  if missing := [f.name for f in shards if not f.exists()]:
    raise UserError(
      f'{index.parent} lacks {files.listed(missing)}, which {index.name} lists: download them'
    )
  found = headers(shards)
  astray = [t for t, name in weight_map.items() if t not in found or found[t].file.name != name]
  if astray:
    raise UserError(
      f'{index} says that {files.shown(astray[0])} is in {files.shown(weight_map[astray[0]])}, '
      f'where it is not ({len(astray)} such tensors): index and files do not belong together'
    )
  return found


def headers(paths: list[Place]) -> dict[str, AnyTensor]:
  """Returns the tensors of files by name.

  Raises:
    UserError: a file is damaged, or a tensor is in two.
  """
  found = {}
  for path in paths:
    for tensor in _header(path):
      if tensor.name in found:
        raise UserError(
          f'{files.shown(tensor.name)} is in {found[tensor.name].file.name} and in {path}: which '
          f'of the two is meant is not known'
        )
      found[tensor.name] = tensor
  return found


def _header(path: Place) -> list[AnyTensor]:
  """Reads the header of one file."""
  files.check_file(path)
  if isinstance(path, ZipPath):
    metadata, tensors = zipped_tensors.header(path)
  else:
    metadata, tensors = _plain_header(path)
  if (made_with := metadata.get('format')) not in FORMATS:
    raise UserError(
      f'{path} says that it was made with {files.shown(made_with)}, whose tensors lie in another '
      'way; implemented: pt (save_pretrained of a PyTorch model)'
    )
  for tensor in tensors:
    # An array has strides even where one of its sizes is 0.
    if math.prod(max(size, 1) for size in tensor.shape) > MAX_SIZE:
      shape = files.shown(list(tensor.shape))
      raise UserError(
        f'{files.printable(path)} is damaged: {files.shown(tensor.name)} is said to have the '
        f'shape {shape}; download it again'
      )
  return tensors


def _plain_header(path: pathlib.Path) -> tuple[dict[str, Any], list[Tensor]]:
  """Reads the header of a file on the disk, metadata and tensors: safetensors checks it, but for
  names that are there twice.
  """
  try:
    with safetensors.safe_open(path, framework='np') as f:
      metadata = f.metadata() or {}
    with open(path, 'rb') as file:
      content = file.read(min(int.from_bytes(file.read(8), 'little'), MAX_HEADER_BYTES))
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f'{path} is damaged or cut short ({files.reason(error)}); download it again'
    ) from error
  header = files.parse_json(content, f'the header of {path}')
  header.pop('__metadata__', None)
  tensors = [Tensor(path, name, t['dtype'], tuple(t['shape'])) for name, t in header.items()]
  return metadata, tensors


def _equal(one: Mapping[str, AnyTensor], two: Mapping[str, AnyTensor]) -> bool:
  """Whether both hold the same tensors, byte by byte; one pair at a time is in memory."""
  if _kinds(one) != _kinds(two):
    return False
  return all(t.read().tobytes() == two[name].read().tobytes() for name, t in one.items())


def _kinds(tensors: Mapping[str, AnyTensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
  return {name: (t.dtype, t.shape) for name, t in tensors.items()}
