"""The files of one tower, whatever their format."""

import abc
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.towers import preprocessing, tokenizer
from molt_jax.towers.base import Family
from molt_jax.towers.preprocessing import ImageSpec

# Types of weights, as safetensors names them. Others are quantised, or no numbers at all.
WEIGHT_TYPES = ('F32', 'F16', 'BF16')


class TowerFiles(abc.ABC):
  """Files of one tower.

  Attributes:
    family: its row in `base.FAMILIES`.
    config: dict of the Hugging Face config.json (or its equivalent).
    identity: {'path': as given, 'sha256': of configuration and tensors}.
    where: what holds the configuration, for errors.
    shapes: Hugging Face tensor name -> shape; None where weights are random and any name can be
      read.
    types: Hugging Face tensor name -> type, where it is not one of WEIGHT_TYPES.
    resolution: side in pixels that an image tower shall read; 0: its own.
  """

  shapes: Mapping[str, tuple[int, ...]] | None = None
  types: Mapping[str, str] = {}

  def __init__(self, path: str, family: Family, config: dict[str, Any], sha256: str, where: str):
    self.family, self.config, self.where = family, config, where
    self.identity = {'path': path, 'sha256': sha256}
    self.resolution = 0

  @property
  def heads(self) -> tuple[str, ...]:
    """What the files have above the last hidden state, of `family.heads`."""
    rows = self.family.heads.items()
    return tuple(name for name, tensor in rows if self.shapes is None or tensor in self.shapes)

  @functools.cached_property
  def architecture(self) -> Any:
    """The configuration as our modules take it; of an image tower, for the images that it reads."""
    if self.family.modality == 'text':
      return self._pretrained
    return self._pretrained.at(self.preprocess().size, self.where)

  @functools.cached_property
  def _pretrained(self) -> Any:
    return self.family.config.from_hf(self.config, self.where)

  def unfused(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Takes tensors (with `part`) apart that hold several of ours in blocks of rows.

    Raises:
      UserError: one has another number of rows, or a part of it is there besides.
    """
    found = dict(tensors)
    fused = self.family.fused(self._pretrained) if self.family.fused else {}
    for template, parts in fused.items():
      for layer in range(self._pretrained.num_layers):
        name, first, rows = template.format(layer), 0, sum(parts.values())
        if (whole := found.pop(name, None)) is None:
          continue
        if whole.shape[0] != rows:
          raise UserError(
            f'{self.where}: {name} has {whole.shape[0]} rows instead of {rows}: the tensors do not '
            'fit the configuration'
          )
        for part, size in parts.items():
          if part.format(layer) in found:
            raise UserError(f'{self.where}: {part.format(layer)} is there, and in {name} too')
          found[part.format(layer)] = whole.part(first, size)
          first += size
    return found

  @property
  def is_resized(self) -> bool:
    """Whether an image tower reads images of another side than its own."""
    return self.resolution not in (0, self.own_preprocess().size)

  @abc.abstractmethod
  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads one tensor, by Hugging Face name and in Hugging Face's orientation; `shape` is the one
    it is known to have.
    """

  def number(self, name: str) -> float | None:
    """Reads a tensor of one number; None where there is none.

    Raises:
      UserError: it is no finite number.
    """
    if name not in (self.shapes or {}):
      return None
    value = np.asarray(self.read(name, self.shapes[name]), np.float32)
    if value.size != 1 or not np.isfinite(value).all():
      raise UserError(f'{self.identity["path"]}: {name} is no finite number; download it again')
    return float(value.reshape(()))

  @abc.abstractmethod
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The text tower's tokenizer."""

  def preprocess(self) -> ImageSpec:
    """What the image tower is given to see, of `resolution`.

    Raises:
      UserError: patches do not fill the resolution, or the files say what is not implemented.
    """
    own, side = self.own_preprocess(), self._pretrained.patch_size
    if not self.resolution:
      return own
    if self.resolution % side:
      fitting = max(side, self.resolution // side * side)
      raise UserError(
        f'config.backbones.image.resolution: {self.resolution}, which patches of {side} pixels '
        f'({self.identity["path"]}) do not fill; give a multiple such as {fitting}, or 0 for '
        f'{own.size}'
      )
    return own.at(self.resolution)

  def own_preprocess(self) -> ImageSpec:
    """What the image tower wants to see by its files."""
    family = self.family
    return preprocessing.spec(family.preprocessor, self._pretrained.image_size, self.where)


def filled(architecture: Any) -> int:
  """Ids that every text of a text tower has; 0: texts are as long as they are."""
  return getattr(architecture, 'filled_length', 0)


def sha256_of(paths: Iterable[files.Path]) -> str:
  """Hash over the contents of files, in this order."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(_digest(path, files.version(path)))
  return digest.hexdigest()


@functools.lru_cache
def _digest(path: files.Path, version: tuple[int, ...]) -> bytes:
  """Hash of a file, taken once: a tower is described before it is loaded."""
  del version
  with files.open_binary(path) as f:
    return hashlib.file_digest(f, 'sha256').digest()
