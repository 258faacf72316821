"""OpenMoji pictures and names -> 95 Unicode subcategories, on a CPU in minutes. Real data and a
real language model, both from pip.
"""

from molt_jax.config import default_config, presets


def get_config():
  config = presets.put(default_config(), presets.LAPTOP)
  config.dataset.name = 'openmoji'
  config.text.max_tokens = 16
  return config
