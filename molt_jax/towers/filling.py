"""Tensors on disk -> parameters on devices, one at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.runtime import compiling
from molt_jax.towers import quantize
from molt_jax.towers.tensor_plan import Plan, flat
from molt_jax.towers.tower_files import TowerFiles


def fill(
  files: TowerFiles,
  plan: Plan,
  abstract: Any,
  final: Any,
  places: Any,
  hows: dict[str, quantize.How],
) -> Any:
  """Fills the parameters from disk; one tensor at a time is in host memory, and in full precision
  on the device.
  """
  wanted, final, places = flat(abstract), flat(final), flat(places)
  filled = {}
  for path, row in plan.items():
    stacked = path.startswith('layers/')
    buffer = _zeros(final[path], places[path])
    shape = wanted[path].shape[1:] if stacked else wanted[path].shape
    put = _compiled(row.transform.reorder, shape, stacked, hows.get(path), places[path])
    for layer, name in enumerate(row.names):
      theirs = files.read(name, row.shape)
      theirs = row.transform.host(theirs) if row.transform.host else theirs
      # Waiting keeps a single tensor alive; the buffer is donated and filled in place.
      buffer, finite = jax.block_until_ready(put(buffer, theirs, layer))
      if not finite:
        raise UserError(
          f'{files.identity["path"]}: {name} holds NaN or infinity: the weights are damaged; '
          'download or save them again'
        )
    filled[path] = _pack(buffer, final[path], places[path])
  return traverse_util.unflatten_dict(filled, sep='/')


def _zeros(abstract: Any, place: Any) -> Any:
  """An empty parameter. Of int4 it is int8 until it is full: an update of packed numbers would
  unpack all of them each time.
  """
  leaves, tree = jax.tree.flatten(abstract)
  places = jax.tree.leaves(place) or [None] * len(leaves)
  empty = [
    jnp.zeros(x.shape, jnp.int8 if x.dtype == jnp.int4 else x.dtype, device=where)
    for x, where in zip(leaves, places, strict=True)
  ]
  return jax.tree.unflatten(tree, empty)


def _pack(buffer: Any, abstract: Any, place: Any) -> Any:
  """The full buffer in its final types."""
  if all(
    x.dtype == to.dtype
    for x, to in zip(jax.tree.leaves(buffer), jax.tree.leaves(abstract), strict=True)
  ):
    return buffer
  return compiling.jit(
    lambda b: jax.tree.map(lambda x, to: x.astype(to.dtype), b, abstract), out_shardings=place
  )(buffer)


@functools.cache
def _compiled(
  reorder: Callable[[jax.Array], jax.Array],
  shape: tuple[int, ...],
  stacked: bool,
  how: quantize.How | None,
  place: Any,
):
  """Compiled: (parameter, tensor, layer) -> parameter with the tensor in it, whether it is finite.

  The tensor is reordered, and quantised where its parameter is.
  """

  def fill(buffer, w, layer):
    new = reorder(w).reshape(shape)
    if how is None:  # A number can be too large for the type in which it is computed with.
      new = new.astype(buffer.dtype)
    finite = jnp.isfinite(new).all()
    new = how.quantize(new) if how else new
    if stacked:
      put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
      new = jax.tree.map(lambda old, one: put(old, one.astype(old.dtype)), buffer, new)
    return new, finite

  return compiling.jit(fill, donate_argnums=0, out_shardings=(place, None))
