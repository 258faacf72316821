"""CLIP's text transformer."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import packing, stack
from molt_jax.towers.clip.config import ClipTextConfig
from molt_jax.towers.encoder import EncoderLayer, layer_norm


class ClipText(nn.Module):
  """CLIP text transformer; attention is causal.

  Masks mark valid tokens and are right-padded. Padding never reaches a valid token; what comes out
  at padded positions is finite and means nothing.

  Attributes:
    config: the architecture.
    dtype: of computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: 'projection': it has the matrix into CLIP's common space that `project` reads.
  """

  config: ClipTextConfig
  dtype: Any
  attention: str
  param_dtype: Any = None
  heads: tuple[str, ...] = ()
  is_causal: ClassVar[bool] = True  # No token reads what stands behind it.
  title: ClassVar[str] = 'CLIP text tower'

  def setup(self):
    c = self.config
    param_dtype = self.param_dtype or self.dtype

    def param(name, axes, shape, scale):
      if stack.has_param(self, name):
        init = nn.with_logical_partitioning(nn.initializers.normal(scale), axes)
        setattr(self, name, self.param(name, init, shape, param_dtype))

    param('token_embedding', ('vocab', 'embed'), (c.vocab_size, c.hidden_size), 0.02)
    param('position_embedding', ('position', 'embed'), (c.max_positions, c.hidden_size), 0.01)
    self.layer = EncoderLayer(c, self.dtype, self.attention, param_dtype, parent=None)
    example = jnp.zeros((1, 1, c.hidden_size), self.dtype), jnp.ones(1, jnp.int32)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    self.final_norm = layer_norm(c, self.dtype, param_dtype, None)
    if 'projection' in self.heads:
      self.projection = self._make_projection(param_dtype)

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them (the
    last one before the final norm).

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      position_gn: int32[G, N], where the valid tokens are (`packing.Packing`): padding then costs
        attention alone. None: every position is computed.
      states: which, from 0 to num_layers, or from -num_layers - 1 to -1. Layers above the last of
        them do not run.

    Returns:
      dtype[len(states), B, T, D], ascending.

    Raises:
      UserError: a state that is not there, or more tokens than the model has positions.
    """
    states = stack.resolve_states(states, self.config.num_layers, self.title)
    self.check_length(tokens_bt.shape[1])
    how = {'start': 0, 'stop': states[-1], 'states': states}
    hidden_btd = self.embed(tokens_bt)
    if position_gn is None:
      last_btd, found_sbtd = self._run(hidden_btd, mask_bt, **how)
      if self.is_initializing():
        pooled_bd = self.pool(last_btd, tokens_bt)
        if 'projection' in self.heads:
          self.project(pooled_bd)
      return found_sbtd
    packed = packing.Packing.of(position_gn, tokens_bt.shape)
    found_sgnd = self._run(packed.pack(hidden_btd), mask_bt, packing=packed, **how)[1]
    return jax.vmap(lambda x_gnd: packed.unpack(x_gnd, len(tokens_bt)))(found_sgnd)

  def check_length(self, tokens: int) -> None:
    """Raises UserError for more tokens than the model has positions."""
    if tokens > self.config.max_positions:
      raise UserError(
        f'{tokens} tokens for a CLIP text tower with {self.config.max_positions} positions: lower '
        'text.max_tokens'
      )

  def embed(self, tokens_bt):
    """Token and position embeddings, dtype[B, T, D]: the first hidden state."""
    token_btd = jnp.take(self.token_embedding, tokens_bt, axis=0, mode='clip')
    position_1td = self.position_embedding[None, : tokens_bt.shape[1]]
    return token_btd.astype(self.dtype) + position_1td.astype(self.dtype)

  def run(
    self, hidden_btd, mask_bt, *, start, stop, states=(), positions_bt=None, keys_bt=None, **hook
  ):
    """Runs layers start..stop-1 on hidden states dtype[B, T, D]; T may differ from call to call;
    weights are read in place.

    Args:
      hidden_btd: what enters layer `start`.
      mask_bt: bool[B, T], right-padded.
      start, stop, states: see `stack.run_layers`.
      positions_bt: not read: positions are in the first hidden state.
      keys_bt: bool[B, T], the tokens that may be read, or bool[B, T, T], by each of them;
        None: all valid ones.
      **hook: its `before`, `inserts` and `additions`.

    Returns:
      (hidden states dtype[B, T, D], states dtype[len(states), B, T, D]).
    """
    del positions_bt
    how = {'start': start, 'stop': stop, 'states': states, 'keys_bt': keys_bt}
    return self._run(hidden_btd, mask_bt, **how, **hook)

  def finish(self, hidden_btd):
    """What makes the last hidden state of what leaves the last layer: nothing."""
    return hidden_btd

  def end_of_text(self, tokens_bt):
    """int32[B], the position of the end-of-text token: the first with `eos_token_id` (the first
    token where a text has none), or of the largest id where the config has None.
    """
    end = self.config.eos_token_id
    return jnp.argmax(tokens_bt if end is None else tokens_bt == end, axis=1)

  def pool(self, hidden_btd, tokens_bt, mask_bt=None):
    """The end-of-text token of the last hidden states after the final norm, dtype[B, D]: Hugging
    Face's `pooler_output`. Without tokens (of stored hidden states) it is the last valid one.
    """
    end_b = stack.lengths(mask_bt) - 1 if tokens_bt is None else self.end_of_text(tokens_bt)
    end_b11 = end_b[:, None, None]
    return self.final_norm(jnp.take_along_axis(hidden_btd, end_b11, axis=1)[:, 0])

  def norm_tokens(self, hidden_bkd):
    """Any tokens of the last hidden states after the final norm."""
    return self.final_norm(hidden_bkd)

  def project(self, pooled_bd):
    """What `pool` returned in CLIP's common space, dtype[B, projection_size]: Hugging Face's
    `text_embeds`. Only with the head 'projection'.
    """
    return pooled_bd @ self.projection.astype(self.dtype)

  def _make_projection(self, param_dtype):
    init = nn.initializers.normal(self.config.hidden_size**-0.5)
    init = nn.with_logical_partitioning(init, ('embed', 'common'))
    shape = self.config.hidden_size, self.config.projection_size
    return self.param('projection', init, shape, param_dtype)

  def _run(self, hidden_btd, mask_bt, *, packing=None, keys_bt=None, **how):
    inputs = stack.lengths(mask_bt), keys_bt, None, packing
    depth = self.config.num_layers
    return stack.run_layers(self.layer, self.layers, hidden_btd, *inputs, num_layers=depth, **how)
