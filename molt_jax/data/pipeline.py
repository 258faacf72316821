"""Batches with Grain: shuffled, sharded, prefetched and exactly resumable for training; in order
and padded for evaluation.

A batch is a dict of numpy arrays (B examples, K classes; T = max_tokens or, with packed texts,
`packing.padded_length` of the batch's longest one):
  image       float32[B, size, size, 3]   zeros where absent
  tokens      int32[B, T]                 padding where absent
  token_mask  bool[B, T]                  True on real tokens; all False where the text is absent
  present     bool[B, 2]                  column 0 = image, column 1 = text
  label       int32[B], or float32[B, K] of zeros and ones when multi-label
  weight      float32[B]                  0 on a row that has neither modality left and on padding,
  else 1 index       int32[B]                    position in the source (`source.ids[index]`), -1 on
  padding token_position  int32[G, N]             packed texts only: where the real tokens are in
  each group of rows (`packing.py`); not there if N is no less

With stored taps, these stand in the place of image and tokens (L layers; I tokens of an image):
  image_taps  [B, L, I, D_i]              zeros where absent; not there when no row wants an image
  text_taps   [B, L, T, D_t]              zeros where absent and under padding; not there when no
  row wants a text
"""

import collections
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from molt_jax.data import formats, missing, packing, transforms
from molt_jax.data.sources import Source
from molt_jax.errors import UserError


