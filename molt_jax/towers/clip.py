"""CLIP's two transformers: all tokens of each layer (for an image tower class token and patches),
and the pooled token; no projection into a common space, but for a text tower that Hugging Face
saved with one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import keys, stack

# What Hugging Face reads where a vision config is silent: values equal to these are left out when a
# CLIPConfig is saved.
DEFAULTS = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'num_channels': 3,
  'image_size': 224,
  'patch_size': 32,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
}
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
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the CLIP vision config'
  ) -> 'ClipVisionConfig':
    """Reads the dict of a Hugging Face config.json, of a CLIPModel (its vision_config) or a
    CLIPVisionModel.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    c = _part(config, 'vision', keys.CLIP_VISION, DEFAULTS, where)
    if c['image_size'] < c['patch_size']:
      raise UserError(
        f'{where} has image_size = {c["image_size"]}, which must be at least patch_size = '
        f'{c["patch_size"]}'
      )
    return cls(
      hidden_size=c['hidden_size'],
      intermediate_size=c['intermediate_size'],
      num_layers=c['num_hidden_layers'],
      num_heads=c['num_attention_heads'],
      image_size=c['image_size'],
      patch_size=c['patch_size'],
      hidden_act=c['hidden_act'],
      layer_norm_eps=c['layer_norm_eps'],
    )


