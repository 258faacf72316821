"""Batches of augmented pairs for pretraining, with Grain: shuffled, prefetched, exactly resumable.

A batch is a dict of numpy arrays (B pairs, S image size, T = max_tokens):

  image                                   float32[B, S, S, 3]  a random view of the picture; zeros
                                                               where it cannot be decoded
  image_augmented                         float32[B, S, S, 3]  another one, with two views of
                                                               images: of the same picture, or of
                                                               any with the same text
  tokens, token_mask                      int32, bool[B, T]    of the text, varied at random
  tokens_augmented, token_mask_augmented  int32, bool[B, T]    of another variation, with two views
                                                               of texts
  text_pooled                             float32[B, D]        in the place of all tokens, where the
                                                               text tower is frozen
  weight                                  float32[B]           0 where the picture cannot be
                                                               decoded, else 1
  index                                   int32[B]             position in the source
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from PIL import Image

from molt_jax.data import bounds, examples, pipeline, transforms
from molt_jax.data.sources import Source
from molt_jax.pairs import augment

VIEWS = ('', '_augmented')
KEPT_SCALE = 2  # Pictures are kept at most this many times as large as the tower reads them.


@dataclasses.dataclass(frozen=True)
class PairViews:
  """What is made of a pair.

  Attributes:
    image: how images are varied.
    text: how texts are varied.
    num_views: {'image': 1 or 2, 'text': 1 or 2}.
    across: whether the second view of an image is of any picture with the same text (perhaps the
      same picture), not only of the same one.
    keep: whether decoded pictures stay in memory.
  """

  image: augment.ImageAugmentation
  text: augment.TextAugmentation
  num_views: Mapping[str, int]
  across: bool
  keep: bool


class _Pictures:
  """Decoded pictures of a source, at most KEPT_SCALE times `size` on the shorter side. Threads may
  share it: a race only decodes twice.
  """

  def __init__(self, source: Source, preprocess: examples.Preprocess, *, keep: bool):
    self._source, self._preprocess, self._keep = source, preprocess, keep
    self._pixels: dict[int, np.ndarray | None] = {}

  def get(self, index: int) -> Image.Image | None:
    """Returns an RGB image, None where it cannot be decoded (which is reported)."""
    if index in self._pixels:
      pixels_hwc = self._pixels[index]
      return None if pixels_hwc is None else Image.fromarray(pixels_hwc)
    image = self._decode(index)
    if self._keep:
      self._pixels[index] = None if image is None else np.asarray(image)
    return image

  def _decode(self, index):
    example = examples.read_example(self._source, index, image=True, report=self._preprocess.report)
    if example['image'] is None:
      return None
    try:
      image = transforms.decode(example['image'])
    except transforms.DecodeError as error:
      self._preprocess.report.add(example['id'], 'image', str(error))
      return None
    size = KEPT_SCALE * self._preprocess.image_size
    if self._preprocess.resize == 'letterbox':
      if max(image.size) ** 2 > bounds.MAX_PIXELS:  # Too much for a square.
        image = self._shrunk(image, size / max(image.size))
      image = _squared(image, self._preprocess.mean)
    if self._preprocess.resize == 'squash':
      image = self._resized(image, (min(image.size),) * 2)
    elif self._preprocess.resize == 'crop':
      image = transforms.cut_strip(image)  # Crops lie in the square in its middle.
    return self._shrunk(image, size / min(image.size))

  def _shrunk(self, image: Image.Image, scale: float) -> Image.Image:
    """Resizes an image if that makes it smaller."""
    if scale >= 1:
      return image
    return self._resized(image, tuple(max(1, round(side * scale)) for side in image.size))

  def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return transforms.resized(image, size, self._preprocess.resample)


def _squared(image: Image.Image, mean: Sequence[float]) -> Image.Image:
  """Pads an image to a square with the mean colour, as `transforms.preprocess_image`
  letterboxes.
  """
  side = max(image.size)
  square = Image.new('RGB', (side, side), tuple(round(255 * m) for m in mean))
  square.paste(image, tuple((side - s) // 2 for s in image.size))
  return square


def complete_rows(source: Source) -> np.ndarray:
  """Returns the positions of the rows that have an image and a text."""
  return np.flatnonzero(source.present.all(axis=1))


def train_iterator(
  source: Source,
  preprocess: examples.Preprocess,
  views: PairViews,
  how: pipeline.Batching,
  *,
  seed: int,
  text_pooled_nd: np.ndarray | None = None,
) -> grain.DatasetIterator:
  """Returns an endless iterator of batches of pairs; `get_state` and `set_state` resume exactly.

  Epoch e is a permutation of the complete rows, a function of (seed, e); a view is a function of
  (seed, e, id of the example).

  Args:
    source: the training split; rows that lack a modality are left out.
    preprocess: how pictures are normalised and texts encoded.
    views: what is made of a pair.
    how: how batches are made, by one process and not packed.
    seed: root of order and augmentation.
    text_pooled_nd: float32[N, D], in the place of the source's texts; None: they are encoded.
  """
  rows = complete_rows(source)
  shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  maker = _PairMaker(source, preprocess, views, seed, rows, text_pooled_nd)
  order = grain.MapDataset.range(len(rows)).shuffle(seed=shuffle_seed).repeat()
  return iter(how.ahead(order.map_with_index(maker.make).batch(how.batch_size)))


def _siblings(source: Source, rows: np.ndarray) -> dict[int, np.ndarray]:
  """Returns row -> the rows with the same text, itself among them."""
  by_text = collections.defaultdict(list)
  for row in rows.tolist():
    by_text[source.read(row, image=False)['text']].append(row)
  return {row: np.array(same) for same in by_text.values() for row in same}


class _PairMaker:
  """Makes one pair of a batch; arguments as those of `train_iterator`."""

  def __init__(
    self,
    source: Source,
    preprocess: examples.Preprocess,
    views: PairViews,
    seed: int,
    rows: np.ndarray,
    text_pooled_nd: np.ndarray | None,
  ):
    self._source, self._preprocess, self._views = source, preprocess, views
    self._seed, self._rows, self._text_pooled_nd = seed, rows, text_pooled_nd
    self._pictures = _Pictures(source, preprocess, keep=views.keep)
    self._siblings = None
    if views.across and views.num_views['image'] == 2:
      self._siblings = _siblings(source, rows)

  def make(self, position: int, row: int) -> dict[str, np.ndarray]:
    """`position` in the endless stream tells the epoch, `row` which of the complete rows."""
    index, epoch = int(self._rows[row]), position // len(self._rows)
    draw = functools.partial(augment.generator, self._seed, epoch, self._source.ids[index])
    image = self._pictures.get(index)
    pair = {'weight': np.float32(image is not None), 'index': np.int32(index)}
    for view in VIEWS[: self._views.num_views['image']]:
      rng = draw('image' + view)
      seen = image
      if view and self._siblings:
        seen = self._pictures.get(int(rng.choice(self._siblings[index])))
      seen = image if seen is None else seen
      pair['image' + view] = _image(seen, self._preprocess, self._views.image, rng)
    if self._text_pooled_nd is not None:
      return pair | {'text_pooled': self._text_pooled_nd[index]}
    text = self._source.read(index, image=False)['text']
    for view in VIEWS[: self._views.num_views['text']]:
      written = augment.augment_text(text, self._views.text, draw('text' + view))
      pair['tokens' + view], pair['token_mask' + view] = self._tokens(written)
    return pair

  def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    p = self._preprocess
    ids = p.encode(text, p.max_tokens)
    return transforms.pad_tokens(ids, max_tokens=p.max_tokens, pad_id=p.pad_id)


def _image(image: Image.Image | None, preprocess, how, rng) -> np.ndarray:
  size = preprocess.image_size
  if image is None:
    return np.zeros((size, size, 3), np.float32)
  view = augment.augment_image(image, how, rng, size=size, resample=preprocess.resample)
  return examples.pixels(view, preprocess)
