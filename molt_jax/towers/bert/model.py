"""BERT as a text tower: every token reads the whole text, and norms follow what they are added
to.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import packing, stack
from molt_jax.towers.bert.config import BertConfig
from molt_jax.towers.encoder import dense, layer_norm
from molt_jax.towers.functions import ACTIVATIONS, key_mask, with_prefix


class BertLayer(nn.Module):
  """One encoder layer: norm(x + attention(x)), then norm(x + MLP(x)); biases everywhere.

  With a packing it takes packed tokens [G, N, D] in the place of [B, T, D]; with `keys`,
  bool[B, T] or, for each token, bool[B, T, T], only those tokens are read; with a prefix,
  (keys, values) [B, P, N, H], every token reads it too.
  """

  config: BertConfig
  dtype: Any
  attention: str
  param_dtype: Any

  @nn.compact
  def __call__(self, h_btd, lengths_b, packing=None, keys=None, *, prefix=None):
    c = self.config
    qkv = [self._heads(name)(h_btd) for name in ('q_proj', 'k_proj', 'v_proj')]
    if packing:
      qkv = [packing.unpack(x, len(lengths_b)) for x in qkv]
    mask, seen_b = key_mask(keys), lengths_b
    if prefix is not None:
      rules = {'is_causal': False, 'mask_b1ts': mask}
      qkv, mask = with_prefix(qkv, prefix, lengths_b=lengths_b, **rules)
      seen_b = None
    a_btnh = jax.nn.dot_product_attention(
      *qkv, key_value_seq_lengths=seen_b, mask=mask, implementation=self.attention
    )
    a_btnh = packing.pack(a_btnh) if packing else a_btnh
    out_axes = ('heads', 'head_dim', 'embed')
    o_proj = self._dense('o_proj', c.hidden_size, out_axes, axis=(-2, -1))
    h_btd = self._norm('attention_norm')(h_btd + o_proj(a_btnh))

    x_btf = self._dense('up_proj', c.intermediate_size, ('embed', 'mlp'))(h_btd)
    x_btf = ACTIVATIONS[c.hidden_act](x_btf)
    down_proj = self._dense('down_proj', c.hidden_size, ('mlp', 'embed'))
    return self._norm('mlp_norm')(h_btd + down_proj(x_btf))

  def _heads(self, name):
    c = self.config
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    return self._dense(name, heads, ('embed', 'heads', 'head_dim'))

  def _dense(self, name, features, axes, axis=-1):
    return dense(name, features, axes, self.dtype, self.param_dtype, axis=axis)

  def _norm(self, name):
    return layer_norm(self.config, self.dtype, self.param_dtype, name)


def _mean(last_btd: jax.Array, mask_bt: jax.Array) -> jax.Array:
  total_bd = jnp.sum(last_btd.astype(jnp.float32), axis=1, where=mask_bt[:, :, None])
  return total_bd / jnp.maximum(jnp.sum(mask_bt, axis=1), 1)[:, None]


# What makes one vector of the last hidden states, where there is no pooler.
POOLINGS = {'first': lambda last_btd, mask_bt: last_btd[:, 0], 'mean': _mean}


class Bert(nn.Module):
  """BERT encoder; RoBERTa and XLM-RoBERTa are the same but for their positions.

  Masks mark valid tokens and are right-padded. Padding never reaches a valid token; what comes out
  at padded positions is finite and means nothing. A text is the first of BERT's two segments.

  Attributes:
    config: the architecture.
    dtype: of computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: 'pool': it has the pooler that `pool` then applies.
  """

  config: BertConfig
  dtype: Any
  attention: str
  param_dtype: Any = None
  heads: tuple[str, ...] = ()
  is_causal: ClassVar[bool] = False  # Every token reads all others.

  def setup(self):
    c = self.config
    param_dtype = self.param_dtype or self.dtype

    def table(name, axis, rows):
      if stack.has_param(self, name):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, 'embed'))
        setattr(self, name, self.param(name, init, (rows, c.hidden_size), param_dtype))

    table('token_embedding', 'vocab', c.vocab_size)
    table('position_embedding', 'position', c.num_positions)
    table('type_embedding', 'segment', c.type_vocab_size)
    self.embedding_norm = layer_norm(c, self.dtype, param_dtype, None)
    self.layer = BertLayer(c, self.dtype, self.attention, param_dtype, parent=None)
    example = jnp.zeros((1, 1, c.hidden_size), self.dtype), jnp.ones(1, jnp.int32)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, *example)
    if 'pool' in self.heads:
      axes = ('embed', 'common')
      self.pooler = dense(None, c.hidden_size, axes, self.dtype, param_dtype)

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them.

    Args:
      tokens_bt: int32[B, T].
      mask_bt: bool[B, T], True for valid tokens, right-padded.
      position_gn: int32[G, N], where the valid tokens are (`packing.Packing`): padding then costs
        attention alone. None: every position is computed.
      states: which, from 0 (the embeddings) to num_layers, or from -num_layers - 1 to -1. Layers
        above the last of them do not run.

    Returns:
      dtype[len(states), B, T, D], ascending.

    Raises:
      UserError: a state that is not there, or more tokens than the model has positions.
    """
    states = stack.resolve_states(states, self.config.num_layers, 'BERT')
    self.check_length(tokens_bt.shape[1])
    how = {'start': 0, 'stop': states[-1], 'states': states}
    positions_bt = self._positions(tokens_bt)
    if position_gn is None:
      last_btd, found_sbtd = self._run(self._embed(tokens_bt, positions_bt), mask_bt, **how)
      if self.is_initializing():
        self.pool(last_btd, tokens_bt, mask_bt)
      return found_sbtd
    packed = packing.Packing.of(position_gn, tokens_bt.shape)
    entering_gnd = self._embed(packed.pack(tokens_bt), packed.pack(positions_bt))
    found_sgnd = self._run(entering_gnd, mask_bt, packing=packed, **how)[1]
    return jax.vmap(lambda x_gnd: packed.unpack(x_gnd, len(tokens_bt)))(found_sgnd)

  def check_length(self, tokens: int) -> None:
    """Raises UserError for more tokens than the model has positions."""
    if tokens > self.config.max_positions:
      raise UserError(
        f'{tokens} tokens for a BERT with {self.config.max_positions} positions: lower '
        'text.max_tokens'
      )

  def embed(self, tokens_bt):
    """Embeddings of tokens, positions and the first segment after their norm, dtype[B, T, D]: the
    first hidden state.
    """
    return self._embed(tokens_bt, self._positions(tokens_bt))

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

  def norm_tokens(self, hidden_bkd):
    """Any tokens that leave the last layer: each layer ends with a norm."""
    return hidden_bkd

  def pool(self, last_btd, tokens_bt, mask_bt):
    """One vector of each text, [B, D]: with the head 'pool' Hugging Face's `pooler_output`, else
    what `config.pooling` says.
    """
    del tokens_bt
    if 'pool' in self.heads:
      return jnp.tanh(self.pooler(last_btd[:, 0]))
    return POOLINGS[self.config.pooling](last_btd, mask_bt)

  def _positions(self, tokens_bt):
    """int32[B or 1, T], the row of each token in the table of positions."""
    padding = self.config.padding_id
    if padding is None:
      return jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32), tokens_bt.shape)
    counted_bt = (tokens_bt != padding).astype(jnp.int32)
    return padding + jnp.cumsum(counted_bt, axis=1) * counted_bt

  def _embed(self, tokens_bt, positions_bt):
    """The first hidden state of tokens at these rows of the table of positions."""
    token_btd = jnp.take(self.token_embedding, tokens_bt, axis=0, mode='clip')
    position_btd = jnp.take(self.position_embedding, positions_bt, axis=0, mode='clip')
    total_btd = token_btd + self.type_embedding[:1][None] + position_btd
    return self.embedding_norm(total_btd.astype(self.dtype))

  def _run(self, hidden_btd, mask_bt, *, packing=None, keys_bt=None, **how):
    lengths_b = stack.lengths(mask_bt)
    depth = self.config.num_layers
    return stack.run_layers(
      self.layer, self.layers, hidden_btd, lengths_b, packing, keys_bt, num_layers=depth, **how
    )