class DecodeReport:
  """Counts the images and texts that could not be used and keeps the first names.

  Thread-safe; an example counts once however often it is read. Names and reasons come from files,
  so they are made fit for a terminal (`formats.one_line`).
  """

  def __init__(self, keep: int = 5):
    self._keep = keep
    self._lock = threading.Lock()
    self._reasons: dict[str, dict[str, str]] = collections.defaultdict(dict)

  def add(self, example_id: str, modality: str, reason: str) -> None:
    with self._lock:
      self._reasons[modality].setdefault(example_id, formats.one_line(reason))

  def counts(self) -> dict[str, int]:
    """Returns the number of examples that lost each modality, e.g. {'image': 3}."""
    with self._lock:
      return {modality: len(reasons) for modality, reasons in self._reasons.items()}

  def line(self) -> str:
    """Returns one line for the user, empty when nothing was lost."""
    with self._lock:
      return '; '.join(
        self._describe(modality, reasons) for modality, reasons in sorted(self._reasons.items())
      )

  def _describe(self, modality: str, reasons: dict[str, str]) -> str:
    named = list(reasons.items())[: self._keep]
    first = ', '.join(f'{formats.one_line(name)} ({reason})' for name, reason in named)
    more = f', and {len(reasons) - self._keep} more' if len(reasons) > self._keep else ''
    return (
      f'{len(reasons)} unusable {modality}{"s" if len(reasons) > 1 else ""} treated as '
      f'absent: {first}{more}'
    )


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """All that is needed to turn an example into arrays.

  Attributes:
    image_size: side of the image tower's input in pixels.
    mean: per channel, in [0, 1].
    std: per channel.
    resize: 'crop', 'letterbox' or 'squash', see `transforms.preprocess_image`.
    encode: the text tower's tokenizer, (text, max_tokens) -> at most max_tokens ids; called from
      several threads at once.
    pad_id: token id of padding.
    max_tokens: T, tokens kept of each text.
    num_classes: K.
    multi_label: whether labels are vectors of K zeros and ones.
    resample: a `PIL.Image.Resampling` value (3 = bicubic).
    report: where unusable images and texts are counted.
  """

  image_size: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  resize: str
  encode: Callable[[str, int], Sequence[int]]
  pad_id: int
  max_tokens: int
  num_classes: int
  multi_label: bool
  resample: int = 3
  report: DecodeReport = dataclasses.field(default_factory=DecodeReport, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class StoredTaps:
  """Where the taps of one modality of a split are.

  Attributes:
    keys: of each row; None where the content is not wanted or unusable.
    read: key -> [L, real tokens, D].
    tokens: key -> real tokens, without reading them.
    shape: (L, most tokens, D).
    dtype: of what `read` returns.
  """

  keys: Sequence[str | None]
  read: Callable[[str], np.ndarray]
  tokens: Callable[[str], int]
  shape: tuple[int, int, int]
  dtype: np.dtype


def take(
  source: Source, stored: Mapping[str, StoredTaps] | None, rows: Sequence[int]
) -> tuple[Source, dict[str, StoredTaps] | None]:
  """Returns these rows of a source, and of its taps where it has them."""
  part = missing.Part(source, tuple(rows))
  return part, stored and {
    m: dataclasses.replace(s, keys=[s.keys[row] for row in rows]) for m, s in stored.items()
  }


def _empty_content(preprocess: Preprocess) -> dict[str, np.ndarray]:
  size, length = preprocess.image_size, preprocess.max_tokens
  return {
    'image': np.zeros((size, size, 3), np.float32),
    'tokens': np.full(length, preprocess.pad_id, np.int32),
    'token_mask': np.zeros(length, bool),
    'present': np.zeros(2, bool),
  }


def pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
  """Returns a decoded image as the image tower wants it, float32[size, size, 3]."""
  return transforms.preprocess_image(
    image,
    size=preprocess.image_size,
    mean=preprocess.mean,
    std=preprocess.std,
    resize=preprocess.resize,
    resample=preprocess.resample,
  )


def _put_image(content: dict[str, np.ndarray], preprocess: Preprocess, image: Image.Image) -> None:
  content['image'] = pixels(image, preprocess)
  content['present'][0] = True


def _put_text(content: dict[str, np.ndarray], preprocess: Preprocess, text: str) -> None:
  ids = preprocess.encode(text, preprocess.max_tokens)
  content['tokens'], content['token_mask'] = transforms.pad_tokens(
    ids, max_tokens=preprocess.max_tokens, pad_id=preprocess.pad_id
  )
  content['present'][1] = len(ids) > 0


def _label(preprocess: Preprocess, label: int | Sequence[int]) -> np.ndarray:
  if not preprocess.multi_label:
    return np.int32(label)
  return np.isin(np.arange(preprocess.num_classes), label).astype(np.float32)


def read_example(
  source: Source, index: int, *, image: bool, report: DecodeReport
) -> dict[str, Any]:
  """Returns `source.read(index, image=image)`; a file that cannot be read is reported and its image
  None.
  """
  try:
    return source.read(index, image=image)
  except (
    OSError
  ) as error:  # An image file that vanished, or may not be read, costs its example the image.
    example = source.read(index, image=False)
    report.add(example['id'], 'image', error.strerror or str(error))
    return example


def _row(
  index: int, preprocess: Preprocess, *, source: Source, present_nm: np.ndarray
) -> dict[str, np.ndarray]:
  """Makes one row of a batch; `index` -1 makes a row of padding. What is absent is neither read nor
  decoded.
  """
  content = _empty_content(preprocess)
  label = () if preprocess.multi_label else 0
  if index >= 0:
    with_image, with_text = present_nm[index]
    example = read_example(source, index, image=with_image, report=preprocess.report)
    label = example['label']
    if example['image'] is not None:
      try:
        _put_image(content, preprocess, transforms.decode(example['image']))
      except transforms.DecodeError as error:
        preprocess.report.add(example['id'], 'image', str(error))
    if with_text:
      _put_text(content, preprocess, example['text'])
      if not content['present'][1]:
        preprocess.report.add(example['id'], 'text', 'no tokens')
  return content | {
    'label': _label(preprocess, label),
    'weight': np.float32(content['present'].any()),
    'index': np.int32(index),
  }


def _length(index: int, preprocess: Preprocess, *, source: Source, present_nm: np.ndarray) -> int:
  """Returns the tokens of a row's text; 0 where it is absent."""
  if index < 0 or not present_nm[index, 1]:
    return 0
  return len(preprocess.encode(source.read(index, image=False)['text'], preprocess.max_tokens))


def _rows(index_b: np.ndarray, preprocess: Preprocess, **how: Any) -> dict[str, np.ndarray]:
  rows = [_row(int(index), preprocess, **how) for index in index_b]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _stored_rows(
  index_b: np.ndarray,
  preprocess: Preprocess,
  *,
  source: Source,
  present_nm: np.ndarray,
  stored: Mapping[str, StoredTaps],
) -> dict[str, np.ndarray]:
  """As `_rows`, with taps for content. Nothing but taps is read."""
  batch, length_bm = {}, np.zeros((len(index_b), 2), int)
  for column, (modality, most) in enumerate((('image', None), ('text', preprocess.max_tokens))):
    if modality in stored:
      batch[f'{modality}_taps'], length_bm[:, column] = _read_taps(
        stored[modality], index_b, present_nm[:, column], most
      )
  empty = () if preprocess.multi_label else 0
  return batch | {
    'token_mask': np.arange(preprocess.max_tokens)[None, :] < length_bm[:, 1:],
    'present': length_bm > 0,
    'label': np.stack(
      [_label(preprocess, source.labels[index] if index >= 0 else empty) for index in index_b]
    ),
    'weight': (length_bm > 0).any(axis=1).astype(np.float32),
    'index': np.asarray(index_b, np.int32),
  }


def _read_taps(
  stored: StoredTaps, index_b: np.ndarray, present_n: np.ndarray, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (taps [B, L, `most` tokens, D], zeros where absent; real tokens int[B]); each is read
  into its place.
  """
  layers, all_tokens, width = stored.shape
  taps_blnd, length_b = (
    np.zeros((len(index_b), layers, most or all_tokens, width), stored.dtype),
    np.zeros(len(index_b), int),
  )
  for row, index in enumerate(index_b):
    if index >= 0 and present_n[index] and (key := stored.keys[index]) is not None:
      x_lnd = stored.read(key)
      length_b[row] = x_lnd.shape[1]
      taps_blnd[row, :, : length_b[row]] = x_lnd
  return taps_blnd, length_b


def _stored_length(
  index: int, preprocess: Preprocess, *, present_nm: np.ndarray, stored: Mapping[str, StoredTaps]
) -> int:
  if (
    index < 0
    or not present_nm[index, 1]
    or 'text' not in stored
    or (key := stored['text'].keys[index]) is None
  ):
    return 0
  return stored['text'].tokens(key)


def _batch_maker(
  source: Source,
  preprocess: Preprocess,
  present: np.ndarray | None,
  stored: Mapping[str, StoredTaps] | None,
  *,
  pack: tuple[int, int] | None,
  batch_size: int,
  process_index: int,
  process_count: int,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """Returns a function: indices of a batch over all processes -> this process's rows, in sizes that
  all processes find alike.
  """
  if present is not None and present.shape != (len(source), 2):
    raise ValueError(f'present must be bool[{len(source)}, 2], not {present.shape}')
  if batch_size % process_count:
    raise ValueError(f'batch_size {batch_size} is not a multiple of process_count {process_count}')
  present_nm = source.present if present is None else source.present & present
  make_rows = functools.partial(_rows, source=source, present_nm=present_nm)
  length_of = functools.partial(_length, source=source, present_nm=present_nm)
  if stored:
    make_rows = functools.partial(_stored_rows, source=source, present_nm=present_nm, stored=stored)
    length_of = functools.partial(_stored_length, present_nm=present_nm, stored=stored)

  usual = 0
  if (
    pack and stored and 'text' in stored
  ):  # Lengths are known without reading, so nearly all batches can be of one size.
    usual = packing.usual_size(
      [length_of(index, preprocess) for index in range(len(source))], batch_size // math.prod(pack)
    )

  def make(index_b):
    fitted = preprocess
    if pack:
      length_b = np.array([length_of(int(index), preprocess) for index in index_b])
      fitted = dataclasses.replace(
        preprocess, max_tokens=packing.padded_length(length_b.max(), preprocess.max_tokens)
      )
    batch = make_rows(np.split(index_b, process_count)[process_index], fitted)
    if pack and {'tokens', 'text_taps'} & batch.keys():
      size = max(
        usual, packing.packed_size(length_b[packing.groups(batch_size, pack)].sum(axis=1).max())
      )
      batch |= packing.token_positions(
        batch['token_mask'],
        packing.groups(len(batch['index']), (pack[0] // process_count, pack[1])),
        size,
      )
    return batch

  return make


def local_batches(
  rows: grain.MapDataset,
  *,
  batch_size: int,
  num_threads: int,
  prefetch: int,
  process_index: int,
  process_count: int,
) -> grain.IterDataset:
  """Cuts a stream of rows into batches and keeps this process's part; the parts of all processes,
  joined, are the batch of a single process.
  """
  if batch_size % process_count:
    raise ValueError(f'batch_size {batch_size} is not a multiple of process_count {process_count}')
  return _ahead(
    rows.batch(batch_size // process_count)[process_index::process_count], num_threads, prefetch
  )


def _ahead(batches: grain.MapDataset, num_threads: int, prefetch: int) -> grain.IterDataset:
  return batches.to_iter_dataset(
    grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))
  )


def train_iterator(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  seed: int,
  present: np.ndarray | None = None,
  stored: Mapping[str, StoredTaps] | None = None,
  pack: tuple[int, int] | None = None,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless iterator of training batches.

  Epoch e is a permutation of the source, a function of (seed, e) alone. Epochs follow each other
  without a gap and are cut into batches afterwards, so a batch may span two of them and no example
  is dropped. `get_state` and `set_state` resume exactly.

  Args:
    source: the training split.
    preprocess: how an example becomes arrays.
    batch_size: examples a batch over all processes; each process gets batch_size / process_count of
      them.
    seed: root of the order.
    present: bool[N, 2], what the protocol leaves (`missing.present_table`); combined with what the
      source has by nature.
    stored: taps by modality, to be read in the place of images and texts; None: images and texts.
    pack: (shards, parts), see `packing.groups`: pad texts to `padded_length` of the batch's longest
      one, not to max_tokens, and say where the real tokens are. Which examples are in a batch does
      not change.
    num_threads: threads that read, decode and tokenise, one batch each.
    prefetch: batches prepared ahead.
    process_index: this process's number in [0, process_count).
    process_count: number of processes that share the data.
  """
  # Grain shuffles epoch e with seed + e: hashed, so that seed 1 does not begin with the second
  # epoch of seed 0.
  shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  make = _batch_maker(
    source,
    preprocess,
    present,
    stored,
    pack=pack,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )
  order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat()
  return iter(_ahead(order.batch(batch_size).map(make), num_threads, prefetch))


def eval_batches(
  source: Source,
  preprocess: Preprocess,
  *,
  batch_size: int,
  present: np.ndarray | None = None,
  stored: Mapping[str, StoredTaps] | None = None,
  pack: tuple[int, int] | None = None,
  num_threads: int = 2,
  prefetch: int = 4,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Returns an iterable over every example once, in order; the last batch is filled up with rows of
  weight 0 and index -1.

  Arguments are those of `train_iterator`. Every process gets the same number of batches.
  """
  make = _batch_maker(
    source,
    preprocess,
    present,
    stored,
    pack=pack,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )
  n = len(source)
  order = grain.MapDataset.range(-(-n // batch_size) * batch_size).map(
    lambda index: index if index < n else -1
  )
  return _ahead(order.batch(batch_size).map(make), num_threads, prefetch)


def single_example(
  preprocess: Preprocess,
  image: str | os.PathLike | Image.Image | np.ndarray | None = None,
  text: str | None = None,
) -> dict[str, np.ndarray]:
  """Prepares one example for prediction.

  Args:
    preprocess: how it becomes arrays.
    image: path of a file, PIL image, uint8 array [H, W] or [H, W, 3 or 4], or None: absent. The
      rules of `modes` hold for all of them.
    text: or None: absent; a blank text is absent too.

  Returns:
    {'image': float32[size, size, 3], 'tokens': int32[T], 'token_mask': bool[T], 'present': bool[2]}

  Raises:
    UserError: the image cannot be read or decoded, or neither modality is there.
  """
  content = _empty_content(preprocess)
  if image is not None:
    _put_image(content, preprocess, _open(image))
  if text is not None and text.strip():
    _put_text(content, preprocess, text)
  if not content['present'].any():
    raise UserError('neither an image nor a text was given: give at least one of the two')
  return content


def _open(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
  if isinstance(image, np.ndarray):
    colours = image.ndim == 3 and image.shape[2] in (3, 4)
    if image.dtype != np.uint8 or not (image.ndim == 2 or colours) or not image.size:
      raise UserError(
        f'image is an array {image.dtype}{list(image.shape)}: give uint8 [H, W] or [H, W, 3 or 4]'
      )
    image = Image.fromarray(image)
  in_memory = isinstance(image, Image.Image)
  name = 'image' if in_memory else f'image {str(image)!r}'
  try:
    return transforms.as_rgb(image) if in_memory else transforms.decode(formats.read_file(image))
  except OSError as error:
    raise UserError(
      f'{name} cannot be opened ({error.strerror}): give the path of an image file'
    ) from error
  except transforms.DecodeError as error:
    raise UserError(f'{name} cannot be decoded ({error}): save it anew, or give another') from error
