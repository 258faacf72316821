"""A run as programs of StableHLO, one for each missing pattern, that JAX runs without this package.

A folder gets, of a run that reads both modalities:

  complete.stablehlo, image_only.stablehlo, text_only.stablehlo
                       weights, image float32[1, S, S, 3], tokens int32[1, T], token_mask bool[1, T]
                       (those that the pattern has) -> probabilities float32[1, K]
  weights.safetensors  name -> array: the first argument of each program
  tokenizer.json       of the text tower
  model.json           classes, and how images and texts become arrays
  run.py               a script that does all of it, for one example
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.runtime import atomic
from molt_jax.towers import kept
from molt_jax.training.assembly import Assembly

NAMES = ('complete', 'image_only', 'text_only')  # Of PATTERNS.
PLATFORMS = ('cpu', 'cuda', 'tpu')
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
    arrays = {name: np.asarray(jax.device_get(x)) for name, x in weights.items()}
    safetensors.numpy.save_file(arrays, made / 'weights.safetensors')
    if (tower := assembly.towers.get('text')) is not None:
      (made / 'tokenizer.json').write_text(tower.tokenizer.backend.to_str(), encoding='utf-8')
    about = json.dumps(_about(assembly), indent=1, ensure_ascii=False) + '\n'
    (made / 'model.json').write_text(about, encoding='utf-8')
    (made / 'run.py').write_text(SCRIPT.read_text('utf-8'), encoding='utf-8')
  return names


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
  size = assembly.preprocess.image_size

  def program(weights, *arrays):
    tree = jax.tree.unflatten(structure, [weights[x] for x in order])
    image = arrays[0] if with_image else jnp.zeros((1, size, size, 3))
    empty = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool)
    tokens, mask = arrays[-2:] if with_text else empty
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
  shapes = {x: jax.ShapeDtypeStruct(value.shape, value.dtype) for x, value in weights.items()}
  return export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *arrays)


def _about(assembly: Assembly) -> dict[str, Any]:
  """What the script reads of the run."""
  preprocess, config = assembly.preprocess, assembly.config
  about = {'classes': list(assembly.class_names), 'multi_label': config.dataset.multi_label}
  if 'image' in assembly.towers:
    names = ('mean', 'std', 'resize', 'resample', 'scaled', 'rounded')
    about['image'] = {'size': preprocess.image_size} | {
      name: getattr(preprocess, name) for name in names
    }
  if 'text' in assembly.towers:
    text = assembly.towers['text'].tokenizer
    names = ('before', 'after', 'pad_id', 'empty_id', 'filled')
    about['text'] = {'max_tokens': preprocess.max_tokens} | {n: getattr(text, n) for n in names}
  return about
