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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from molt_jax.errors import UserError
from molt_jax.towers import quantize
from molt_jax.towers.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from molt_jax.towers.files import WEIGHT_TYPES, TowerFiles, open_files
from molt_jax.towers.llama import Llama, LlamaConfig
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.towers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a Hugging Face tensor becomes ours and back.

  Attributes:
    source_shape: shape of ours -> the shape that theirs must have.
    reorder: theirs -> ours (a reshape to the shape of ours follows).
    restore: (ours, shape of theirs) -> theirs.
  """

  source_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
  reorder: Callable[[jax.Array], jax.Array]
  restore: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _turned(w: np.ndarray, theirs: tuple[int, ...]) -> np.ndarray:
  return w.reshape(theirs[::-1]).T


def _unpatched(w: np.ndarray, theirs: tuple[int, ...]) -> np.ndarray:
  out, channels, height, width = theirs
  return w.reshape(height, width, channels, out).transpose(3, 2, 0, 1)


AS_IS = Transform(lambda ours: ours, lambda w: w, np.reshape)
FLAT = Transform(lambda ours: (math.prod(ours),), lambda w: w, np.reshape)
DENSE = Transform(
  lambda ours: (math.prod(ours[1:]), ours[0]), lambda w: w.T, _turned
)  # [out, in] -> [in, out...]
DENSE_OUT = Transform(
  lambda ours: (ours[-1], math.prod(ours[:-1])), lambda w: w.T, _turned
)  # [out, in] -> [in..., out]
PATCHES = Transform(
  lambda ours: (ours[1], 3, math.isqrt(ours[0] // 3), math.isqrt(ours[0] // 3)),
  lambda w: w.transpose(2, 3, 1, 0),
  _unpatched,
)

# Hugging Face tensor ({} is the layer) -> path of our parameter, transform. Entries for biases that
# a configuration does not have are void.
NORM = (('weight', 'scale'), ('bias', 'bias'))
LINEAR = (('weight', 'kernel', DENSE), ('bias', 'bias', FLAT))
CLIP_LAYER = {
  **{
    f'encoder.layers.{{}}.layer_norm1.{theirs}': (f'layers/attention_norm/{ours}', AS_IS)
    for theirs, ours in NORM
  },
  **{
    f'encoder.layers.{{}}.layer_norm2.{theirs}': (f'layers/mlp_norm/{ours}', AS_IS)
    for theirs, ours in NORM
  },
  **{
    f'encoder.layers.{{}}.self_attn.{p}_proj.{theirs}': (f'layers/{p}_proj/{ours}', how)
    for p in 'qkv'
    for theirs, ours, how in LINEAR
  },
  'encoder.layers.{}.self_attn.out_proj.weight': ('layers/o_proj/kernel', DENSE_OUT),
  'encoder.layers.{}.self_attn.out_proj.bias': ('layers/o_proj/bias', FLAT),
  **{
    f'encoder.layers.{{}}.mlp.fc1.{theirs}': (f'layers/up_proj/{ours}', how)
    for theirs, ours, how in LINEAR
  },
  **{
    f'encoder.layers.{{}}.mlp.fc2.{theirs}': (f'layers/down_proj/{ours}', how)
    for theirs, ours, how in LINEAR
  },
}
MAPS = {
  'text': {
    'embed_tokens.weight': ('embedding', AS_IS),
    'norm.weight': ('norm/scale', AS_IS),
    'layers.{}.input_layernorm.weight': ('layers/input_norm/scale', AS_IS),
    'layers.{}.post_attention_layernorm.weight': ('layers/mlp_norm/scale', AS_IS),
    **{
      f'layers.{{}}.self_attn.{p}_proj.{theirs}': (f'layers/{p}_proj/{ours}', how)
      for p in 'qkv'
      for theirs, ours, how in LINEAR
    },
    'layers.{}.self_attn.o_proj.weight': ('layers/o_proj/kernel', DENSE_OUT),
    'layers.{}.self_attn.o_proj.bias': ('layers/o_proj/bias', FLAT),
    **{
      f'layers.{{}}.mlp.{p}_proj.{theirs}': (f'layers/{p}_proj/{ours}', how)
      for p in ('gate', 'up', 'down')
      for theirs, ours, how in LINEAR
    },
  },
  'image': {
    'embeddings.class_embedding': ('class_embedding', AS_IS),
    'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
    'embeddings.patch_embedding.weight': ('patch_kernel', PATCHES),
    **{f'pre_layrnorm.{theirs}': (f'pre_norm/{ours}', AS_IS) for theirs, ours in NORM},
    **CLIP_LAYER,
    **{f'post_layernorm.{theirs}': (f'post_norm/{ours}', AS_IS) for theirs, ours in NORM},
  },
  'clip_text': {
    'embeddings.token_embedding.weight': ('token_embedding', AS_IS),
    'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
    **CLIP_LAYER,
    **{f'final_layer_norm.{theirs}': (f'final_norm/{ours}', AS_IS) for theirs, ours in NORM},
    'text_projection.weight': ('projection', DENSE),
  },
}
# Tensors that the towers have no use for.
IGNORED = {
  'text': r'lm_head\.weight|score\.(weight|bias)|.*rotary_emb\.inv_freq',
  'image': r'text_model\..*|(visual|text)_projection\.weight|logit_scale|.*position_ids|'
  r'(classifier|post_layernorm)\.(weight|bias)',
  'clip_text': r'vision_model\..*|(visual|text)_projection\.weight|logit_scale|.*position_ids',
}
MOST_NAMED = 40  # Unfit tensors in one error.
MODULES = {'text': Llama, 'clip_text': ClipText, 'image': ClipVision}


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """A tower without its weights.

  Attributes:
    config: the architecture; `config.hidden_size` is the width of the taps.
    identity: {'path': as given, 'sha256': of configuration and tensors, and of 'quantization' where
      there is one, 'input_sha256': of what makes its input, tokenizer or image preprocessing}.
    tokenizer: of a text tower, else None.
    preprocess: of an image tower, else None.
  """

  config: LlamaConfig | ClipTextConfig | ClipVisionConfig
  identity: dict[str, str]
  tokenizer: Tokenizer | None
  preprocess: ImageSpec | None


@dataclasses.dataclass(frozen=True)
class Tower(TowerSpec):
  """A tower with its weights: `module.apply({'params': params}, ...)`."""

  module: Llama | ClipText | ClipVision
  params: Any


def describe_tower(path: str, *, kind: str, quantization: str = 'none') -> TowerSpec:
  """Reads what a tower is without loading its weights; arguments and errors as `load_tower`."""
  files = open_files(path, kind=kind)
  if files.shapes is not None:
    # Arrays are made of a configuration's sizes before its weights are loaded: so tensors that are
    # there must have them. Which are missing, loading says.
    module = make_module(files, dtype='float32', attention='xla')
    _plan(files, _flat(nn.unbox(abstract_params(module))), complete=False)
  return _describe(files, quantization)


def load_tower(
  path: str,
  *,
  kind: str,
  dtype: Any,
  attention: str,
  quantization: str = 'none',
  shardings: Callable[[Any], Any] | None = None,
  with_pool: bool = False,
) -> Tower:
  """Loads a tower.

  Args:
    path: Hugging Face directory or hub id, .gguf file, pkg://package/relative/path, or random:NAME.
    kind: 'text' (LLaMA), 'clip_text' or 'image'.
    dtype: of weights and computation, 'float32' or 'bfloat16'.
    attention: 'xla' or 'cudnn'.
    quantization: 'none', 'int8' or 'int4', of the layers' matrices; each is quantised as it is
      read.
    shardings: maps the abstract parameters (boxed with their logical axes) to a pytree of
      shardings; None: the default device.
    with_pool: load an image tower's final norm too, which only `ClipVision.pooled` reads.

  Raises:
    UserError: no such tower, a configuration that is not implemented, tensors that do not fit it
      (all of them are named), weights that are not finite or too large for the machine, no qwix.
  """
  files = open_files(path, kind=kind)
  module = make_module(files, dtype=dtype, attention=attention, with_pool=with_pool)
  boxed = abstract_params(module)
  hows = quantize.plan(boxed, quantization)
  final = quantize.abstract_params(boxed, quantization)
  places = jax.tree.map(lambda _: None, nn.unbox(final)) if shardings is None else shardings(final)
  described, plan = _describe(files, quantization), _plan(files, _flat(nn.unbox(boxed)))
  _check_memory(path, nn.unbox(final), places)
  try:
    params = _load(files, plan, nn.unbox(boxed), nn.unbox(final), places, hows)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise UserError(_too_large(path, nn.unbox(final), 'than is free')) from error
    raise
  return Tower(**vars(described), module=module, params=params)


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


def make_module(
  files: TowerFiles, *, dtype: Any, attention: str, with_pool: bool = False
) -> Llama | ClipText | ClipVision:
  """The Linen module of a tower; a CLIP text tower has the projection that its file has."""
  options = {
    'image': {'with_pool': with_pool},
    'clip_text': {'with_projection': 'text_projection.weight' in (files.shapes or ())},
  }
  return MODULES[files.kind](
    files.architecture, jnp.dtype(dtype), attention, **options.get(files.kind, {})
  )


def abstract_params(module: Llama | ClipText | ClipVision) -> Any:
  """Shapes, types and (boxed) logical axes of a tower's parameters; nothing is allocated."""
  if isinstance(module, ClipVision):
    size = module.config.image_size
    example = (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),)
  else:
    example = (jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool))
  return jax.eval_shape(functools.partial(module.init, num_taps=1), jax.random.key(0), *example)[
    'params'
  ]


