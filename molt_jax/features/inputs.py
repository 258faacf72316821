"""What is given to towers once for all runs: the different images and texts of a data set, and how
they become arrays.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data import packing, pipeline, transforms
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import Source, images_of
from molt_jax.errors import UserError
from molt_jax.features import store
from molt_jax.runtime import console

SCAN_EXAMPLES = 256  # Examples that a thread identifies at a time.


class Input(NamedTuple):
  """One input of a tower: its key in the store, and the token ids of a text or (source, position)
  of an image.
  """

  key: str
  content: Any


class TowerBatch(NamedTuple):
  """Inputs ready for a tower.

  Attributes:
    keys: of those that can be used.
    lengths: theirs in tokens; None: all tokens.
    arrays: the batch, filled up with padding.
    faults: key -> why, of those that cannot be used.
  """

  keys: list[str]
  lengths: list[int | None]
  arrays: dict[str, np.ndarray]
  faults: dict[str, str]


def ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
  """Maps in threads, in order, at most `threads` items ahead of the reader."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    flying = collections.deque()
    for item in items:
      flying.append(pool.submit(function, item))
      if len(flying) > threads:
        yield flying.popleft().result()
    while flying:
      yield flying.popleft().result()


# ---- What is needed ------------------------------------------------------------------------------


def identify(
  wanted: Mapping[str, tuple[Source, np.ndarray]],
  preprocess: pipeline.Preprocess,
  modalities: Collection[str],
  *,
  num_threads: int,
) -> dict[str, dict[str, list[tuple[Input, ...]]]]:
  """Reads every example once, images undecoded.

  Args:
    wanted: split -> (source, bool[N, 2], the modalities of each example that will be read).
    preprocess: how an example becomes arrays.
    modalities: those that are read at all.
    num_threads: that read.

  Returns:
    split -> modality -> the inputs of each example; several images are several.
  """
  inputs = {}
  total = sum(len(source) for source, _ in wanted.values())
  with console.progress('looking up features', total, 'examples') as bar:
    for split, (source, present_nm) in wanted.items():
      used_nm = source.present & present_nm & [m in modalities for m in MODALITIES]
      one = functools.partial(_identify_some, source=source, preprocess=preprocess, used_nm=used_nm)
      starts = range(0, len(source), SCAN_EXAMPLES)
      ranges = [range(i, min(i + SCAN_EXAMPLES, len(source))) for i in starts]
      inputs[split] = {modality: [] for modality in modalities}
      for found in ahead(one, ranges, num_threads):
        for modality in modalities:
          inputs[split][modality] += [example[modality] for example in found]
        bar.advance(len(found))
  return inputs


def _identify_some(positions: range, *, source, preprocess, used_nm):
  return [_identify(n, source, preprocess, used_nm[n]) for n in positions]


def _identify(n: int, source: Source, preprocess: pipeline.Preprocess, used_m: np.ndarray):
  found: dict[str, tuple[Input, ...]] = dict.fromkeys(MODALITIES, ())
  if not used_m.any():
    return found
  example = pipeline.read_example(source, n, image=bool(used_m[0]), report=preprocess.report)
  images = images_of(example)
  found['image'] = tuple(Input(store.key_of(image), (source, n)) for image in images)
  if used_m[1]:
    text = text_input(example['text'], preprocess)
    found['text'] = (text,) if text else ()
    if not text:
      preprocess.report.add(example['id'], 'text', 'no tokens')
  return found


def text_input(text: str, preprocess: pipeline.Preprocess) -> Input | None:
  """Returns a text as the tower's input; None where it has no tokens."""
  ids_t = np.asarray(preprocess.encode(text, preprocess.max_tokens), np.int32)
  return Input(store.key_of(ids_t.tobytes()), ids_t) if len(ids_t) else None


# ---- Batches -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class InputBatches:
  """How inputs become batches.

  Attributes:
    examples: most in a batch.
    shards: devices that they are split over.
    preprocess: how an example becomes arrays.
    image_tokens: of each image, in the tower.
    most_tokens: in a batch, but for what fills it up to a multiple of `shards`; 0: any number.
  """

  examples: int
  shards: int
  preprocess: pipeline.Preprocess
  image_tokens: int = 1
  most_tokens: int = 0

  def cut(self, inputs: Sequence[Input], modality: str) -> list[list[Input]]:
    """Returns batches of inputs; texts of one padded length are together, so that few programs are
    compiled.
    """
    groups = collections.defaultdict(list)
    for x in inputs:
      groups[self._length(x) if modality == 'text' else self.image_tokens].append(x)
    batches = []
    for tokens, group in groups.items():
      size = self._size(tokens)
      batches += [group[i : i + size] for i in range(0, len(group), size)]
    # No result depends on the order; processes that share a store begin at different ends.
    random.SystemRandom().shuffle(batches)
    return batches

  def prepare(self, inputs: Sequence[Input], modality: str) -> TowerBatch:
    """Returns the arrays of a batch.

    Raises:
      UserError: an image was changed since it was identified.
    """
    return self._images(inputs) if modality == 'image' else self._texts(inputs)

  def _size(self, tokens: int) -> int:
    """Examples in a batch of inputs of so many tokens each, padding included."""
    if not self.most_tokens:
      return self.examples
    fitting = max(self.most_tokens // tokens, 1)
    return min(self.examples, -(-fitting // self.shards) * self.shards)

  def _length(self, x: Input) -> int:
    return packing.padded_length(len(x.content), self.preprocess.max_tokens)

  def _images(self, inputs: Sequence[Input]) -> TowerBatch:
    p, size = self.preprocess, self._size(self.image_tokens)
    image_bhwc = np.zeros((size, p.image_size, p.image_size, 3), np.float32)
    keys, faults = [], {}
    for key, (source, n) in inputs:
      example = pipeline.read_example(source, n, image=True, report=p.report)
      image = next((x for x in images_of(example) if store.key_of(x) == key), None)
      if image is None:
        raise UserError(
          f'the image of example {example["id"]!r} was changed while it was read; start again'
        )
      try:
        image_bhwc[len(keys)] = pipeline.pixels(transforms.decode(image), p)
        keys.append(key)
      except transforms.DecodeError as error:
        faults[key] = str(error)
    arrays = {
      'image': image_bhwc,
      'token_mask': np.zeros((size, 1), bool),
      'present': np.tile([True, False], (size, 1)),
    }
    return TowerBatch(keys, [None] * len(keys), arrays, faults)

  def _texts(self, inputs: Sequence[Input]) -> TowerBatch:
    length = max(self._length(x) for x in inputs)
    size = self._size(length)
    contents = [x.content for x in inputs]
    contents += [np.zeros(0, np.int32)] * (size - len(inputs))
    pad_id = self.preprocess.pad_id
    padded = [transforms.pad_tokens(ids, max_tokens=length, pad_id=pad_id) for ids in contents]
    tokens_bt, mask_bt = (np.stack(column) for column in zip(*padded, strict=True))
    arrays = {
      'tokens': tokens_bt,
      'token_mask': mask_bt,
      'present': np.tile([False, True], (size, 1)),
    }
    groups = packing.groups(size, (self.shards, 1))
    arrays |= packing.token_positions(mask_bt, groups)
    return TowerBatch([x.key for x in inputs], [len(x.content) for x in inputs], arrays, {})