def _part(
  config: Mapping[str, Any], name: str, table: keys.Table, defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """A tower's own configuration, or its part of a CLIPModel's; defaults where it is silent."""
  kind = f'clip_{name}_model'
  part = dict(config)
  if config.get('model_type', 'clip') == 'clip' and f'{name}_config' in config:
    keys.check(config, keys.CLIP, where)
    part = {'model_type': kind, **(config[f'{name}_config'] or {})}
    where = f'{where}: {name}_config'
    if (over := config.get(f'{name}_config_dict')) is not None:
      # Of early files; it overrides, and where it is silent, its defaults do.
      keys.check(over, table, f'{where}_dict')
      part |= {**defaults, **over}
  keys.check({'model_type': None, **part}, table, where)
  c = {**defaults, **{k: v for k, v in part.items() if v is not None}}
  if c['hidden_size'] % c['num_attention_heads']:
    raise UserError(
      f'{where} has num_attention_heads = {c["num_attention_heads"]}, which must divide '
      f'hidden_size = {c["hidden_size"]}'
    )
  return c


def patches(image_bhwc: jax.Array, size: int) -> jax.Array:
  """Cuts images into flattened patches [B, patches, size * size * channels]; an incomplete last row
  or column is dropped.
  """
  b, h, w, c = image_bhwc.shape
  rows, columns = h // size, w // size
  x = image_bhwc[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
  return x.swapaxes(2, 3).reshape(b, rows * columns, size * size * c)


# What Hugging Face reads where a text config is silent.
TEXT_DEFAULTS = {
  'vocab_size': 49408,
  'hidden_size': 512,
  'intermediate_size': 2048,
  'num_hidden_layers': 12,
  'num_attention_heads': 8,
  'max_position_embeddings': 77,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
  'eos_token_id': 49407,
  'projection_dim': 512,
}
# The id that configs before the tokenizer's own was written down have; the end of a text was then
# found as the largest id of its row.
OLD_EOS_ID = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Architecture of a CLIP text transformer. `eos_token_id` None: the end of a text is its largest
  token id.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  hidden_act: str
  layer_norm_eps: float
  eos_token_id: int | None
  projection_size: int

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the CLIP text config'
  ) -> 'ClipTextConfig':
    """Reads the dict of a Hugging Face config.json, of a CLIPModel (its text_config) or a
    CLIPTextModel(WithProjection).

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    c = _part(config, 'text', keys.CLIP_TEXT, TEXT_DEFAULTS, where)
    if config.get('model_type', 'clip') == 'clip':  # A CLIPModel's own is what its projection has.
      c['projection_dim'] = config.get('projection_dim') or TEXT_DEFAULTS['projection_dim']
    eos = c['eos_token_id']
    if eos != OLD_EOS_ID and eos >= c['vocab_size']:
      raise UserError(
        f'{where} has eos_token_id = {eos}, but vocab_size = {c["vocab_size"]}: no text would end'
      )
    return cls(
      vocab_size=c['vocab_size'],
      hidden_size=c['hidden_size'],
      intermediate_size=c['intermediate_size'],
      num_layers=c['num_hidden_layers'],
      num_heads=c['num_attention_heads'],
      max_positions=c['max_position_embeddings'],
      hidden_act=c['hidden_act'],
      layer_norm_eps=c['layer_norm_eps'],
      eos_token_id=None if eos == OLD_EOS_ID else eos,
      projection_size=c['projection_dim'],
    )


class ClipLayer(nn.Module):
  """One encoder layer: x + attention(norm(x)), then x + MLP(norm(x)); biases everywhere. With
  lengths, attention is causal and masks padding.
  """

  config: ClipVisionConfig | ClipTextConfig
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, h_bid, lengths_b=None):
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)

    def dense(name, features, axes, axis=-1):
      num_out = len(features) if isinstance(features, tuple) else 1
      return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=self.dtype,
        param_dtype=self.dtype,
        name=name,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-num_out:]),
      )

    x_bid = layer_norm(c, self.dtype, 'attention_norm')(h_bid)
    q_binh, k_binh, v_binh = (
      dense(name, heads, ('embed', 'heads', 'head_dim'))(x_bid)
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    a_binh = jax.nn.dot_product_attention(
      q_binh,
      k_binh,
      v_binh,
      is_causal=lengths_b is not None,
      key_value_seq_lengths=lengths_b,
      implementation=self.attention,
    )
    h_bid += dense('o_proj', c.hidden_size, ('heads', 'head_dim', 'embed'), axis=(-2, -1))(a_binh)

    x_bid = layer_norm(c, self.dtype, 'mlp_norm')(h_bid)
    x_bif = ACTIVATIONS[c.hidden_act](
      dense('up_proj', c.intermediate_size, ('embed', 'mlp'))(x_bid)
    )
    return h_bid + dense('down_proj', c.hidden_size, ('mlp', 'embed'))(x_bif)


def layer_norm(config: ClipVisionConfig | ClipTextConfig, dtype: Any, name: str) -> nn.LayerNorm:
  """LayerNorm with float32 statistics by the two-pass formula (the fast one cancels on outlier
  channels).
  """
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    param_dtype=dtype,
    use_fast_variance=False,
    name=name,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
  )


class ClipVision(nn.Module):
  """CLIP vision transformer without projection.

  Attributes:
    config: the architecture.
    dtype: of weights and computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    with_pool: whether it has the final norm, which only `pool` reads.
  """

  config: ClipVisionConfig
  dtype: Any
  attention: str
  with_pool: bool = False

  def setup(self):
    c = self.config
    width = nn.initializers.normal(c.hidden_size**-0.5)

    def param(name, init, axes, shape):
      return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.dtype)

    self.patch_kernel = param(
      'patch_kernel',
      nn.initializers.lecun_normal(),
      ('patch', 'embed'),
      (3 * c.patch_size**2, c.hidden_size),
    )
    self.class_embedding = param('class_embedding', width, ('embed',), (c.hidden_size,))
    self.position_embedding = param(
      'position_embedding', width, ('position', 'embed'), (c.num_tokens, c.hidden_size)
    )
    self.pre_norm = layer_norm(c, self.dtype, None)
    self.layer = ClipLayer(c, self.dtype, self.attention, parent=None)
    self.layers = stack.layer_params(
      self, self.layer, c.num_layers, jnp.zeros((1, 1, c.hidden_size), self.dtype)
    )
    if self.with_pool:
      self.post_norm = layer_norm(c, self.dtype, None)

  def __call__(self, image_bhwc, *, num_taps: int):
    """Returns the last `num_taps` hidden states, as Hugging Face's `output_hidden_states` numbers
    them.

    Args:
      image_bhwc: float[B, image_size, image_size, 3], normalised.
      num_taps: 1 to num_layers + 1; the last state is the output of the last layer.

    Returns:
      taps_lbid: dtype[num_taps, B, I, D], I = 1 + number of patches, class token first.

    Raises:
      UserError: more taps than hidden states, or images of another size.
    """
    c = self.config
    stack.check_taps(num_taps, c.num_layers, 'CLIP tower')
    h_bid, taps_lbid = stack.run_layers(
      self.layer, self.layers, self.embed(image_bhwc), start=0, stop=c.num_layers, num_taps=num_taps
    )
    if self.with_pool and self.is_initializing():
      self.post_norm(h_bid)
    return taps_lbid

  def pool(self, hidden_bid):
    """The class token of the last hidden states after the final norm, dtype[B, D]: Hugging Face's
    `pooler_output`. Only with `with_pool`.
    """
    return self.post_norm(hidden_bid[:, 0])

  def embed(self, image_bhwc):
    """Class token and patch embeddings with positions, after the first norm, dtype[B, I, D]: the
    first hidden state.
    """
    c = self.config
    if image_bhwc.shape[1:] != (c.image_size, c.image_size, 3):
      raise UserError(
        f'images of shape {image_bhwc.shape[1:]} for a CLIP tower that reads '
        f'{(c.image_size, c.image_size, 3)}'
      )
    x_bid = patches(image_bhwc.astype(self.dtype), c.patch_size) @ self.patch_kernel
    first_b1d = jnp.broadcast_to(self.class_embedding, (x_bid.shape[0], 1, c.hidden_size))
    return self.pre_norm(
      jnp.concatenate([first_b1d, x_bid], axis=1) + self.position_embedding[None]
    )

  def run(self, hidden_bid, *, start: int, stop: int):
    """Runs layers start..stop-1 on hidden states dtype[B, I, D]; I may differ from call to call;
    weights are read in place.
    """
    return stack.run_layers(self.layer, self.layers, hidden_bid, start=start, stop=stop)[0]


class ClipText(nn.Module):
  """CLIP text transformer.

  Masks mark valid tokens and are right-padded. Padding never reaches a valid token; what comes out
  at padded positions is finite and means nothing.

  Attributes:
    config: the architecture.
    dtype: of weights and computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    with_projection: whether it has the projection, which only `projected` reads.
  """

  config: ClipTextConfig
  dtype: Any
  attention: str
  with_projection: bool = False

  def setup(self):
    c = self.config

    def param(name, axes, shape, scale):
      return self.param(
        name, nn.with_logical_partitioning(nn.initializers.normal(scale), axes), shape, self.dtype
      )

    self.token_embedding = param(
      'token_embedding', ('vocab', 'embed'), (c.vocab_size, c.hidden_size), 0.02
    )
    self.position_embedding = param(
      'position_embedding', ('position', 'embed'), (c.max_positions, c.hidden_size), 0.01
    )
    self.layer = ClipLayer(c, self.dtype, self.attention, parent=None)
    example = jnp.zeros((1, 1, c.hidden_size), self.dtype), jnp.ones(1, jnp.int32)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    self.final_norm = layer_norm(c, self.dtype, None)
    if self.with_projection:
      self.projection = param(
        'projection', ('embed', 'common'), (c.hidden_size, c.projection_size), c.hidden_size**-0.5
      )

  def __call__(self, tokens_bt, mask_bt, *, num_taps: int):
    """Returns the last `num_taps` hidden states, as Hugging Face's `output_hidden_states` numbers
    them (the last one before the final norm).

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      num_taps: 1 to num_layers + 1; the last state is the output of the last layer.

    Returns:
      taps_lbtd: dtype[num_taps, B, T, D].

    Raises:
      UserError: more taps than hidden states, or more tokens than the model has positions.
    """
    c = self.config
    stack.check_taps(num_taps, c.num_layers, 'CLIP text tower')
    if tokens_bt.shape[1] > c.max_positions:
      raise UserError(
        f'{tokens_bt.shape[1]} tokens for a CLIP text tower with {c.max_positions} positions: '
        'lower text.max_tokens'
      )
    h_btd, taps_lbtd = stack.run_layers(
      self.layer,
      self.layers,
      self.embed(tokens_bt),
      _lengths(mask_bt),
      start=0,
      stop=c.num_layers,
      num_taps=num_taps,
    )
    if self.is_initializing():
      self.final_norm(h_btd)
    return taps_lbtd

  def embed(self, tokens_bt):
    """Token and position embeddings, dtype[B, T, D]: the first hidden state."""
    return (
      jnp.take(self.token_embedding, tokens_bt, axis=0, mode='clip')
      + self.position_embedding[None, : tokens_bt.shape[1]]
    )

  def run(self, hidden_btd, mask_bt, *, start: int, stop: int):
    """Runs layers start..stop-1 on hidden states dtype[B, T, D]; T may differ from call to call;
    weights are read in place.
    """
    return stack.run_layers(
      self.layer, self.layers, hidden_btd, _lengths(mask_bt), start=start, stop=stop
    )[0]

  def pool(self, hidden_btd, tokens_bt):
    """The end-of-text token of the last hidden states after the final norm, dtype[B, D]: Hugging
    Face's `pooler_output`.

    That token is the first one with `eos_token_id` (the first token where a text has none), or of
    the largest id where the config has None.
    """
    end_b = jnp.argmax(
      tokens_bt if self.config.eos_token_id is None else tokens_bt == self.config.eos_token_id,
      axis=1,
    )
    return self.final_norm(jnp.take_along_axis(hidden_btd, end_b[:, None, None], axis=1)[:, 0])

  def pooled(self, tokens_bt, mask_bt):
    """Runs the tower and pools, dtype[B, D]; arguments as `__call__`."""
    return self.pool(self(tokens_bt, mask_bt, num_taps=1)[0], tokens_bt)

  def projected(self, tokens_bt, mask_bt):
    """The pooled token in CLIP's common space, dtype[B, projection_size]: Hugging Face's
    `text_embeds`. Only with `with_projection`.
    """
    return self.pooled(tokens_bt, mask_bt) @ self.projection


def _lengths(mask_bt):
  return jnp.maximum(
    mask_bt.sum(axis=1, dtype=jnp.int32), 1
  )  # A row without tokens attends to its first position and stays finite.
