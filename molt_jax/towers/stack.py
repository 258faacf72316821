"""A stack of equal layers, run from layer a to layer b without copying weights.

Every parameter of one layer is stored once for all layers, on a leading 'layers' axis.
`jax.lax.scan` runs over layer *indices*, and the body reads its slice of the (loop-invariant)
stack. Scanning over the stack itself, as `nn.scan` does, would copy the slice a..b before the loop.
Compile time does not depend on depth.

Hidden states are numbered as Hugging Face's `output_hidden_states` numbers them: state i enters
layer i, and state `num_layers` leaves the last layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import quantize

# Differentiation (methods train what they insert between frozen layers) must not keep each layer's
# slice of the weights, scaled back or not, as a residual: that would be a second copy of the model.
# Products are kept; slices are read again and what is cheap is computed again.
_KEPT = jax.checkpoint_policies.dots_saveable


def resolve_states(states: Sequence[int], num_layers: int, tower: str) -> tuple[int, ...]:
  """Returns hidden states by number, ascending; negative ones count from the last, which is -1.

  Raises:
    UserError: none at all, one twice, or one that a tower of `num_layers` layers does not have.
  """
  found = sorted(state + num_layers + 1 if state < 0 else state for state in states)
  legal = found and found[0] >= 0 and found[-1] <= num_layers and len(set(found)) == len(found)
  if not legal:
    raise UserError(
      f'hidden states {list(states)} of a {tower} with {num_layers} layers: choose different ones '
      f'from 0 to {num_layers} (config.molt.layers)'
    )
  return tuple(found)


def layer_params(module: nn.Module, layer: nn.Module, num_layers: int, *example: Any) -> Any:
  """Returns the stacked parameters of `num_layers` copies of `layer`, creating them as `module`'s
  parameter 'layers' on initialisation.

  Args:
    module: the bound module that owns the stack.
    layer: an unbound module (parent=None) of one layer, with an attribute `attention`.
    num_layers: depth of the stack.
    *example: arguments that `layer` can be initialised with.
  """

  def init(key):
    # cuDNN's attention has no vmap, and no parameter depends on how attention is computed.
    one = layer.clone(attention='xla')
    keys = jax.random.split(key, num_layers)
    params = jax.vmap(lambda k: one.init(k, *example)['params'])(keys)
    return nn.meta.add_axis(params, 0, {nn.PARTITION_NAME: 'layers'})

  if module.is_initializing() and not module.has_variable('params', 'layers'):
    module.param('layers', init)
  return nn.unbox(module.get_variable('params', 'layers'))


def has_param(module: nn.Module, name: str) -> bool:
  """Whether a parameter is to be made, or is there: of a tower that is run from an upper layer on,
  what lies below is not loaded.
  """
  return module.is_initializing() or module.has_variable('params', name)


def first_layer(params: Any, num_layers: int) -> int:
  """Returns the number of the first layer of a stack of parameters, which may lack lower ones."""
  return num_layers - jax.tree.leaves(params)[0].shape[0]


def run_layers(
  layer: nn.Module,
  params: Any,
  h_btd: jax.Array,
  *args: Any,
  num_layers: int,
  start: int,
  stop: int,
  states: Sequence[int] = (),
  per_layer: Mapping[str, jax.Array] | None = None,
  before: Callable[[jax.Array, Any], jax.Array] | None = None,
  inserts: Any = None,
  additions: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs layers start..stop-1 of a stack on hidden states.

  Args:
    layer: an unbound module of one layer, called as layer(h_btd, *args, **own).
    params: stacked parameters, as `layer_params` returns them, or those of the last layers alone.
    h_btd: hidden states that enter layer `start`.
    *args: what every layer reads besides the hidden states.
    num_layers: depth of the whole stack.
    start, stop: range of layers; start == stop leaves h_btd as it is.
    states: which of the states start..stop to return as well, ascending.
    per_layer: in what layers differ besides their parameters, arrays with a leading axis of
      num_layers; `own` are a layer's slices of them.
    before: called before each layer as before(h_btd, insert), where `insert` is the layer's slice
      of `inserts`; returns what enters the layer, of the same shape. Methods put their tokens in
      the place of those of the layer below by it.
    inserts: arrays with a leading axis of stop - start layers.
    additions: what layers read of a method, arrays with a leading axis of stop - start layers;
      `own` are a layer's slices of them too. 'prefix': keys and values [layers, B, P, K, H] in
      front of the layer's own, which every token reads.

  Returns:
    (hidden states that leave layer stop - 1, states_sbtd: the states that were asked for).
  """
  first = first_layer(params, num_layers)
  slots = _slots(states, start, stop)

  def body(carry, i):
    h_btd, states_sbtd = carry
    if before is not None:
      h_btd = before(h_btd, _at(inserts, i))
    one, own = _at(params, i + (start - first)), _at(per_layer or {}, i + start)
    own |= _at(additions or {}, i)
    h_btd = layer.apply({'params': quantize.dequantize(one)}, h_btd, *args, **own)
    if states:
      states_sbtd = jax.lax.dynamic_update_index_in_dim(states_sbtd, h_btd, slots[i + 1], 0)
    return (h_btd, states_sbtd), None

  body = jax.checkpoint(body, prevent_cse=False, policy=_KEPT)
  states_sbtd = jnp.broadcast_to(h_btd, (len(states), *h_btd.shape))
  return jax.lax.scan(body, (h_btd, states_sbtd), jnp.arange(stop - start))[0]


