"""Batches with Grain: shuffled, sharded, prefetched and exactly resumable for training; in order
and padded for evaluation.

A batch is a dict of numpy arrays (B examples, K classes; T = max_tokens or, with packed texts,
`packing.padded_length` of the batch's longest one):

  image           float32[B, size, size, 3]   zeros where absent
  tokens          int32[B, T]                 padding where absent
  token_mask      bool[B, T]                  True on real tokens; all False where absent
  present         bool[B, 2]                  column 0 = image, column 1 = text
  label           int32[B]                    or, multi-label, float32[B, K] of zeros and ones
  weight          float32[B]                  0 on padding and on an example that has neither
                                              modality left, else 1
  index           int32[B]                    position in the source (`source.ids[index]`), -1 on
                                              padding
  image_mask      bool[B, n]                  where an example may have several images, which are
                                              there; image is then float32[B, n, size, size, 3]
  token_position  int32[G, N]                 packed texts alone: where the real tokens are in each
                                              group of examples (`packing`); not there if N is no
                                              less than all positions

With stored hidden states, these stand in the place of image and tokens (L layers; I tokens of an
image):

  image_states      [B, L, I, D_i]              zeros where absent; not there when no example wants
  an
                                              image
  text_states       [B, L, T, D_t]              zeros where absent and under padding; not there when
                                              no example wants a text
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from molt_jax.data import cached, examples, packing
from molt_jax.data.cached import CachedStates, take
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.examples import Preprocess, pixels, read_example, single_example
from molt_jax.data.sources import Source

if TYPE_CHECKING:  # A fifth of a second, that a single prediction has no use for.
  import grain

# What batches are made of lies in modules of its own, and is found here too.
__all__ = [
  'DecodeReport',
  'Preprocess',
  'Batching',
  'CachedStates',
  'eval_batches',
  'pixels',
  'read_example',
  'single_example',
  'take',
  'train_iterator',
]


@dataclasses.dataclass(frozen=True)
class Batching:
  """How a stream of examples is cut into batches.

  Attributes:
    batch_size: over all processes; each of them gets batch_size / process_count examples.
    pack: (shards, parts), see `packing.groups`: pad texts to `padded_length` of the batch's longest
      one, not to max_tokens, and add where the real tokens are. The examples of a batch stay.
    num_threads: threads that read, decode and tokenise, one batch each.
    prefetch: batches prepared ahead.
    process_index, process_count: this process among those that share the data.
  """

  batch_size: int
  pack: tuple[int, int] | None = None
  num_threads: int = 2
  prefetch: int = 4
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    if self.batch_size % self.process_count:
      raise ValueError(
        f'batch_size {self.batch_size} is not a multiple of process_count {self.process_count}'
      )

  def ahead(self, batches: 'grain.MapDataset') -> 'grain.IterDataset':
    """Returns batches that threads prepare ahead."""
    import grain

    buffer = max(self.prefetch, self.num_threads)
    return batches.to_iter_dataset(
      grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=buffer)
    )


@dataclasses.dataclass
class _BatchMaker:
  """Makes this process's part of a batch, in sizes that all processes find alike.

  Attributes: as the arguments of `train_iterator`.
  """

  source: Source
  preprocess: Preprocess
  how: Batching
  present: np.ndarray | None
  stored: Mapping[str, CachedStates] | None

  def __post_init__(self):
    if self.present is not None and self.present.shape != (len(self.source), 2):
      raise ValueError(f'present must be bool[{len(self.source)}, 2], not {self.present.shape}')
    if (images := getattr(self.source, 'most_images', 1)) > 1:
      self.preprocess = dataclasses.replace(self.preprocess, images=images)
    self._present_nm = self.source.present
    if self.present is not None:
      self._present_nm = self.source.present & self.present
    self._usual_size = self._find_usual_size()

  def _find_usual_size(self) -> int:
    """Stored lengths are known without reading, so nearly all batches can be of one size."""
    if not self.how.pack or not self.stored or 'text' not in self.stored:
      return 0
    lengths = [self._text_length(index) for index in range(len(self.source))]
    return packing.usual_size(lengths, self.how.batch_size // math.prod(self.how.pack))

  def _text_length(self, index: int) -> int:
    if self.stored:
      return cached.text_length(index, present_nm=self._present_nm, stored=self.stored)
    return examples.text_length(
      index, self.preprocess, source=self.source, present_nm=self._present_nm
    )

  def _stack(self, index_b: np.ndarray, preprocess: Preprocess) -> dict[str, np.ndarray]:
    data = {'source': self.source, 'present_nm': self._present_nm}
    if self.stored:
      return cached.stack_examples(index_b, preprocess, stored=self.stored, **data)
    return examples.stack_examples(index_b, preprocess, **data)

  def make(self, index_b: np.ndarray) -> dict[str, np.ndarray]:
    """Returns this process's examples of the batch that has these indices over all processes."""
    own_b = np.split(index_b, self.how.process_count)[self.how.process_index]
    if not self.how.pack:
      return self._stack(own_b, self.preprocess)
    length_b = np.array([self._text_length(int(index)) for index in index_b])
    longest = packing.padded_length(length_b.max(), self.preprocess.max_tokens)
    batch = self._stack(own_b, dataclasses.replace(self.preprocess, max_tokens=longest))
    if not {'tokens', 'text_states'} & batch.keys():
      return batch
    return batch | self._token_positions(batch['token_mask'], length_b)

  def _token_positions(self, mask_bt: np.ndarray, length_b: np.ndarray) -> dict[str, np.ndarray]:
    """`packing.token_positions` of this process's `mask_bt`; `length_b` is that of all of them."""
    shards, parts = self.how.pack
    tokens_g = length_b[packing.groups(self.how.batch_size, self.how.pack)].sum(axis=1)
    size = max(self._usual_size, packing.packed_size(tokens_g.max()))
    own_gr = packing.groups(len(mask_bt), (shards // self.how.process_count, parts))
    return packing.token_positions(mask_bt, own_gr, size)


def train_iterator(
  source: Source,
  preprocess: Preprocess,
  how: Batching,
  *,
  seed: int,
  present: np.ndarray | None = None,
  stored: Mapping[str, CachedStates] | None = None,
) -> 'grain.DatasetIterator':
  """Returns an endless iterator of training batches.

  Epoch e is a permutation of the source, a function of (seed, e) alone. Epochs follow each other
  without a gap and are cut into batches afterwards, so a batch may span two of them and no example
  is dropped. `get_state` and `set_state` resume exactly.

  Args:
    source: the training split.
    preprocess: how an example becomes arrays.
    how: how batches are made.
    seed: root of the order.
    present: bool[N, 2], what the missing-rate protocol leaves (`missing.present_table`); combined
      with what the source has.
    stored: hidden states by modality, in the place of images and texts; None: images and texts.
  """
  import grain

  # Grain shuffles epoch e with seed + e: hashed, so that seed 1 does not begin with the second
  # epoch of seed 0.
  shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  maker = _BatchMaker(source, preprocess, how, present, stored)
  order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat()
  return iter(how.ahead(order.batch(how.batch_size).map(maker.make)))


def eval_batches(
  source: Source,
  preprocess: Preprocess,
  how: Batching,
  *,
  present: np.ndarray | None = None,
  stored: Mapping[str, CachedStates] | None = None,
) -> 'grain.IterDataset':
  """Returns an iterable over every example once, in order.

  The last batch is filled up with padding, of weight 0 and index -1. Every process gets the same
  number of batches. Arguments are those of `train_iterator`.
  """
  import grain

  maker = _BatchMaker(source, preprocess, how, present, stored)
  n, b = len(source), how.batch_size
  order = grain.MapDataset.range(-(-n // b) * b).map(lambda index: index if index < n else -1)
  return how.ahead(order.batch(b).map(maker.make))
