"""Weights on disk -> parameters of the towers, one tensor at a time."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.towers import quantize
from molt_jax.towers.base import Family
from molt_jax.towers.files import WEIGHT_TYPES, TowerFiles, open_files
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.towers.tensors import Transform
from molt_jax.towers.tokenizer import Tokenizer

MOST_NAMED = 40  # Unfit tensors in one error.


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """A tower without its weights.

  Attributes:
    family: its row in `base.FAMILIES`.
    config: the architecture; `config.hidden_size` is the width of the hidden states.
    identity: {'path': as given, 'sha256': of configuration and tensors, and of 'quantization' and
      'resolution' where there is one, 'input_sha256': of what makes its input, tokenizer or image
      preprocessing}.
    tokenizer: of a text tower, else None.
    preprocess: of an image tower, else None.
    heads: what its files have above the last hidden state.
    logit_scale: what the cosines of a pair that it belongs to are multiplied by; None: its files do
      not say so.
  """

  family: Family
  config: Any
  identity: dict[str, str]
  tokenizer: Tokenizer | None
  preprocess: ImageSpec | None
  heads: tuple[str, ...] = ()
  logit_scale: float | None = None

  def make_module(self, dtype: Any, attention: str, **how: Any) -> nn.Module:
    """Returns the Linen module; `how` may have param_dtype and heads."""
    return self.family.module(self.config, jnp.dtype(dtype), attention, **how)


@dataclasses.dataclass(frozen=True)
class Tower(TowerSpec):
  """A tower with its weights: `module.apply({'params': params}, ...)`."""

  module: nn.Module = None
  params: Any = None


def describe_tower(
  path: str, *, modality: str, quantization: str = 'none', resolution: int = 0
) -> TowerSpec:
  """Reads what a tower is without loading its weights; arguments and errors as `load_tower`."""
  files = open_files(path, modality=modality, resolution=resolution)
  if files.shapes is not None:
    # Arrays are made of a configuration's sizes before its weights are loaded: so tensors that are
    # there must have them. Which are missing, loading says.
    module = make_module(files, dtype='float32', attention='xla')
    _plan(files, _flat(nn.unbox(abstract_params(module))), complete=False)
  return _describe(files, quantization)


@dataclasses.dataclass(frozen=True)
class Loading:
  """How a tower is loaded.

  Attributes:
    dtype: of computation, 'float32' or 'bfloat16'.
    attention: 'xla' or 'cudnn'.
    quantization: 'none', 'int8' or 'int4', of the layers' matrices; each is quantised as it is
      read.
    param_dtype: of weights; None: `dtype`.
    heads: what is loaded above the last hidden state, of `Family.heads`.
    first_layer: the lowest layer that will be run; what lies below it is not loaded.
    resolution: side in pixels of the images that an image tower reads; 0: its own.
  """

  dtype: Any
  attention: str = 'xla'
  quantization: str = 'none'
  param_dtype: Any = None
  heads: tuple[str, ...] = ()
  first_layer: int = 0
  resolution: int = 0


def load_tower(
  path: str, *, modality: str, shardings: Callable[[Any], Any] | None = None, **how: Any
) -> Tower:
  """Loads a tower.

  Args:
    path: Hugging Face directory or hub id, .gguf file, pkg://package/relative/path, or random:NAME.
    modality: 'image' or 'text'.
    shardings: maps the abstract parameters (boxed with their logical axes) to a pytree of
      shardings; None: the default device.
    **how: attributes of `Loading`.

  Raises:
    UserError: no such tower, a configuration that is not implemented, tensors that do not fit it
      (all of them are named), weights that are not finite or too large for the machine, no qwix.
  """
  how = Loading(**how)
  files = open_files(path, modality=modality, resolution=how.resolution)
  module = make_module(
    files,
    dtype=how.dtype,
    attention=how.attention,
    param_dtype=how.param_dtype,
    heads=how.heads,
  )
  whole = abstract_params(module)
  plan = _plan(files, _flat(nn.unbox(whole)))
  boxed = upper_layers(whole, files.family, how.first_layer)
  plan = _above(plan, _flat(nn.unbox(boxed)), how.first_layer)
  hows = quantize.plan(boxed, how.quantization)
  final = quantize.abstract_params(boxed, how.quantization)
  places = jax.tree.map(lambda _: None, nn.unbox(final)) if shardings is None else shardings(final)
  described = _describe(files, how.quantization)
  _check_memory(path, nn.unbox(final), places)
  try:
    params = _load(files, plan, nn.unbox(boxed), nn.unbox(final), places, hows)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise UserError(_too_large(path, nn.unbox(final), 'than is free')) from error
    raise
  return Tower(**vars(described), module=module, params=params)


def upper_layers(boxed: Any, family: Family, first_layer: int) -> Any:
  """Returns a tower's abstract parameters (boxed) from a layer on: without what `embed` reads and
  without the layers below.
  """
  if not first_layer:
    return boxed

  def cut(x):
    return jax.ShapeDtypeStruct((x.shape[0] - first_layer, *x.shape[1:]), x.dtype)

  kept = {name: x for name, x in boxed.items() if name not in family.inputs}
  return kept | {'layers': jax.tree.map(cut, kept['layers'])}


def _above(plan: dict[str, Any], wanted: Mapping[str, Any], first_layer: int) -> dict[str, Any]:
  """The part of a plan that makes these parameters."""
  kept = {path: row for path, row in plan.items() if path in wanted}
  return {
    path: (names[first_layer:] if path.startswith('layers/') else names, shape, transform)
    for path, (names, shape, transform) in kept.items()
  }


def _check_memory(path: str, final: Any, places: Any) -> None:
  """Raises UserError where a tower does not fit the machine; Linux would kill the process."""
  leaves, shardings = jax.tree.leaves(final), jax.tree.leaves(places)
  if jax.default_backend() != 'cpu':
    return  # Devices with a memory of their own report what does not fit.
  needed = 0
  for leaf, sharding in zip(leaves, shardings or [None] * len(leaves), strict=True):
    shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
    copies = len(sharding.addressable_devices) if sharding else 1
    needed += copies * math.prod(shape) * leaf.dtype.itemsize
  if needed > (there := total_memory()):
    raise UserError(_too_large(path, final, f'than the {there / 1e9:.1f} GB of this machine'))


def _too_large(path: str, final: Any, than: str) -> str:
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(final))
  return (
    f'{path}: the tower takes {size / 1e9:.1f} GB for each of its copies, more {than}: give a '
    'smaller one, backbones.dtype=bfloat16, backbones.quantization, or more devices in '
    'mesh.model'
  )


def total_memory() -> int:
  """Bytes of memory of this machine, or of the container that it is."""
  most = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  for limit in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
    try:
      most = min(most, int(pathlib.Path(limit).read_text()))
    except (OSError, ValueError):  # There is none, or it is 'max'.
      continue
  return most


def make_module(files: TowerFiles, *, dtype: Any, attention: str, **how: Any) -> nn.Module:
  """Returns the Linen module of a tower; `how` may have param_dtype and heads.

  Raises:
    UserError: the files have not what one of the heads needs.
  """
  lacking = [head for head in how.get('heads', ()) if head not in files.heads]
  if lacking:
    tensors = ', '.join(files.family.heads.get(head, head) for head in lacking)
    raise UserError(
      f'{files.identity["path"]}: the tower has no {tensors}, which the method reads; give a tower '
      'that was saved with it'
    )
  if how.get('param_dtype') is not None:
    how['param_dtype'] = jnp.dtype(how['param_dtype'])
  return files.family.module(files.architecture, jnp.dtype(dtype), attention, **how)


def abstract_params(module: nn.Module) -> Any:
  """Shapes, types and (boxed) logical axes of a tower's parameters; nothing is allocated."""
  if hasattr(module.config, 'image_size'):
    size = module.config.image_size
    example = (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),)
  else:
    example = (jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool))
  init = functools.partial(module.init, states=(-1,))
  return jax.eval_shape(init, jax.random.key(0), *example)['params']


