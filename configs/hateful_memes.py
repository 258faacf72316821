"""Hateful Memes in the paper's setting, which it does not report: --config.dataset.path=FOLDER.
Variants: configs/hateful_memes.py:small, :robust.
"""

from molt_jax.config import default_config, presets


def get_config(variants=''):
  config = presets.put(default_config(), presets.PAPER)
  config.dataset.name = 'hateful_memes'
  config.dataset.path = 'FOLDER'

  # Our reading from here on.
  config.text.max_tokens = 64
  config.train.epochs = 20.0
  return presets.vary(config, variants)
