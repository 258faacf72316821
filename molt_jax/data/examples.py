"""How an example of a data set becomes arrays."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from molt_jax.data import formats, transforms
from molt_jax.data.decode_report import DecodeReport
from molt_jax.data.sources import Source, images_of
from molt_jax.errors import UserError


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
    scaled, rounded: see `transforms.preprocess_image`.
    images: most images of an example; where that is more than one, examples have an `image_mask`.
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
  scaled: int = 0
  rounded: bool = True
  images: int = 1
  report: DecodeReport = dataclasses.field(default_factory=DecodeReport, compare=False, repr=False)


def pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
  """Returns a decoded image as the image tower wants it, float32[size, size, 3]."""
  return transforms.preprocess_image(
    image,
    size=preprocess.image_size,
    mean=preprocess.mean,
    std=preprocess.std,
    resize=preprocess.resize,
    resample=preprocess.resample,
    scaled=preprocess.scaled,
    rounded=preprocess.rounded,
  )


def read_example(
  source: Source, index: int, *, image: bool, report: DecodeReport
) -> dict[str, Any]:
  """Returns `source.read(index, image=image)`; the image is None, and reported, if it cannot be."""
  try:
    example = source.read(index, image=image)
  # An image file that vanished, or may not be read, costs its example the image alone.
  except OSError as error:
    example = source.read(index, image=False)
    report.add(example['id'], 'image', error.strerror or str(error))
  for why in example.get('lost', ()):
    report.add(example['id'], 'image', why)
  return example


def make_example(
  index: int, preprocess: Preprocess, *, source: Source, present_nm: np.ndarray
) -> dict[str, np.ndarray]:
  """Makes one example of a batch, of padding if `index` is -1.

  What is absent is neither read nor decoded.
  """
  content = _empty_content(preprocess)
  label = () if preprocess.multi_label else 0
  if index >= 0:
    with_image, with_text = present_nm[index]
    example = read_example(source, index, image=with_image, report=preprocess.report)
    label = example['label']
    for image in images_of(example):
      try:
        _put_image(content, preprocess, transforms.decode(image))
      except transforms.DecodeError as error:
        preprocess.report.add(example['id'], 'image', str(error))
    if with_text:
      _put_text(content, preprocess, example['text'])
      if not content['present'][1]:
        preprocess.report.add(example['id'], 'text', 'no tokens')
  return content | {
    'label': label_array(preprocess, label),
    'weight': np.float32(content['present'].any()),
    'index': np.int32(index),
  }


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


def stack_examples(
  index_b: np.ndarray, preprocess: Preprocess, **data: Any
) -> dict[str, np.ndarray]:
  """Makes the examples of a batch; `data` as for `make_example`."""
  examples = [make_example(int(index), preprocess, **data) for index in index_b]
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def text_length(
  index: int, preprocess: Preprocess, *, source: Source, present_nm: np.ndarray
) -> int:
  """Returns the number of tokens of an example's text; 0 where it is absent."""
  if index < 0 or not present_nm[index, 1]:
    return 0
  return len(preprocess.encode(source.read(index, image=False)['text'], preprocess.max_tokens))


def _empty_content(preprocess: Preprocess) -> dict[str, np.ndarray]:
  size, length, count = preprocess.image_size, preprocess.max_tokens, preprocess.images
  content = {
    'image': np.zeros((size, size, 3), np.float32),
    'tokens': np.full(length, preprocess.pad_id, np.int32),
    'token_mask': np.zeros(length, bool),
    'present': np.zeros(2, bool),
  }
  if count > 1:
    content['image'] = np.zeros((count, size, size, 3), np.float32)
    content['image_mask'] = np.zeros(count, bool)
  return content


def _put_image(content: dict[str, np.ndarray], preprocess: Preprocess, image: Image.Image) -> None:
  """Puts an image into its place, the next one where there may be several."""
  content['present'][0] = True
  if 'image_mask' not in content:
    content['image'] = pixels(image, preprocess)
    return
  place = int(content['image_mask'].sum())
  content['image'][place] = pixels(image, preprocess)
  content['image_mask'][place] = True


def _put_text(content: dict[str, np.ndarray], preprocess: Preprocess, text: str) -> None:
  ids = preprocess.encode(text, preprocess.max_tokens)
  content['tokens'], content['token_mask'] = transforms.pad_tokens(
    ids, max_tokens=preprocess.max_tokens, pad_id=preprocess.pad_id
  )
  content['present'][1] = len(ids) > 0


def label_array(preprocess: Preprocess, label: int | Sequence[int]) -> np.ndarray:
  """Returns a label as it is in a batch."""
  if not preprocess.multi_label:
    return np.int32(label)
  return np.isin(np.arange(preprocess.num_classes), label).astype(np.float32)


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
