"""Towers in GGUF files."""

import pathlib

from molt_jax.errors import UserError
from molt_jax.towers import gguf_tokenizer
from molt_jax.towers.base import family_of
from molt_jax.towers.tower_files import TowerFiles, sha256_of


class GgufFiles(TowerFiles):
  """A decoder in one GGUF file, or in several that llama.cpp has split."""

  def __init__(self, path: str, modality: str, file: pathlib.Path):
    if modality != 'text':
      raise UserError(
        f'{path!r}: a GGUF file holds a text tower; a CLIP tower is a Hugging Face '
        'directory or hub id'
      )
    # And with it the package of that name, which only these files need.
    from molt_jax.towers import gguf, gguf_models

    self._models = gguf_models
    self._reader = gguf.Reader(file)
    config = gguf_models.hf_config(self._reader)
    family = family_of(config, modality, str(file))
    super().__init__(path, family, config, sha256_of(self._reader.paths), str(file))
    self._kind = self._reader.metadata['general.architecture']
    named = self._reader.tensors.items()
    tensors = {
      gguf_models.hf_name(n, self._kind): t for n, t in named if n not in gguf_models.ROPE_TENSORS
    }
    self._tensors = self.unfused(tensors)
    self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

  def read(self, name, shape):
    w = self._tensors[name].read()
    return self._models.restore(name, w, self.architecture, self._kind).reshape(shape)

  def tokenizer(self):
    return gguf_tokenizer.from_gguf(
      self._reader.metadata, vocab_size=self.architecture.vocab_size, where=self.where
    )
