"""Weights on disk -> parameters of the towers, one tensor at a time."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import quantize, tensor_plan
from molt_jax.towers.base import Family
from molt_jax.towers.files import open_files
from molt_jax.towers.filling import fill
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.towers.tensor_plan import flat
from molt_jax.towers.tokenizer import Tokenizer
from molt_jax.towers.tower_files import TowerFiles


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
    hf_config: config.json of its files, or the equivalent, that `config` was made of.
  """

  family: Family
  config: Any
  identity: dict[str, str]
  tokenizer: Tokenizer | None
  preprocess: ImageSpec | None
  heads: tuple[str, ...] = ()
  logit_scale: float | None = None
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def make_module(self, dtype: Any, attention: str, **how: Any) -> nn.Module:
    """Returns the Linen module; `how` may have param_dtype and heads.

    Raises:
      UserError: attention by cuDNN without an NVIDIA GPU, or in float32.
    """
    if attention == 'cudnn':
      _check_cudnn(jnp.dtype(dtype).name, jax.default_backend())
    return self.family.module(self.config, jnp.dtype(dtype), attention, **how)


@dataclasses.dataclass(frozen=True)
class Tower(TowerSpec):
  """A tower with its weights: `module.apply({'params': params}, ...)`."""

  module: nn.Module = None
  params: Any = None


def _check_cudnn(dtype, platform):
  if platform != 'gpu':
    raise UserError(
      f"config.backbones.attention: 'cudnn' needs an NVIDIA GPU, and JAX runs on a {platform} "
      "here; give 'xla'"
    )
  if dtype != 'bfloat16':
    raise UserError(
      f"config.backbones.attention: 'cudnn' needs bfloat16, and the towers compute in {dtype}; "
      "give backbones.dtype (when pretraining, compute_dtype) that type, or attention 'xla'"
    )


def describe_tower(
  path: str, *, modality: str, quantization: str = 'none', resolution: int = 0
) -> TowerSpec:
  """Reads what a tower is without loading its weights; arguments and errors as `load_tower`."""
  files = open_files(path, modality=modality, resolution=resolution)
  if files.shapes is not None:
    # Arrays are made of a configuration's sizes before its weights are loaded: so tensors that are
    # there must have them. Which are missing, loading says.
    # In float32, as they mostly are loaded: their shapes are worked out once then.
    module = make_module(files, dtype='float32', attention='xla', param_dtype='float32')
    tensor_plan.make(files, flat(nn.unbox(abstract_params(module))), complete=False)
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
  described = _describe(files, how.quantization)
  module, params = _load(path, files, how, shardings)
  return Tower(**vars(described), module=module, params=params)


def load_params(
  path: str, *, modality: str, shardings: Callable[[Any], Any] | None = None, **how: Any
) -> Any:
  """Loads the parameters of a tower that is described already; arguments and errors as
  `load_tower`.
  """
  how = Loading(**how)
  files = open_files(path, modality=modality, resolution=how.resolution)
  return _load(path, files, how, shardings)[1]


def _load(path, files, how, shardings):
  module = make_module(
    files,
    dtype=how.dtype,
    attention=how.attention,
    param_dtype=how.param_dtype,
    heads=how.heads,
  )
  whole = abstract_params(module)
  plan = tensor_plan.make(files, flat(nn.unbox(whole)))
  boxed = tensor_plan.upper_layers(whole, files.family, how.first_layer)
  plan = tensor_plan.above(plan, flat(nn.unbox(boxed)), how.first_layer)
  hows = quantize.plan(boxed, how.quantization)
  final = quantize.abstract_params(boxed, how.quantization)
  places = jax.tree.map(lambda _: None, nn.unbox(final)) if shardings is None else shardings(final)
  _check_memory(path, nn.unbox(final), places)
  try:
    return module, fill(files, plan, nn.unbox(boxed), nn.unbox(final), places, hows)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise UserError(_too_large(path, nn.unbox(final), 'than is free')) from error
    raise


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


@functools.lru_cache(maxsize=64)  # Opening a tower and loading it ask for the same.
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
  return TowerSpec(*described, None if scale is None else math.exp(scale), files.config)


def _sha256_of(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
