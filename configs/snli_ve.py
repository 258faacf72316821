"""SNLI-VE to 3 relations, as the paper does: --config.dataset.path=FOLDER. Variants:
configs/snli_ve.py:small, :robust, :small,robust.
"""

from molt_jax.config import default_config, presets


def get_config(variants=''):
  config = presets.put(default_config(), presets.PAPER)
  config.dataset.name = 'snli_ve'
  config.dataset.path = 'FOLDER'
  config.dataset.snli_ve.neutral = 'original'

  # Our reading from here on.
  config.text.max_tokens = 64  # Hypotheses have 7 words, the longest 56.
  config.train.epochs = 3.0
  return presets.vary(config, variants)
