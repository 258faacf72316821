"""UPMC-Food101 to 101 classes, as the paper does: --config.dataset.path=FOLDER. Variants:
configs/upmc_food101.py:small, :robust, :small,robust.
"""

from molt_jax.config import default_config, presets


def get_config(variants=''):
  config = presets.put(default_config(), presets.PAPER)
  config.dataset.name = 'upmc_food101'
  config.dataset.path = 'FOLDER'

  # Our reading from here on. The paper's counts are those of the title files, less the row that a
  # reader took for a header.
  config.dataset.upmc_food101.text = 'title'
  config.dataset.validation_fraction = 0.1
  config.text.max_tokens = 64  # Titles have 7 words, the longest 135.
  config.train.epochs = 10.0
  return presets.vary(config, variants)
