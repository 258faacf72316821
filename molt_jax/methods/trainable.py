"""Parameters of towers that are trained: chosen by a regex, kept apart from the frozen ones."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.towers import loading, stack
from molt_jax.towers.loading import TowerSpec

LAYERS = 'layers/'


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
