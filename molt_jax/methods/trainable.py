"""Parameters of towers that are trained: chosen by a regex, kept apart from the frozen ones."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.features import hidden_states
from molt_jax.features.frozen import Reads
from molt_jax.towers import loading, stack
from molt_jax.towers.loading import TowerSpec

LAYERS = 'layers/'
TOWERS = 'towers'  # Parameters of towers among those that are trained.


def leaves(
  config: ml_collections.ConfigDict, modality: str, module: nn.Module
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns path -> shape of the parameters that `backbones.MODALITY.trainable` matches.

  A path is 'layers/NUMBER/NAME' for a parameter of a layer, else the parameter's own, as
  'norm/scale'.

  Raises:
    UserError: the regex is none, or matches nothing.
  """
  pattern = config.backbones[modality].trainable
  if not pattern:
    return {}
  field = f'config.backbones.{modality}.trainable'
  try:
    matches = re.compile(pattern).fullmatch
  except re.error as error:
    raise UserError(f'{field}: {pattern!r} is no regular expression ({error})') from error
  if config.backbones.quantization != 'none':
    raise UserError(
      f'{field}: {pattern!r} beside config.backbones.quantization='
      f'{config.backbones.quantization!r}, whose codes cannot be trained; give none'
    )
  every = _paths(nn.unbox(loading.abstract_params(module)))
  found = {path: x for path, x in every.items() if matches(path)}
  if not found:
    some = ', '.join(list(every)[:3])
    raise UserError(f'{field}: {pattern!r} matches no parameter of the tower ({some}, ...)')
  return found


def _paths(abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
  paths = {}
  for path, x in traverse_util.flatten_dict(abstract, sep='/').items():
    if path.startswith(LAYERS):
      for layer in range(x.shape[0]):
        one = jax.ShapeDtypeStruct(x.shape[1:], jnp.float32)
        paths[f'{LAYERS}{layer}/{path.removeprefix(LAYERS)}'] = one
    else:
      paths[path] = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  return paths


def lowest_layer(paths: Mapping[str, Any], tower: TowerSpec) -> int:
  """Returns the hidden state from which on a tower with these trained parameters must be run."""
  lowest = tower.config.num_layers
  for path in paths:
    if path.startswith(LAYERS):
      lowest = min(lowest, int(path.split('/')[1]))
    elif path.split('/')[0] in tower.family.inputs:
      return 0
  return lowest


def zeros(paths: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Returns parameters to begin with, before `take` fills them."""
  return {path: jnp.zeros(x.shape, x.dtype) for path, x in paths.items()}


def take(params: Mapping[str, jax.Array], frozen: Any, num_layers: int) -> dict[str, jax.Array]:
  """Returns the trained parameters with the values of a tower that was loaded."""
  flat = traverse_util.flatten_dict(frozen, sep='/')
  first = stack.first_layer(frozen['layers'], num_layers)
  taken = {}
  for path, old in params.items():
    name, layer = _split(path)
    value = flat[name] if layer is None else flat[name][layer - first]
    taken[path] = jax.device_put(value.astype(jnp.float32), old.sharding)
  return taken


def merge(frozen: Any, params: Mapping[str, jax.Array], num_layers: int) -> Any:
  """Returns a tower's parameters with the trained ones in their places.

  A stack of which a layer is trained is copied once per step.
  """
  if not params:
    return frozen
  flat = dict(traverse_util.flatten_dict(frozen, sep='/'))
  first = stack.first_layer(frozen['layers'], num_layers)
  for path, value in params.items():
    name, layer = _split(path)
    old = flat[name]
    value = value.astype(old.dtype)
    flat[name] = value if layer is None else old.at[layer - first].set(value)
  return traverse_util.unflatten_dict(flat, sep='/')


def _split(path: str) -> tuple[str, int | None]:
  if not path.startswith(LAYERS):
    return path, None
  _, layer, name = path.split('/', 2)
  return LAYERS + name, int(layer)


# ---- What methods do with them -------------------------------------------------------------------


def new(trained: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the part of a method's parameters that is the towers', {TOWERS: modality -> tree} or,
  where nothing of them is trained, nothing; `started` fills it.

  Args:
    trained: modality -> path -> shape, as `leaves` returns them.
  """
  nested = {}
  for modality, paths in trained.items():
    if paths:
      nested[modality] = traverse_util.unflatten_dict(zeros(paths), sep='/')
  return {TOWERS: nested} if nested else {}


def started(params: Any, frozen: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Any:
  """Returns a method's parameters, those of its towers as they were loaded."""
  if TOWERS not in params:
    return params
  taken = {}
  for modality, nested in params[TOWERS].items():
    flat = traverse_util.flatten_dict(nested, sep='/')
    flat = take(flat, frozen[modality], modules[modality].config.num_layers)
    taken[modality] = traverse_util.unflatten_dict(flat, sep='/')
  return {**params, TOWERS: taken}


def merged(module: nn.Module, frozen: Any, own: Any) -> Any:
  """Returns the parameters of a tower with those that a method trains (None: none) in place."""
  if own is None:
    return frozen
  return merge(frozen, traverse_util.flatten_dict(own, sep='/'), module.config.num_layers)


def reads(states: tuple[int, ...], trained: Mapping[str, Any], tower: TowerSpec) -> Reads:
  """Returns what is read of a tower of which these hidden states are wanted, run from its lowest
  trained layer on.
  """
  if not trained:
    return Reads(states)
  lowest = min(lowest_layer(trained, tower), tower.config.num_layers - 1)
  if lowest == 0:
    return Reads((), run_from=0)
  below = {state for state in states if state < lowest}
  return Reads(tuple(sorted(below | {lowest})), run_from=lowest)


@dataclasses.dataclass(frozen=True)
class Live:
  """A tower that is run in each step, since a part of it is trained.

  Attributes:
    modality: what it reads.
    module: it.
    reads: see `reads`.
  """

  modality: str
  module: nn.Module
  reads: Reads

  def run(
    self,
    params: Any,
    wanted: tuple[int, ...],
    stored_lbtd: jax.Array | None,
    batch: Mapping[str, jax.Array],
  ) -> jax.Array:
    """Runs it from `reads.run_from` on and returns the hidden states that are wanted, [L, B, T, D].

    Args:
      params: of the tower.
      wanted: hidden states, ascending.
      stored_lbtd: those of `reads.states`; None: it is run from its input on.
      batch: see `data.pipeline`.
    """
    module, reads = self.module, self.reads
    tower = module.bind({'params': params})
    mask_bt = hidden_states.text_mask(batch) if self.modality == 'text' else None
    if stored_lbtd is None:
      inputs = hidden_states.clean_inputs(batch, self.modality)
      entering_btd = tower.embed(inputs[0])
    else:
      entering_btd = stored_lbtd[reads.states.index(reads.run_from)].astype(module.dtype)
    above = tuple(state for state in wanted if state > reads.run_from)
    run = {'start': reads.run_from, 'stop': wanted[-1], 'states': above}
    found_lbtd = tower.run(entering_btd, mask_bt, **run)[1]
    if above and above[-1] == module.config.num_layers:
      found_lbtd = found_lbtd.at[-1].set(tower.finish(found_lbtd[-1]))
    below = [state for state in wanted if state <= reads.run_from]
    parts = [stored_lbtd[reads.states.index(state)][None] for state in below if reads.states]
    parts += [entering_btd[None]] if below and not reads.states else []
    return jnp.concatenate([*(part.astype(module.dtype) for part in parts), found_lbtd])
