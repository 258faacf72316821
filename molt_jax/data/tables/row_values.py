"""What the cells of a row become: images, and one text."""

import os
from collections.abc import Sequence
from typing import Any

from molt_jax.data import addresses, pictures

_END = '.!?…:;,'  # A text that ends so is followed by a blank alone.


def items_of(value: Any) -> list[Any]:
  """Returns the items of a cell of images: a list's, or those of 'a.jpg|b.jpg'."""
  if isinstance(value, list | tuple):
    return list(value)
  return value.split('|') if isinstance(value, str) else [value]


def joined(parts: Sequence[str]) -> str | None:
  """Returns texts of several columns as one: 'a title. a description'; None: there is none.

  One text alone stays as it is. Others are trimmed, and joined by a full stop unless the one
  before ends in punctuation.
  """
  if len(parts) < 2:
    return parts[0] if parts else None
  text = ''
  for part in map(str.strip, parts):
    text += part if not text else f' {part}' if text[-1] in _END else f'. {part}'
  return text


def as_image(value: Any, folder: str, cache: str) -> pictures.Image:
  """Returns what a cell of images holds as an image of a row.

  Args:
    value: as `cells.read` returns it, not None.
    folder: what paths are relative to.
    cache: folder that keeps what is fetched.
  """
  if isinstance(value, str) and addresses.is_address(value):
    return addresses.Address(value, cache)
  if isinstance(value, str):
    path = os.path.join(folder, value)
    if '\\' in value and not os.path.exists(path):  # Written on Windows.
      path = os.path.join(folder, value.replace('\\', '/'))
    return path
  if isinstance(value, pictures.Picture):
    return value
  return pictures.in_memory(value)
