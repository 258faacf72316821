"""CLIP vision transformer as a frozen image tower: all tokens (class token and patches), no projection head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.backbones import stack
from molt_jax.config import UserError

# What Hugging Face reads where a vision config is silent: values equal to these are left out when a CLIPConfig is saved.
DEFAULTS = {
    'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'num_channels': 3, 'image_size': 224,
    'patch_size': 32, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
}
# Keys that change the mathematics, and the values that are implemented.
NEUTRAL = {'model_type': ('clip_vision_model',), 'num_channels': (3,), 'quantization_config': (None,)}
ACTIVATIONS = {
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'gelu': lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
  """Architecture of a CLIP vision transformer; image and patches are square."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  image_size: int
  patch_size: int
  hidden_act: str
  layer_norm_eps: float

  @property
  def num_tokens(self) -> int:
    """Class token and patches."""
    return 1 + (self.image_size // self.patch_size) ** 2

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'ClipVisionConfig':
    """Reads the dict of a Hugging Face config.json, of a CLIPModel (its vision_config) or a CLIPVisionModel.

    Raises:
      UserError: a value is not implemented.
    """
    if config.get('model_type', 'clip') == 'clip' and 'vision_config' in config:
      config = {'model_type': 'clip_vision_model', **config['vision_config'], **(config.get('vision_config_dict') or {})}
    c = {**DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    for key, legal in {**NEUTRAL, 'hidden_act': tuple(ACTIVATIONS)}.items():
      if c.get(key) not in legal:
        raise UserError(f'the CLIP vision config has {key} = {c.get(key)!r}, which is not implemented; implemented: {" or ".join(map(repr, legal))}')
    for key in ('image_size', 'patch_size'):
      if not isinstance(c[key], int):
        raise UserError(f'the CLIP vision config has {key} = {c[key]!r}; only one number (square) is implemented')
    if c['image_size'] < c['patch_size'] or c['hidden_size'] % c['num_attention_heads']:
      raise UserError(f'the CLIP vision config has image_size = {c["image_size"]}, which must be at least patch_size = {c["patch_size"]}, and '
                      f'num_attention_heads = {c["num_attention_heads"]}, which must divide hidden_size = {c["hidden_size"]}')
    return cls(
        hidden_size=c['hidden_size'], intermediate_size=c['intermediate_size'], num_layers=c['num_hidden_layers'], num_heads=c['num_attention_heads'],
        image_size=c['image_size'], patch_size=c['patch_size'], hidden_act=c['hidden_act'], layer_norm_eps=c['layer_norm_eps'])


def patches(image_bhwc: jax.Array, size: int) -> jax.Array:
  """Cuts images into flattened patches [B, patches, size * size * channels]; an incomplete last row or column is dropped."""
  b, h, w, c = image_bhwc.shape
  rows, columns = h // size, w // size
  x = image_bhwc[:, :rows * size, :columns * size].reshape(b, rows, size, columns, size, c)
  return x.swapaxes(2, 3).reshape(b, rows * columns, size * size * c)


class ClipLayer(nn.Module):
  """One encoder layer: x + attention(norm(x)), then x + MLP(norm(x)); biases everywhere."""

  config: ClipVisionConfig
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, h_bid):
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)

    def dense(name, features, axes, axis=-1):
      num_out = len(features) if isinstance(features, tuple) else 1
      return nn.DenseGeneral(
          features, axis=axis, dtype=self.dtype, param_dtype=self.dtype, name=name,
          kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
          bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]))

    x_bid = layer_norm(c, self.dtype, 'attention_norm')(h_bid)
    q_binh, k_binh, v_binh = (dense(name, heads, ('embed', 'heads', 'head_dim'))(x_bid) for name in ('q_proj', 'k_proj', 'v_proj'))
    a_binh = jax.nn.dot_product_attention(q_binh, k_binh, v_binh, implementation=self.attention)
    h_bid += dense('o_proj', c.hidden_size, ('heads', 'head_dim', 'embed'), axis=(-2, -1))(a_binh)

    x_bid = layer_norm(c, self.dtype, 'mlp_norm')(h_bid)
    x_bif = ACTIVATIONS[c.hidden_act](dense('up_proj', c.intermediate_size, ('embed', 'mlp'))(x_bid))
    return h_bid + dense('down_proj', c.hidden_size, ('mlp', 'embed'))(x_bif)


def layer_norm(config: ClipVisionConfig, dtype: Any, name: str) -> nn.LayerNorm:
  """LayerNorm with float32 statistics by the two-pass formula (the fast one cancels on outlier channels)."""
  return nn.LayerNorm(
      epsilon=config.layer_norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name,
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)))


class ClipVision(nn.Module):
  """CLIP vision transformer without the final norm and projection.

  Attributes:
    config: the architecture.
    dtype: of weights and computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
  """

  config: ClipVisionConfig
  dtype: Any
  attention: str

  def setup(self):
    c = self.config
    width = nn.initializers.normal(c.hidden_size ** -0.5)

    def param(name, init, axes, shape):
      return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.dtype)

    self.patch_kernel = param('patch_kernel', nn.initializers.lecun_normal(), ('patch', 'embed'), (3 * c.patch_size ** 2, c.hidden_size))
    self.class_embedding = param('class_embedding', width, ('embed',), (c.hidden_size,))
    self.position_embedding = param('position_embedding', width, ('position', 'embed'), (c.num_tokens, c.hidden_size))
    self.pre_norm = layer_norm(c, self.dtype, None)
    self.layer = ClipLayer(c, self.dtype, self.attention, parent=None)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, jnp.zeros((1, 1, c.hidden_size), self.dtype))

  def __call__(self, image_bhwc, *, num_taps: int):
    """Returns the last `num_taps` hidden states, as Hugging Face's `output_hidden_states` numbers them.

    Args:
      image_bhwc: float[B, image_size, image_size, 3], normalised.
      num_taps: 1 to num_layers + 1; the last state is the output of the last layer.

    Returns:
      taps_lbid: dtype[num_taps, B, I, D], I = 1 + number of patches, class token first.

    Raises:
      UserError: more taps than hidden states, or images of another size.
    """
    c = self.config
    if not 1 <= num_taps <= c.num_layers + 1:
      raise UserError(f'{num_taps} tapped layers of a CLIP tower with {c.num_layers} layers: choose from 1 to {c.num_layers + 1} (molt.num_layers)')
    return stack.run_layers(self.layer, self.layers, self.embed(image_bhwc), start=0, stop=c.num_layers, num_taps=num_taps)[1]

  def embed(self, image_bhwc):
    """Class token and patch embeddings with positions, after the first norm, dtype[B, I, D]: the first hidden state."""
    c = self.config
    if image_bhwc.shape[1:] != (c.image_size, c.image_size, 3):
      raise UserError(f'images of shape {image_bhwc.shape[1:]} for a CLIP tower that reads {(c.image_size, c.image_size, 3)}')
    x_bid = patches(image_bhwc.astype(self.dtype), c.patch_size) @ self.patch_kernel
    first_b1d = jnp.broadcast_to(self.class_embedding, (x_bid.shape[0], 1, c.hidden_size))
    return self.pre_norm(jnp.concatenate([first_b1d, x_bid], axis=1) + self.position_embedding[None])

  def run(self, hidden_bid, *, start: int, stop: int):
    """Runs layers start..stop-1 on hidden states dtype[B, I, D]; I may differ from call to call; weights are read in place."""
    return stack.run_layers(self.layer, self.layers, hidden_bid, start=start, stop=stop)[0]