def _describe(files: TowerFiles, quantization: str) -> TowerSpec:
  identity = files.identity
  if (
    quantization != 'none'
    # Its taps are others: a head, or a store of taps, belongs to this tower quantised in this way.
  ):
    mixed = hashlib.sha256(
      f'{identity["sha256"]} {quantization} {quantize.SCHEMES[quantization]}'.encode()
    ).hexdigest()
    identity = {**identity, 'sha256': mixed, 'quantization': quantization}
  text = files.tokenizer() if files.kind != 'image' else None
  image = files.preprocess() if files.kind == 'image' else None
  inputs = text.sha256 if text else _sha256_of(dataclasses.asdict(image))
  if inputs:
    identity = {**identity, 'input_sha256': inputs}
  return TowerSpec(config=files.architecture, identity=identity, tokenizer=text, preprocess=image)


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
    fill = _fill(transform, shape, stacked, hows.get(path), places[path])
    for layer, name in enumerate(names):
      # Waiting keeps a single tensor alive; the buffer is donated and filled in place.
      buffer, finite = jax.block_until_ready(fill(buffer, files.read(name, source_shape), layer))
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
  transform: Transform, shape: tuple[int, ...], stacked: bool, how: quantize.How | None, place: Any
):
  """Compiled: (parameter, tensor, layer) -> parameter with the tensor in it, whether it is finite.

  The tensor is reordered, and quantised where its parameter is.
  """

  def fill(buffer, w, layer):
    new = transform.reorder(w).reshape(shape)
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
  plan, wrong = {}, []
  for template, (path, transform) in MAPS[files.kind].items():
    if path not in wanted:
      continue
    shape = wanted[path].shape
    stacked = path.startswith('layers/')
    names = [template.format(i) for i in range(shape[0])] if stacked else [template]
    expected = transform.source_shape(shape[1:] if stacked else shape)
    plan[path] = names, expected, transform
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
  unknown = sorted(n for n in set(files.shapes) - used if not re.fullmatch(IGNORED[files.kind], n))
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


def hugging_face_tensors(params: Any, *, kind: str) -> dict[str, np.ndarray]:
  """The way back from `load_tower`: Hugging Face tensor name -> tensor, in Hugging Face's
  orientation and without a prefix.

  Args:
    params: a tower's parameters, unboxed, not quantised.
    kind: 'text', 'clip_text' or 'image'.
  """
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  out = {}
  for template, (path, transform) in MAPS[kind].items():
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
