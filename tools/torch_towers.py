"""Our towers in PyTorch, which benchmarks compare with: transformers' models, the same weights."""

import numpy as np
import torch
import transformers

from molt_jax.towers import loading, tensor_plan


def text_twin(tower: loading.Tower) -> transformers.LlamaModel:
  """Returns a text tower as transformers has it.

  Raises:
    SystemExit: it is no LLaMA with plain rotary positions and without biases, as SmolLM2 is one.
  """
  c = tower.config
  frequency_h = np.array(c.ropes[0].frequencies)
  theta = float(frequency_h[1] ** (-c.head_dim / 2))
  plain = np.allclose(frequency_h, theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim))
  if c.family != 'llama' or not plain or c.qkv_bias or c.mlp_bias:
    raise SystemExit('only LLaMAs without RoPE scaling and biases are compared')
  config = transformers.LlamaConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.hidden_size,
    intermediate_size=c.intermediate_size,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads,
    head_dim=c.head_dim,
    max_position_embeddings=c.max_positions,
    rms_norm_eps=c.norm_eps,
    rope_parameters={'rope_type': 'default', 'rope_theta': theta},
  )
  return _filled(transformers.LlamaModel(config), tower)


def image_twin(tower: loading.Tower) -> transformers.Dinov2Model:
  """Returns an image tower as transformers has it, for images of the tower's own size.

  Raises:
    SystemExit: it is no DINOv2, or one with SwiGLU.
  """
  c = tower.config
  if tower.family.name != 'dinov2' or c.gated:
    raise SystemExit('only image towers of the family dinov2 without SwiGLU are compared')
  config = transformers.Dinov2Config(
    hidden_size=c.hidden_size,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    mlp_ratio=c.intermediate_size // c.hidden_size,
    hidden_act=c.hidden_act,
    layer_norm_eps=c.layer_norm_eps,
    image_size=c.image_size,
    patch_size=c.patch_size,
  )
  return _filled(transformers.Dinov2Model(config), tower)


def _filled(model, tower):
  """Fills a model; what hidden states do not depend on may stay as it was drawn."""
  named = tensor_plan.hugging_face_tensors(tower.params, tower.family)
  state = {name: torch.from_numpy(np.array(w)) for name, w in named.items()}
  lacking, unknown = model.load_state_dict(state, strict=False)
  unread = {'embeddings.mask_token', 'layernorm.weight', 'layernorm.bias', 'norm.weight'}
  if unknown or set(lacking) - unread:
    raise SystemExit(f'the twin of a tower lacks {lacking} and has no {unknown}')
  return model.eval()
