"""A tower within the file of a whole model, by the path FILE.molt/image or FILE.molt/text.

Its members are in the folder of its modality: `tower.json` says what it is, `tokenizer.json` is
that of a text tower, and `weights-N.safetensors` hold its parameters under the names that they have
here, quantised where they were, of the layers that are run.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.runtime import files, sealed
from molt_jax.towers import base, loading, quantize, tensor_plan, tokenizer, zipped_tensors
from molt_jax.towers.loading import Loading, Tower, TowerSpec
from molt_jax.towers.preprocessing import ImageSpec

MAX_SHARD_BYTES = 1 << 29  # One such file is in memory when it is written.
_IDS = ('pad_id', 'empty_id', 'filled')
_AROUND = ('before', 'after')


def is_one(path: str) -> bool:
  """Whether a path names a tower within a file."""
  file, _, modality = path.rpartition('/')
  return file.endswith(sealed.SUFFIX) and modality in base.MODALITIES and sealed.is_one(file)


def path_of(file: pathlib.Path, modality: str) -> str:
  """Returns the path of a tower within a file."""
  return f'{file.absolute()}/{modality}'


# ---- Writing -------------------------------------------------------------------------------------


def members(tower: TowerSpec, params: Any, last_state: int) -> Iterator[tuple[str, bytes]]:
  """Yields the files of a tower, (name, content).

  Args:
    tower: what it is.
    params: its parameters.
    last_state: the last hidden state that is read: layers above it are left out.
  """
  modality = tower.family.modality
  about: dict[str, Any] = {
    'family': tower.family.name,
    'config': dict(tower.hf_config),
    'identity': _portable(tower.identity),
    'heads': list(tower.heads),
    'logit_scale': tower.logit_scale,
  }
  if hasattr(tower.config, 'pooling'):
    about['pooling'] = tower.config.pooling
  if tower.preprocess is not None:
    about['preprocess'] = dataclasses.asdict(tower.preprocess)
  if (text := tower.tokenizer) is not None:
    about['tokenizer'] = {name: getattr(text, name) for name in (*_IDS, *_AROUND, 'sha256')}
    yield f'{modality}/tokenizer.json', text.backend.to_str().encode()
  yield f'{modality}/tower.json', (json.dumps(about, indent=1, default=_plain) + '\n').encode()
  for number, shard in enumerate(_shards(params, max(1, last_state)), 1):
    yield f'{modality}/weights-{number:05}.safetensors', safetensors.numpy.save(shard)


def _plain(value: Any) -> Any:
  """Numbers and arrays of NumPy as JSON has them: GGUF files are read as such."""
  return value.tolist()


def _portable(identity: Mapping[str, str]) -> dict[str, str]:
  """An identity that says nothing of the folders of the machine it was written on."""
  path = identity['path']
  if pathlib.PurePath(path).is_absolute() or path.startswith(('~', '.')):
    path = pathlib.PurePath(path).name
  return {**identity, 'path': path}


def _shards(params: Any, num_layers: int) -> Iterator[dict[str, np.ndarray]]:
  shard, size = {}, 0
  for name, x in named_leaves(params):
    array = np.ascontiguousarray(jax.device_get(x))
    if name.startswith('layers/'):
      array = np.ascontiguousarray(array[:num_layers])
    if shard and size + array.nbytes > MAX_SHARD_BYTES:
      yield shard
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
  yield shard


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields (path, leaf) of each leaf of a tree, the path joined by /."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


# ---- Reading -------------------------------------------------------------------------------------


def describe_tower(
  path: str, *, modality: str, quantization: str = 'none', resolution: int = 0
) -> TowerSpec:
  """As `loading.describe_tower`, of a tower within a file.

  Raises:
    UserError: the file is damaged or holds no such tower, or the tower was written in another
      quantisation or for images of another size.
  """
  file, name = _opened(path, modality)
  where = f'{file.path}/{name}/tower.json'
  about = file.json(f'{name}/tower.json')
  rows = [row for row in base.FAMILIES if row.modality == name and row.name == about.get('family')]
  try:
    (family,) = rows
    config = family.config.from_hf(about['config'], where)
    identity = {str(key): str(value) for key, value in about['identity'].items()}
    heads = tuple(head for head in family.heads if head in about['heads'])
    scale = None if about['logit_scale'] is None else float(about['logit_scale'])
    image = _image_spec(about['preprocess']) if name == 'image' else None
    if 'pooling' in about:
      config = dataclasses.replace(config, pooling=about['pooling'])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{where} is of another version, or damaged ({files.reason(error)})') from error
  if image is not None:
    config = config.at(image.size, where)
  own = identity.get('quantization', 'none')
  if quantization != own or (image is not None and resolution not in (0, image.size)):
    raise UserError(
      f'{path}: the tower was written with backbones.quantization={own}'
      f'{f" for images of {image.size} pixels" if image else ""}; give the same'
    )
  text = _tokenizer(file, about.get('tokenizer'), config) if name == 'text' else None
  return TowerSpec(family, config, identity, text, image, heads, scale, about['config'])


def _opened(path: str, modality: str) -> tuple[sealed.Sealed, str]:
  name, _, found = path.rpartition('/')
  file = sealed.open(name)
  if found != modality:
    raise UserError(f'{path!r} reads the {found}, and a tower that reads the {modality} is wanted')
  if f'{modality}/tower.json' not in file:
    raise UserError(f'{file.path} holds no tower that reads the {modality}')
  return file, modality


def _image_spec(found: Mapping[str, Any]) -> ImageSpec:
  kinds = {field.name: type(field.default) for field in dataclasses.fields(ImageSpec)}
  kinds['size'] = int
  values = {}
  for name, kind in kinds.items():
    values[name] = tuple(map(float, found[name])) if kind is tuple else found[name]
    if type(values[name]) is not kind:
      raise ValueError(f'preprocess.{name} is {files.shown(found[name])}')
  spec = ImageSpec(**values)
  sides = 0 < spec.size <= 1 << 13 and 0 <= spec.scaled <= 1 << 14
  channels = len(spec.mean) == len(spec.std) == 3 and all(spec.std)
  if not (sides and channels and spec.resize in ('crop', 'squash') and 0 <= spec.resample <= 5):
    raise ValueError(f'preprocess is {files.shown(dict(found))}')
  return spec


def _tokenizer(file: sealed.Sealed, about: Any, config: Any) -> tokenizer.Tokenizer:
  source = f'{file.path}/text/tokenizer.json'
  content = file.read('text/tokenizer.json')
  backend = tokenizer.guarded(source, tokenizers.Tokenizer.from_str, content.decode())
  vocab_size = config.vocab_size
  try:
    around = tuple(tuple(map(int, about[name])) for name in _AROUND)
    ids = {name: int(about[name]) for name in _IDS}
    if not all(0 <= i < vocab_size for i in (*around[0], *around[1], *ids.values())):
      raise ValueError(f'an id beyond the {vocab_size} tokens')
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{source}: what goes with it is damaged ({files.reason(error)})') from error
  made = tokenizer.wrap(
    backend,
    tokenizer.Special(),
    vocab_size=vocab_size,
    source=source,
    sha256=str(about.get('sha256', '')),
    around=around,
  )
  return dataclasses.replace(made, **ids)


def load_tower(
  path: str, *, modality: str, shardings: Callable[[Any], Any] | None = None, **how: Any
) -> Tower:
  """As `loading.load_tower`, of a tower within a file.

  Raises:
    UserError: as `describe_tower`; or its weights are not those that the model reads.
  """
  how = Loading(**how)
  spec = describe_tower(
    path, modality=modality, quantization=how.quantization, resolution=how.resolution
  )
  param_dtype = None if how.param_dtype is None else jax.numpy.dtype(how.param_dtype)
  module = spec.make_module(how.dtype, how.attention, param_dtype=param_dtype, heads=how.heads)
  whole = loading.abstract_params(module)
  boxed = tensor_plan.upper_layers(whole, spec.family, how.first_layer)
  final = quantize.abstract_params(boxed, how.quantization)
  places = jax.tree.leaves(shardings(final)) if shardings else itertools.repeat(None)
  final = nn.unbox(final)
  depth = spec.config.num_layers
  tensors = _tensors(_opened(path, modality)[0], modality)
  leaves = []
  for (name, wanted), place in zip(named_leaves(final), places, strict=False):
    x = _read(tensors, name, depth, how.first_layer)
    if x is None or x.shape != wanted.shape or x.dtype != wanted.dtype:
      found = 'is not there' if x is None else f'is {x.dtype}{list(x.shape)}'
      raise UserError(
        f'{path}: {name} {found} instead of {wanted.dtype}{list(wanted.shape)}: the file is of '
        'another version, or hostile'
      )
    leaves.append(jax.device_put(x, place))
  params = jax.tree.unflatten(jax.tree.structure(final), leaves)
  return Tower(**vars(spec), module=module, params=params)


def load_params(path: str, **how: Any) -> Any:
  """As `loading.load_params`, of a tower within a file."""
  return load_tower(path, **how).params


def _tensors(file: sealed.Sealed, modality: str) -> dict[str, zipped_tensors.Tensor]:
  found = {}
  for place in file.place(modality).glob('weights-*.safetensors'):
    found |= {tensor.name: tensor for tensor in zipped_tensors.header(place)[1]}
  return found


def _read(
  tensors: Mapping[str, zipped_tensors.Tensor], name: str, depth: int, first_layer: int
) -> np.ndarray | None:
  """Reads a parameter. Layers above those in the file are not run: they are zeros."""
  if name not in tensors:
    return None
  x = tensors[name].read()
  if name.startswith('layers/') and x.ndim and 0 < x.shape[0] <= depth:
    above = np.zeros((depth - x.shape[0], *x.shape[1:]), x.dtype)
    x = np.concatenate([x, above])[first_layer:] if len(above) or first_layer else x
  return x
