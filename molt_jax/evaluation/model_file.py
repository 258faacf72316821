"""What a finished run is in one file, NAME.molt, and how it is read; `exporting` writes it.

  config.json        the config, which says nothing of where things were
  meta.json          what the checkpoint belongs to: classes, towers, fingerprints of the data
  head.safetensors   what was trained
  image/, text/      the towers (`towers.kept`)
  evaluation.json    scores by condition, where the run has them
  calibration.npz    what prediction sets are made by, where it could be computed
  examples.json      five examples with the probabilities they had, and examples/N.png, their images
  README.md          the model card

Nothing in it is executed. What it holds is checked as what others wrote: fields by the schema,
arrays by the shapes that the config makes, and the answers to its examples when it is loaded.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.runtime import files, sealed
from molt_jax.towers import kept, zipped_tensors

KIND, VERSION = 'molt_jax model', 1
CONFIG, META, HEAD, EXAMPLES = 'config.json', 'meta.json', 'head.safetensors', 'examples.json'
SCORES = 'evaluation.json'
META_KEYS = {'backbones': dict, 'class_names': list, 'step': int}
MOST_EXAMPLES = 64
MAX_IMAGE_BYTES = 1 << 24
# What answers may differ by on another device, by the type of computation; the bytes of the file
# are compared before, so this finds machines and versions that compute something else.
TOLERANCE = {'float32': 5e-3, 'bfloat16': 5e-2}


@dataclasses.dataclass(frozen=True)
class Example:
  """An example whose answer is known.

  Attributes:
    image: the bytes of an image file; None: absent.
    text: None: absent.
    probability_k: the answer, K numbers.
  """

  image: bytes | None
  text: str | None
  probability_k: Sequence[float]


# ---- Writing -------------------------------------------------------------------------------------


def members(
  config: Mapping[str, Any],
  meta: Mapping[str, Any],
  variables: Mapping[str, Any],
  examples: Sequence[Example],
) -> Iterator[tuple[str, bytes]]:
  """Yields the files beside towers, scores and card, (name, content)."""
  yield CONFIG, _to_json(config)
  yield META, _to_json(meta)
  arrays = {name: np.asarray(jax.device_get(x)) for name, x in kept.named_leaves(variables)}
  yield HEAD, safetensors.numpy.save(arrays)
  listed = []
  for number, example in enumerate(examples):
    image = None if example.image is None else f'examples/{number}.png'
    if image:
      yield image, example.image
    probability = [round(float(p), 9) for p in example.probability_k]
    listed.append({'image': image, 'text': example.text, 'probability': probability})
  yield EXAMPLES, _to_json({'examples': listed})


def _to_json(content: Any) -> bytes:
  return (json.dumps(content, indent=1) + '\n').encode()


# ---- Reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelFile:
  """A model in a file.

  Attributes:
    file: it, all of whose bytes were compared.
    config: nested dicts of fields; the paths of the towers are those within the file.
    meta: as `checkpoint.read_meta` returns it.
    examples: with their answers.
  """

  file: sealed.Sealed
  config: dict[str, Any]
  meta: dict[str, Any]
  examples: tuple[Example, ...]

  def restore(self, tree: Any) -> Any:
    """Returns what was trained in the shapes, types and shardings of `tree`, see
    `checkpoint.restore_item`; None: it is only looked at.

    Raises:
      UserError: it holds other arrays than `tree` asks for, or numbers that are not finite.
    """
    place = self.file.place(HEAD)
    found = {tensor.name: tensor for tensor in zipped_tensors.header(place)[1]}
    if tree is None:
      return {name: tensor.read() for name, tensor in found.items()}
    wanted = dict(kept.named_leaves(tree))
    if wrong := sorted(found.keys() ^ wanted.keys()):
      raise self._other(f'{files.shown(wrong[0])} is there in one of the two')
    leaves = []
    for name, leaf in wanted.items():
      x = found[name].read()
      if x.shape != leaf.shape or x.dtype != leaf.dtype:
        raise self._other(f'{files.shown(name)} is {x.dtype}{list(x.shape)} there')
      if x.dtype.kind == 'f' and not np.isfinite(x).all():
        raise self._other(f'{files.shown(name)} is not finite')
      leaves.append(jax.device_put(x, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)

  def _other(self, why: str) -> UserError:
    return UserError(
      f'{files.printable(self.file.path)}: what was trained is not what this version makes of its '
      f'config ({why}); use the version that it was written with'
    )


def read(path: pathlib.Path) -> ModelFile:
  """Reads what a model is; towers and what was trained are read when they are asked for.

  Raises:
    UserError: it is no such file, is damaged, or of a later version.
  """
  file = sealed.open(path)
  where = files.printable(path)
  if file.manifest.get('kind') != KIND:
    raise UserError(f'{where} is no model of molt export (its manifest says another kind)')
  if file.manifest.get('version') != VERSION:
    raise UserError(
      f'{where} is of version {files.shown(file.manifest.get("version"))} of the format, and '
      f'version {VERSION} is read: use a newer molt_jax'
    )
  config, meta = file.json(CONFIG), file.json(META)
  wrong = [key for key, kind in META_KEYS.items() if not isinstance(meta.get(key), kind)]
  if wrong or not all(isinstance(name, str) for name in meta['class_names']):
    raise UserError(f'{where}: {META} lacks {wrong[0] if wrong else "names of classes"}')
  try:
    for modality in MODALITIES:
      there = f'{modality}/tower.json' in file
      path = kept.path_of(file.path, modality) if there else ''
      config['backbones'][modality]['path'] = path
    examples = tuple(_examples(file, len(meta['class_names'])))
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'{where}: {CONFIG} or {EXAMPLES} is not as it must be ({files.reason(error)})'
    ) from error
  return ModelFile(file, config, {**meta, 'config': config}, examples)


def _examples(file: sealed.Sealed, num_classes: int) -> Iterator[Example]:
  for row in file.json(EXAMPLES)['examples'][:MOST_EXAMPLES]:
    image, text = row['image'], row['text']
    probability_k = [float(p) for p in row['probability']]
    if len(probability_k) != num_classes or not isinstance(text, str | None):
      raise ValueError(f'an example of {EXAMPLES}')
    content = None if image is None else files.read_bytes(file.place(image), limit=MAX_IMAGE_BYTES)
    yield Example(content, text, probability_k)


def check(where: str, examples: Sequence[Example], found_nk: np.ndarray, dtype: str) -> float:
  """Compares answers with those that a file has.

  Args:
    where: names the file.
    examples: with the answers that they had.
    found_nk: the answers that they have.
    dtype: of computation, a key of TOLERANCE.

  Returns:
    The largest difference of two probabilities.

  Raises:
    UserError: it is larger than rounding can make it.
  """
  wanted_nk = np.array([example.probability_k for example in examples])
  difference = float(np.abs(found_nk - wanted_nk).max())
  if not difference <= TOLERANCE[dtype]:
    raise UserError(
      f'{where}: its examples are answered otherwise than when it was written (probabilities '
      f'differ by up to {difference:.3g}): this machine, or this version of JAX, computes '
      'something else; update jax and jaxlib, or set JAX_PLATFORMS=cpu'
    )
  return difference
