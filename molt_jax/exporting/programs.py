"""A run as programs of StableHLO, one for each missing pattern, that JAX runs without this package.

A folder gets, of a run that reads both modalities:

  image_and_text.stablehlo, image.stablehlo, text.stablehlo
                       weights, pixels float32[1, S, S, 3] from 0 to 255, tokens int32[1, T],
                       token_mask bool[1, T] (those that the pattern has)
                       -> probabilities float32[1, K]
  weights.safetensors  name -> array: the first argument of each program; bfloat16 as its bits,
                       uint16, which NumPy can hold
  tokenizer.json       of the text tower, which also cuts texts and fills them up to T tokens
  model.json           classes, and how an image becomes pixels
  run.py               a script of 30 lines that does all of it, for one example
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from jax import export

from molt_jax.data import transforms
from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.runtime import atomic
from molt_jax.towers import kept
from molt_jax.towers.tokenizer import Tokenizer
from molt_jax.training.assembly import Assembly

NAMES = ('image_and_text', 'image', 'text')  # Of PATTERNS.
PLATFORMS = ('cpu', 'cuda', 'tpu')
# That the script opens: every one that people send, none whose parser starts another program.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')
SCRIPT = pathlib.Path(__file__).with_name('run_program.py')


def write(
  folder: pathlib.Path,
  assembly: Assembly,
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
) -> list[str]:
  """Writes the folder, whole or not at all.

  Args:
    folder: where to.
    assembly: of the run.
    variables: what was trained.
    frozen: modality -> parameters of its tower.

  Returns:
    The names of the programs.

  Raises:
    UserError: it cannot be written.
  """
  weights = dict(kept.named_leaves({'head': dict(variables), **_there(frozen)}))
  names = [name for name, used in zip(NAMES, PATTERNS, strict=True) if _fits(used, frozen)]
  with atomic.folder(folder) as made:
    for name in names:
      program = _program(name, assembly, variables, frozen)
      exported = _exported(name, program, assembly, weights)
      (made / f'{name}.stablehlo').write_bytes(exported.serialize())
    arrays = {name: plain(x) for name, x in weights.items()}
    safetensors.numpy.save_file(arrays, made / 'weights.safetensors')
    if (tower := assembly.towers.get('text')) is not None:
      whole = whole_tokenizer(tower.tokenizer, assembly.preprocess.max_tokens)
      (made / 'tokenizer.json').write_text(whole.to_str(), encoding='utf-8')
    about = json.dumps(_about(assembly), indent=1, ensure_ascii=False) + '\n'
    (made / 'model.json').write_text(about, encoding='utf-8')
    (made / 'run.py').write_text(SCRIPT.read_text('utf-8'), encoding='utf-8')
  return names


def plain(x: jax.Array) -> np.ndarray:
  """An array as NumPy and safetensors hold it; `restored` is the other way round."""
  array = np.asarray(jax.device_get(x))
  return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def restored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x


def whole_tokenizer(tokenizer: Tokenizer, max_tokens: int) -> tokenizers.Tokenizer:
  """A tokenizer that adds special tokens, cuts and fills up by itself."""
  whole = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
  around = [('before', tokenizer.before), ('after', tokenizer.after)]
  special = [
    {'id': name, 'ids': list(ids), 'tokens': [f'{name} {n}' for n in ids]} for name, ids in around
  ]
  template = {'single': ['before', '$A', 'after'], 'special_tokens': special}
  whole.post_processor = tokenizers.processors.TemplateProcessing(**template)
  whole.enable_truncation(max_tokens)
  whole.enable_padding(length=max_tokens, pad_id=tokenizer.pad_id)
  return whole


def _there(frozen: Mapping[str, Any]) -> dict[str, Any]:
  return {modality: params for modality, params in frozen.items() if params is not None}


def _fits(used_m: Sequence[bool], frozen: Mapping[str, Any]) -> bool:
  """Whether a pattern is one of a run: of a unimodal one, there is one."""
  there = [frozen.get(modality) is not None for modality in MODALITIES]
  return bool(np.any(used_m)) and not np.any(np.array(used_m) & ~np.array(there))


def _program(
  name: str, assembly: Assembly, variables: Mapping[str, Any], frozen: Mapping[str, Any]
) -> Callable[..., jax.Array]:
  """Returns what is written of a pattern: (weights, arrays of the pattern...) -> probabilities."""
  with_image, with_text = PATTERNS[NAMES.index(name)]
  whole = {'head': dict(variables), **_there(frozen)}
  order, structure = [x for x, _ in kept.named_leaves(whole)], jax.tree.structure(whole)
  types = [x.dtype for _, x in kept.named_leaves(whole)]
  preprocess = assembly.preprocess
  size = preprocess.image_size

  def program(weights, *arrays):
    leaves = [restored(weights[x], dtype) for x, dtype in zip(order, types, strict=True)]
    tree = jax.tree.unflatten(structure, leaves)
    image = jnp.zeros((1, size, size, 3))
    if with_image:
      colours = tuple(preprocess.mean), tuple(preprocess.std)
      scale, offset = (x_c.reshape(1, 1, 1, 3) for x_c in transforms.affine(*colours))
      image = arrays[0] * scale + offset
    empty = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool)
    tokens, mask = _read_as(*arrays[-2:], assembly) if with_text else empty
    present = jnp.array([[with_image, with_text]])
    batch = {'image': image, 'tokens': tokens, 'token_mask': mask, 'present': present}
    used = dict(zip(MODALITIES, (with_image, with_text), strict=True))
    towers = {m: tree.get(m) if used[m] else None for m in MODALITIES}
    method = assembly.method
    features = method.features(towers, batch)
    logits_bk = method(tree['head'], towers, features, batch, present).logits_bk
    multi_label = assembly.config.dataset.multi_label
    return jax.nn.sigmoid(logits_bk) if multi_label else jax.nn.softmax(logits_bk)

  return program


def _exported(
  name: str, program: Callable[..., jax.Array], assembly: Assembly, weights: Mapping[str, Any]
) -> export.Exported:
  with_image, with_text = PATTERNS[NAMES.index(name)]
  size, length = assembly.preprocess.image_size, assembly.preprocess.max_tokens
  arrays = []
  if with_image:
    arrays.append(jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  if with_text:
    arrays += [jax.ShapeDtypeStruct((1, length), kind) for kind in (jnp.int32, jnp.bool_)]
  shapes = {}
  for x, value in weights.items():
    dtype = jnp.uint16 if value.dtype == jnp.bfloat16 else value.dtype
    shapes[x] = jax.ShapeDtypeStruct(value.shape, dtype)
  return export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *arrays)


def _read_as(tokens, mask, assembly: Assembly) -> tuple[jax.Array, jax.Array]:
  """Tokens as the model reads them: an empty text is a token, and padding may be read."""
  text = assembly.towers['text'].tokenizer
  place_1t = jnp.arange(mask.shape[1])[None]
  stands_1t = ~mask.any() & (place_1t == 0)
  tokens = jnp.where(stands_1t, text.empty_id, tokens)
  return tokens, mask | stands_1t | (place_1t < text.filled)


def _about(assembly: Assembly) -> dict[str, Any]:
  """What the script reads of the run."""
  about: dict[str, Any] = {'classes': list(assembly.class_names)}
  if 'image' in assembly.towers:
    about['image'] = about_images(assembly.preprocess)
  return about


def about_images(how: Any) -> dict[str, Any]:
  """What the script reads of how an image becomes pixels.

  Args:
    how: a `pipeline.Preprocess`.
  """
  letterbox = how.resize == 'letterbox'  # Then the longest side is what is scaled.
  scaled = how.image_size if letterbox else how.scaled or how.image_size
  return {
    'formats': FORMATS,
    'size': how.image_size,
    'letterbox': letterbox,
    'scaled': scaled,
    'sides': [scaled, scaled] if how.resize == 'squash' else None,
    'resample': how.resample,
    'mode': 'L' if how.rounded else 'F',
    'mean': [255 * x for x in how.mean],
  }