def _at(tree: Any, i: jax.Array) -> Any:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _slots(states: Sequence[int], start: int, stop: int) -> jax.Array:
  """Returns where each of the states start..stop is put, int32; one that is not asked for lands in
  the slot of the next one, which overwrites it.
  """
  slots = np.searchsorted(np.asarray(states, int), np.arange(start, stop + 1))
  return jnp.asarray(np.minimum(slots, max(len(states) - 1, 0)), jnp.int32)


def lengths(mask_bt: jax.Array) -> jax.Array:
  """Valid tokens of each example, int32[B], at least 1: an example without tokens attends to its
  first position and stays finite.
  """
  return jnp.maximum(mask_bt.sum(axis=1, dtype=jnp.int32), 1)


def insert_behind(
  h_btd: jax.Array, lengths_b: jax.Array, inserted_bkd: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Puts K tokens behind the last valid token of each example, so that in a causal tower they read
  the whole text.

  Args:
    h_btd: right-padded hidden states.
    lengths_b: int32[B], valid tokens of each example.
    inserted_bkd: the tokens.

  Returns:
    (hidden states [B, T + K, D], int32[B], the lengths with the inserted tokens). Position p of an
    example of n tokens is token p of the text for p < n, inserted token p - n for n <= p < n + K,
    and padding after.
  """
  t, k = h_btd.shape[1], inserted_bkd.shape[1]
  both = jnp.concatenate([h_btd, inserted_bkd.astype(h_btd.dtype)], axis=1)
  return jnp.take_along_axis(both, _sources(lengths_b, t, k)[:, :, None], axis=1), lengths_b + k


def _sources(lengths_b: jax.Array, t: int, k: int) -> jax.Array:
  """int32[B, T + K], where in concat([text, inserted]) each position's token comes from."""
  position_p = jnp.arange(t + k, dtype=jnp.int32)[None]
  behind_bp = position_p - lengths_b[:, None]
  return jnp.where(
    behind_bp < 0, position_p, jnp.where(behind_bp < k, t + behind_bp, position_p - k)
  )


def replace_behind(h_bpd: jax.Array, text_lengths_b: jax.Array, new_bkd: jax.Array) -> jax.Array:
  """Puts other tokens in the place of those that `insert_behind` inserted."""
  position_p = jnp.arange(h_bpd.shape[1], dtype=jnp.int32)[None]
  behind_bp = position_p - text_lengths_b[:, None]
  inserted_bp = (behind_bp >= 0) & (behind_bp < new_bkd.shape[1])
  index_bp = jnp.clip(behind_bp, 0, new_bkd.shape[1] - 1)
  new_bpd = jnp.take_along_axis(new_bkd.astype(h_bpd.dtype), index_bp[:, :, None], axis=1)
  return jnp.where(inserted_bp[:, :, None], new_bpd, h_bpd)


def read_behind(h_bpd: jax.Array, text_lengths_b: jax.Array, count: int) -> jax.Array:
  """Returns the tokens that `insert_behind` inserted, [B, K, D]."""
  index_bk = text_lengths_b[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
  return jnp.take_along_axis(h_bpd, index_bk[:, :, None], axis=1)
