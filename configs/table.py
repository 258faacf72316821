"""Your own folder of train.csv, (validation.csv,) test.csv and images:
--config.dataset.path=FOLDER.
"""

from molt_jax.config import default_config, presets


def get_config():
  # The image tower has learned from drawings; for photographs give a CLIP by
  # --config.backbones.image.path=openai/clip-vit-base-patch32.
  config = presets.put(default_config(), presets.LAPTOP)
  config.dataset.name = 'table'
  config.dataset.path = 'FOLDER'
  config.text.max_tokens = 0  # Chosen from the training texts.
  return config
