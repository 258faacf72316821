"""Zip files with damaged bytes and members, read as folders of safetensors.

A trial writes a tiny safetensors file into a zip, stored or deflated, damages the header of the
tensors or the bytes of the zip, and reads it. Tensors that come out are those that the library
reads of the same bytes; what it refuses is refused.
"""

import io
import json
import pathlib
import struct
import zipfile

import numpy as np
import safetensors.numpy

from molt_jax.errors import UserError
from molt_jax.runtime import zipped
from molt_jax.towers import shards

SIZES = [0, 1, 3, 4, 8, 24, 2**31, 2**62, 2**63, 2**64, -1]
ODD = [None, True, 1.5, '4', [], {}, [4], 'F32', 'F8_E4M3', 'I64']


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
  """A few tensors, one of them empty."""
  return {
    'a.weight': rng.standard_normal((2, 3)).astype(np.float32),
    'b.weight': rng.standard_normal((4,)).astype(np.float16),
    'c': np.zeros((0, 2), np.float32),
    'd': np.array(rng.standard_normal(), np.float32),
  }


def pack(
  content: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = shards.SINGLE, **others: bytes
) -> bytes:
  """A zip with one file, and others."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', method) as archive:
    for member, raw in {name: content, **others}.items():
      archive.writestr(member, raw)
  return out.getvalue()


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors in a zip."""
  return {name: tensor.read() for name, tensor in shards.find(zipped.folder(path)).items()}


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Damages a zip, or what is in it, and reads it."""
  whole = tensors(rng)
  content = safetensors.numpy.save(whole, {'format': 'pt'})
  path = folder / 'model.zip'
  method = int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
  inside = rng.random() < 0.6
  if inside:
    content = _damage_header(rng, content)
    path.write_bytes(pack(content, method))
  else:
    path.write_bytes(_damage_bytes(rng, pack(content, method)))
  try:
    found = read(path)
  except UserError as error:
    if '\n' in str(error) or not str(error) or len(str(error)) > 2000:
      raise AssertionError(f'not one line of text: {str(error)[:300]!r}') from error
    return {'refused': 1}
  if not inside:
    return {'identical' if _same(found, whole) else 'changed': 1}
  if not _same(found, safetensors.numpy.load(content)):  # Which raises where the library refuses.
    raise AssertionError('other tensors than the library reads')
  return {'identical' if _same(found, whole) else 'as the library reads it': 1}


def _same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
  return one.keys() == two.keys() and all(
    one[n].dtype == two[n].dtype
    and one[n].shape == two[n].shape
    and one[n].tobytes() == two[n].tobytes()
    for n in one
  )


def _damage_header(rng: np.random.Generator, content: bytes) -> bytes:
  """Changes one thing in the header of a safetensors file, or nothing."""
  (length,) = struct.unpack('<Q', content[:8])
  header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
  rows = [name for name in header if name != '__metadata__']
  row = header[rows[int(rng.integers(len(rows)))]]
  how = int(rng.integers(8))
  if how == 0:
    row['data_offsets'][int(rng.integers(2))] = SIZES[int(rng.integers(len(SIZES)))]
  elif how == 1:
    row['shape'] = [SIZES[int(i)] for i in rng.integers(len(SIZES), size=int(rng.integers(3)))]
  elif how == 2:
    row[str(rng.choice(['dtype', 'shape', 'data_offsets', 'x']))] = ODD[int(rng.integers(len(ODD)))]
  elif how == 3:
    del row[str(rng.choice(['dtype', 'shape', 'data_offsets']))]
  elif how == 4:
    data = data[: int(rng.integers(len(data)))] if rng.random() < 0.5 else data + b'\0'
  elif how == 5:
    header['__metadata__'] = ODD[int(rng.integers(len(ODD)))]
  elif how == 6:
    raw = json.dumps(header).encode()
    length = int(rng.choice([0, 1, len(raw) - 1, len(raw) + 1, 2**31, 2**63]))
    return struct.pack('<Q', length) + raw + data
  raw = json.dumps(header).encode()
  return struct.pack('<Q', len(raw)) + raw + data


def _damage_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
  """Changes bytes of a zip."""
  raw = bytearray(whole)
  if rng.random() < 0.2:
    return bytes(raw[: int(rng.integers(len(raw)))])
  for _ in range(int(rng.integers(1, 4))):
    at = int(rng.integers(len(raw)))
    if rng.random() < 0.7:
      raw[at] ^= 1 << int(rng.integers(8))
    else:
      raw[at : at + 4] = struct.pack('<I', int(rng.choice([0, 1, 2**31, 2**32 - 1])))
  return bytes(raw)