def _describe(files: TowerFiles, quantization: str) -> TowerSpec:
  identity = files.identity
  if quantization != 'none':
    # Its hidden states are others: a head, or a feature store, belongs to the tower quantised so.
    content = f'{identity["sha256"]} {quantization} {quantize.SCHEMES[quantization]}'
    mixed = hashlib.sha256(content.encode()).hexdigest()
    identity = {**identity, 'sha256': mixed, 'quantization': quantization}
  if files.family.modality == 'image' and files.is_resized:
    content = f'{identity["sha256"]} resolution {files.resolution}'
    mixed = hashlib.sha256(content.encode()).hexdigest()
    identity = {**identity, 'sha256': mixed, 'resolution': str(files.resolution)}
  reads_text = files.family.modality == 'text'
  text = files.tokenizer() if reads_text else None
  image = None if reads_text else files.preprocess()
  inputs = text.sha256 if text else _sha256_of(image.content())
  if inputs:
    identity = {**identity, 'input_sha256': inputs}
  described = (files.family, files.architecture, identity, text, image, files.heads)
  scale = files.number('logit_scale')
  return TowerSpec(*described, None if scale is None else math.exp(scale))


def _sha256_of(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _load(
  files: TowerFiles,
  plan: dict[str, tuple[list[str], tuple[int, ...], Transform]],
  abstract: Any,
  final: Any,
  places: Any,
  hows: dict[str, quantize.How],
) -> Any:
  """Fills the parameters from disk; one tensor at a time is in host memory, and in full precision
  on the device.
  """
  wanted, final, places = _flat(abstract), _flat(final), _flat(places)
  flat = {}
  for path, (names, source_shape, transform) in plan.items():
    stacked = path.startswith('layers/')
    buffer = _zeros(final[path], places[path])
    shape = wanted[path].shape[1:] if stacked else wanted[path].shape
    fill = _fill(transform.reorder, shape, stacked, hows.get(path), places[path])
    for layer, name in enumerate(names):
      theirs = files.read(name, source_shape)
      theirs = transform.host(theirs) if transform.host else theirs
      # Waiting keeps a single tensor alive; the buffer is donated and filled in place.
      buffer, finite = jax.block_until_ready(fill(buffer, theirs, layer))
      if not finite:
        raise UserError(
          f'{files.identity["path"]}: {name} holds NaN or infinity: the weights are damaged; '
          'download or save them again'
        )
    flat[path] = _pack(buffer, final[path], places[path])
  return traverse_util.unflatten_dict(flat, sep='/')


def _zeros(abstract: Any, place: Any) -> Any:
  """An empty parameter. Of int4 it is int8 until it is full: an update of packed numbers would
  unpack all of them each time.
  """

  def zeros(x):
    return jnp.zeros(x.shape, jnp.int8 if x.dtype == jnp.int4 else x.dtype)

  return jax.jit(lambda: jax.tree.map(zeros, abstract), out_shardings=place)()


def _pack(buffer: Any, abstract: Any, place: Any) -> Any:
  """The full buffer in its final types."""
  if all(
    x.dtype == to.dtype
    for x, to in zip(jax.tree.leaves(buffer), jax.tree.leaves(abstract), strict=True)
  ):
    return buffer
  return jax.jit(
    lambda b: jax.tree.map(lambda x, to: x.astype(to.dtype), b, abstract), out_shardings=place
  )(buffer)


@functools.cache
def _fill(
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

  return jax.jit(fill, donate_argnums=0, out_shardings=(place, None))


def _plan(
  files: TowerFiles, wanted: dict[str, jax.ShapeDtypeStruct], *, complete: bool = True
) -> dict[str, tuple[list[str], tuple[int, ...], Transform]]:
  """Returns our path -> (Hugging Face tensors, one a layer, their shape, their transform).

  Args:
    files: what there is.
    wanted: our parameters.
    complete: whether every tensor must be there, and no other.

  Raises:
    UserError: names every tensor that is missing, unknown or of the wrong shape or type.
  """
  plan, wrong = _sources(files, wanted), []
  if files.shapes is None:
    return plan
  for names, expected, _ in plan.values():
    wrong += [
      f'{n} has shape {files.shapes[n]} instead of {expected}'
      for n in names
      if files.shapes.get(n, expected) != expected
    ]
    wrong += [
      f'{n} has type {files.types[n]} instead of {", ".join(WEIGHT_TYPES)}'
      for n in names
      if n in files.types
    ]
  used = {n for names, _, _ in plan.values() for n in names}
  missing = sorted(used - set(files.shapes))
  others = [n for n in set(files.shapes) - used if math.prod(files.shapes[n])]
  unknown = sorted(n for n in others if not re.fullmatch(files.family.ignored, n))
  faults = []
  for fault, names in (('missing', missing), ('unknown', unknown)):
    if names and complete:
      faults.append(f'{fault}: {", ".join(_by_layer(names))}')
  faults += wrong[:MOST_NAMED] + [f'{len(wrong) - MOST_NAMED} more'] * (len(wrong) > MOST_NAMED)
  if faults:
    raise UserError(
      f'{files.identity["path"]}: the tensors do not fit the configuration ({files.architecture}); '
      + '; '.join(faults)
    )
  return plan


def _sources(
  files: TowerFiles, wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, tuple[list[str], tuple[int, ...], Transform]]:
  """What `_plan` returns, of tensors that may not be there."""
  family, found = files.family, {}
  for template, (path, stored) in family.tensors.items():
    if path not in wanted:
      continue
    transform = stored
    if path in family.resampled:
      transform = family.resampled[path](stored, files.architecture)
    shape = wanted[path].shape
    stacked = path.startswith('layers/')
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    expected = transform.source_shape(shape[1:] if stacked else shape)
    found[path] = names, expected, transform
  return found


def hugging_face_tensors(params: Any, family: Family) -> dict[str, np.ndarray]:
  """The way back from `load_tower`: Hugging Face tensor name -> tensor, in Hugging Face's
  orientation and without a prefix.

  Args:
    params: a tower's parameters, unboxed, not quantised.
    family: of the tower.
  """
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  out = {}
  for template, (path, transform) in family.tensors.items():
    if path in flat:
      for layer, w in enumerate(flat[path] if path.startswith('layers/') else flat[path][None]):
        out[template.format(layer)] = np.ascontiguousarray(
          transform.restore(w, transform.source_shape(w.shape))
        )
  return out


def _by_layer(names: list[str]) -> list[str]:
  """Joins names that differ in the layer only: 'layers.*.x (4)'."""
  counts = Counter(re.sub(r'\d+', '*', n, count=1) for n in names)
  return [n if count == 1 else f'{n} ({count})' for n, count in counts.items()]
