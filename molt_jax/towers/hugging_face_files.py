"""Towers in directories: Hugging Face's, on the disk or within a zip, and OpenCLIP's."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.runtime import files, zipped
from molt_jax.towers import open_clip, preprocessing, sentence_files, shards, tokenizer_files
from molt_jax.towers.base import Family, family_of
from molt_jax.towers.tower_files import WEIGHT_TYPES, TowerFiles, filled, sha256_of


class HuggingFaceFiles(TowerFiles):
  """A directory with config.json and safetensors, as `save_pretrained` writes it, on the disk or
  within a zip.
  """

  def __init__(self, path: str, modality: str, directory: zipped.Place):
    self._directory = directory
    config = directory / 'config.json'
    if not config.exists():
      raise UserError(
        f'{path!r}: there is no config.json in {directory}; expected a Hugging Face model directory'
      )
    if (adapter := directory / 'adapter_config.json').exists():
      raise UserError(
        f'{adapter}: the directory holds an adapter (LoRA and the like), which transformers '
        'would put on the weights and which is not implemented here: merge it into them, '
        'model.merge_and_unload() and save_pretrained(DIR)'
      )
    content = files.read_json(config)
    family = family_of(content, modality, str(config))
    tensors = named_by(shards.find(directory), family, directory)
    read = sorted({t.file for t in tensors.values()})
    self._pooling = sentence_files.read(directory) if hasattr(family.config, 'pooling') else None
    describing = [config, self._pooling.file] if self._pooling else [config]
    super().__init__(path, family, content, sha256_of([*describing, *read]), str(config))
    self._tensors = self.unfused(tensors)
    self.shapes = {name: t.shape for name, t in self._tensors.items()}
    self.types = {n: t.dtype for n, t in self._tensors.items() if t.dtype not in WEIGHT_TYPES}

  @functools.cached_property
  def architecture(self):
    """See `TowerFiles`; a directory of sentence-transformers says how it pools."""
    architecture = super().architecture
    if self._pooling is None:
      return architecture
    return dataclasses.replace(architecture, pooling=self._pooling.mode)

  @property
  def heads(self):
    """See `TowerFiles`; the pooler of a model that was trained to pool otherwise is left over."""
    return tuple(head for head in super().heads if head != 'pool' or self._pooling is None)

  def read(self, name, shape):
    return self._tensors[name].read()

  def tokenizer(self):
    sizes = {'vocab_size': self.architecture.vocab_size, 'filled': filled(self.architecture)}
    return tokenizer_files.read(self._directory, **sizes)

  def own_preprocess(self):
    return preprocessing.read(
      self._directory,
      self._pretrained.image_size,
      usual=self.family.preprocessor,
      any_size=self.family.any_size or self.resolution > 0,
    )


class OpenClipFiles(HuggingFaceFiles):
  """A directory of OpenCLIP, as the CLIPModel that it is."""

  def __init__(self, path: str, modality: str, directory: zipped.Place):
    content, self._asked = open_clip.read_config(directory, modality)
    where = directory / open_clip.CONFIG
    family = family_of(content, modality, str(where))
    weights, found = open_clip.tensors(directory)
    self._directory, self._pooling = directory, None
    self._tensors = named_by(found, family, directory)
    TowerFiles.__init__(self, path, family, content, sha256_of([where, weights]), str(where))
    self.shapes = {name: t.shape for name, t in self._tensors.items()}
    self.types = {n: t.dtype for n, t in self._tensors.items() if t.dtype not in WEIGHT_TYPES}

  def own_preprocess(self):
    asked, size = self._asked, self._pretrained.image_size
    spec = preprocessing.spec(asked, size, self.where)
    preprocessing.check_size(spec, size, self.resolution > 0, self.where)
    return spec


def directory_files(path: str, modality: str, directory: zipped.Place) -> TowerFiles:
  layout = OpenClipFiles if open_clip.is_one(directory) else HuggingFaceFiles
  return layout(path, modality, directory)


def named_by(tensors: Mapping[str, Any], family: Family, place: zipped.Place) -> dict[str, Any]:
  """Gives tensors (with `block`, where the family splits any) the names in the family's table:
  without the prefix of a larger model, renamed, one that holds several split.
  """
  named, origin = {}, {}
  for theirs, tensor in tensors.items():
    name = re.sub(family.prefix, '', theirs)
    for pattern, replacement in family.renamed.items():
      name = re.sub(pattern, replacement, name)
    for part_name, part in _parts(name, tensor, family):
      if part_name in named:
        raise UserError(
          f'{place} holds {files.shown(origin[part_name])} and {files.shown(theirs)}, two tensors '
          'for one parameter: which of them is meant is not known'
        )
      named[part_name], origin[part_name] = part, theirs
  return named


def _parts(name: str, tensor: Any, family: Family) -> Iterator[tuple[str, Any]]:
  """Yields the tensor, or the parameters of ours that it holds, by name."""
  for pattern, replacements in family.split:
    match, count = re.fullmatch(pattern, name), len(replacements)
    if match and tensor.shape and tensor.shape[0] % count == 0:
      for k, replacement in enumerate(replacements):
        yield match.expand(replacement), tensor.block(k, count)
      return
  yield name, tensor
