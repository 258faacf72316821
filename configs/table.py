"""Your own folder of train.csv, (validation.csv,) test.csv and images:
--config.dataset.path=FOLDER.
"""

from molt_jax.config import default_config, presets


def get_config():
  config = presets.put(default_config(), presets.LAPTOP)
  config.dataset.name = 'table'
  config.dataset.path = 'FOLDER'
  # A sentence encoder; --config.backbones.text.path=smollm2 for a language model.
  config.backbones.text.path = 'minilm'
  config.text.max_tokens = 0  # Chosen from the training texts.
  return config
