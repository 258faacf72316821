"""A tower that no file describes: a named architecture with random weights."""

import dataclasses
import hashlib
import json
import math
import zlib

import numpy as np

from molt_jax.towers import preprocessing, tokenizer
from molt_jax.towers.base import random_family
from molt_jax.towers.tower_files import TowerFiles, filled

RANDOM_SEED = 0


class RandomFiles(TowerFiles):
  """A named architecture; the weights are drawn from RANDOM_SEED."""

  def __init__(self, path: str, modality: str, name: str):
    family = random_family(path, name, modality)
    config = dict(family.architectures[name])
    content = json.dumps({'architecture': config, 'seed': RANDOM_SEED}, sort_keys=True)
    super().__init__(path, family, config, hashlib.sha256(content.encode()).hexdigest(), path)

  def read(self, name, shape):
    # NumPy on the host: the same on every platform and with any sharding, and nothing to compile.
    if name.endswith('.bias'):
      return np.zeros(shape, np.float32)
    if 'norm' in name.split('.')[-2].lower():
      return np.full(shape, 1 - getattr(self.architecture, 'norm_offset', 0.0), np.float32)
    if name.endswith('.lambda1'):  # Of LayerScale.
      return np.ones(shape, np.float32)
    rng = np.random.default_rng([RANDOM_SEED, zlib.crc32(name.encode())])
    # Variance 1 / fan-in; shapes are [out, in...], of tokens and positions with ones in front.
    inner = shape
    while len(inner) > 1 and inner[0] == 1:
      inner = inner[1:]
    return rng.standard_normal(shape, np.float32) / np.float32(math.prod(inner[1:]) ** 0.5)

  def own_preprocess(self):
    sizes = ('size', 'crop_size')  # Those of the architecture, in the place of the published ones.
    usual = {k: v for k, v in self.family.preprocessor.items() if k not in sizes}
    return preprocessing.spec(usual, self._pretrained.image_size, self.where)

  def tokenizer(self):
    with_end = getattr(self.architecture, 'ends_texts', False)
    made = tokenizer.byte_tokenizer(vocab_size=self.architecture.vocab_size, with_end=with_end)
    return dataclasses.replace(made, filled=filled(self.architecture))
