"""Towers in ONNX files."""

import hashlib
import json
import pathlib

from molt_jax.errors import UserError
from molt_jax.towers import onnx, packaged
from molt_jax.towers.base import family_of
from molt_jax.towers.hugging_face_files import named_by
from molt_jax.towers.tower_files import TowerFiles


class OnnxFiles(TowerFiles):
  """An image tower in an ONNX file of `packaged.TOWERS`, wherever it lies: no other file says which
  architecture it has.
  """

  def __init__(self, path: str, modality: str, file: pathlib.Path):
    row = packaged.of_content(file)
    if row is None:
      known = [name for name, row in packaged.TOWERS.items() if row.file.endswith('.onnx')]
      raise UserError(
        f'{path!r}: an ONNX file does not say which model it holds, and this one is not known; '
        f'known: {", ".join(known)}; give the Hugging Face directory that it was made of'
      )
    family = family_of(row.config, modality, str(file))
    self._weights = named_by(onnx.dinov2(onnx.Graph(file), row.prefix), family, file)
    content = json.dumps(row.config, sort_keys=True).encode()
    sha256 = hashlib.sha256(content + row.sha256.encode()).hexdigest()
    super().__init__(path, family, dict(row.config), sha256, str(file))
    self.shapes = {name: weight.shape for name, weight in self._weights.items()}

  def read(self, name, shape):
    return self._weights[name].read()

  def tokenizer(self):
    raise AssertionError('an image tower has no tokenizer')
