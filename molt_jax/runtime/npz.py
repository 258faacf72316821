"""Dataclasses of arrays and JSON values in one npz file, checked when they are read."""

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Self

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import atomic, files, logbook, terminal, zipped

MAX_BYTES = 1 << 30  # Of such a file unpacked; the recorder writes at most a tenth.


class Saved:
  """A dataclass of arrays and JSON values in one npz file."""

  def _faults(self) -> Iterator[str]:
    """Yields the fields that are not as they are described."""
    raise NotImplementedError

  def save(self, path: pathlib.Path) -> None:
    """Writes the file, whole or not at all."""
    with atomic.writing(path) as file:
      self.dump(file)

  def dump(self, file: BinaryIO) -> None:
    """Writes the content of the file."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in values.items() if name not in arrays}
    coded = np.frombuffer(logbook.to_json(rest).encode(), np.uint8)
    np.savez_compressed(file, json=coded, **arrays)

  @classmethod
  def load(cls, path: zipped.Place) -> Self | None:
    """Reads the file, on the disk or in a zip; None where there is none.

    Raises:
      UserError: the file is damaged, or of something else.
    """
    if not path.exists():
      return None
    try:
      found = cls(**_unpacked(path))
      fault = next(found._faults(), None)
    except Exception as error:  # NumPy, zipfile and zlib raise nearly anything of a damaged file.
      fault = f'{type(error).__name__}: {error}'
    if fault:
      raise UserError(
        f'{str(path)!r} is damaged ({terminal.clean(fault, 200)}); delete it, and what it shows '
        'is left out until an evaluation (pairs: training) writes it anew'
      )
    return found


def read_arrays(path: zipped.Place) -> dict[str, np.ndarray]:
  """Reads an npz file; raises exceptions of many types where it is cut or damaged."""
  with files.open_binary(path) as file, zipfile.ZipFile(file) as archive:
    size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
      raise ValueError(f'it holds {size:,} bytes, more than {MAX_BYTES:,}')
    # Read whole, so that zipfile compares each with its CRC-32 before NumPy believes a header.
    raw = {name.removesuffix('.npy'): archive.read(name) for name in archive.namelist()}
  return {name: np.load(io.BytesIO(content)) for name, content in raw.items()}


def _unpacked(path: zipped.Place) -> dict[str, Any]:
  arrays = read_arrays(path)
  return json.loads(arrays.pop('json').tobytes()) | arrays


def is_array(value: Any, kinds: str, *shape: int) -> bool:
  """Whether it is an array of that shape whose type is one of `kinds`, as in `dtype.kind`."""
  return isinstance(value, np.ndarray) and value.dtype.kind in kinds and value.shape == shape


def are_strings(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def wrong_values(record: Any, kinds: Mapping[str, type]) -> Iterator[str]:
  """Yields the fields that are not of these types; a count is an int >= 0 that JSON holds."""
  for name, kind in kinds.items():
    value = getattr(record, name)
    if type(value) is not kind or (kind is int and not 0 <= value < 1 << 53):
      yield f'{name}: {value!r}'
