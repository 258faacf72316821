"""Answers of a trained classifier under each missing pattern, with every program compiled before
the first request.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.config import resolved
from molt_jax.data import cells, pipeline, transforms
from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.errors import UserError, article
from molt_jax.evaluation import contributions, prediction_sets
from molt_jax.evaluation.prediction_sets import Calibration
from molt_jax.features.frozen import needed
from molt_jax.methods.base import ClassVectors
from molt_jax.runtime import compiling, console, sharding

VIEWS = ('complete', 'image', 'text')  # As PATTERNS has them: all that is there, or one alone.
SHORT = 32  # Tokens; longer texts are padded to the most there are.
_NAMES = ('image', 'tokens', 'token_mask', 'present')


class Kind(NamedTuple):
  """What the examples of a batch have in common: whether there is an image, how long texts are
  padded (0: there is none), and whether image and text are answered alone too.
  """

  image: bool
  length: int
  views: bool = False


class Service:
  """A model, ready to answer.

  Attributes:
    sizes: of batches, ascending. Examples with views come alone: they are for somebody who looks.
    calibration: what prediction sets are made by; None: the run has none.
  """

  def __init__(self, model: Any, max_batch: int = 16):
    """
    Args:
      model: a `molt_jax.predict.Predictor`.
      max_batch: most examples that are answered together.

    Raises:
      UserError: a tower cannot be loaded.
    """
    self._assembly = model.run.assembly
    self.class_names: list[str] = list(model.class_names)
    self.modalities = resolved.modalities(model.config)
    self.multi_label = bool(model.config.dataset.multi_label)
    self._towers = model.towers(self.modalities)
    self._variables = ClassVectors(self._assembly.method)(model.variables, self._towers)
    rows = self._assembly.mesh.shape['data']
    self._rows = rows
    self.sizes = sorted({min(max_batch, 4**power) for power in range(6)})
    self.calibration = _calibration(model)
    self._plain = compiling.jit(functools.partial(self._answered, patterns=PATTERNS[:1]))
    self._views = compiling.jit(functools.partial(self._answered, patterns=PATTERNS))
    self._empty = self._nothing()

  # ---- Examples ----------------------------------------------------------------------------------

  def example(
    self, image: bytes | None, text: str | None, views: bool = False
  ) -> tuple[Kind, dict[str, np.ndarray]]:
    """Returns the kind and the arrays of an example; threads may call it at once.

    Args:
      image: the bytes of an image file; None or empty: absent.
      text: None, blank or a word for nothing, such as nan: absent, as in `predict`.
      views: whether image and text are answered alone too.

    Raises:
      UserError: nothing is there, the model does not read it, or the image cannot be decoded.
    """
    has_text = bool(text and text.strip()) and not cells.is_null_word(text)
    given = {'image': image or None, 'text': text if has_text else None}
    for modality, content in given.items():
      if content is not None and modality not in self.modalities:
        raise UserError(f'{article(modality)} was given, which this model does not read')
    if given['image'] is not None:
      try:
        given['image'] = transforms.decode(given['image'])
      except transforms.DecodeError as error:
        raise UserError(f'the image cannot be decoded ({error}): give PNG or JPEG') from error
    example = pipeline.single_example(self._assembly.preprocess, **given)
    return self._kind(example, views), example

  def _kind(self, example: Mapping[str, np.ndarray], views: bool) -> Kind:
    has_image, has_text = example['present']
    if not has_text:
      return Kind(bool(has_image), 0)
    most = len(example['token_mask'])
    short = min(SHORT, most)
    length = short if example['token_mask'].sum() <= short else most
    return Kind(bool(has_image), length, bool(views and has_image))

  def _nothing(self) -> dict[str, np.ndarray]:
    preprocess = self._assembly.preprocess
    size, length = preprocess.image_size, preprocess.max_tokens
    return {
      'image': np.zeros((size, size, 3), np.float32),
      'tokens': np.full(length, preprocess.pad_id, np.int32),
      'token_mask': np.zeros(length, bool),
      'present': np.zeros(2, bool),
    }

  # ---- Batches -----------------------------------------------------------------------------------

  def sizes_of(self, kind: Kind) -> Sequence[int]:
    """Returns the sizes of batches of a kind."""
    return self.sizes[:1] if kind.views else self.sizes

  def compute(self, kind: Kind, examples: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Returns the probabilities float32[3, K] of each example: with all that is there, with its
    image alone, with its text alone. Without views the last two are as the first one, which they
    are for an example that has one of the two.
    """
    rows = -(-len(examples) // self._rows) * self._rows
    filled = [*examples, *[self._empty] * (rows - len(examples))]
    batch = {name: np.stack([example[name] for example in filled]) for name in _NAMES}
    length = max(kind.length, 1)
    batch['tokens'] = np.ascontiguousarray(batch['tokens'][:, :length])
    batch['token_mask'] = np.ascontiguousarray(batch['token_mask'][:, :length])
    batch = sharding.put_batch(batch, self._assembly.mesh)
    step = self._views if kind.views else self._plain
    p_vbk = np.asarray(step(self._variables, self._frozen(kind), batch))
    p_vbk = np.broadcast_to(p_vbk, (len(PATTERNS), *p_vbk.shape[1:]))
    return list(np.moveaxis(p_vbk, 0, 1)[: len(examples)])

  def _frozen(self, kind: Kind) -> dict[str, Any]:
    """The towers that a batch needs; one that the method always runs is there too."""
    used = {'image': kind.image, 'text': kind.length > 0}
    wanted = needed(self._assembly.method.reads, [m for m in MODALITIES if used[m]])
    return {m: self._towers[m] if m in wanted else None for m in MODALITIES}

  def _answered(self, variables, frozen, batch, *, patterns):
    method = self._assembly.method
    features = method.features(frozen, batch)

    def one(pattern_m):
      present_bm = batch['present'] & pattern_m[None]
      logits_bk = method(variables, frozen, features, batch, present_bm).logits_bk
      return jax.nn.sigmoid(logits_bk) if self.multi_label else jax.nn.softmax(logits_bk)

    return jax.lax.map(one, jnp.asarray(patterns))

  def kinds(self) -> Iterator[Kind]:
    """Yields every kind of batch that can come."""
    most = self._assembly.preprocess.max_tokens
    lengths = sorted({min(SHORT, most), most}) if 'text' in self.modalities else []
    images = [True, False] if 'image' in self.modalities else [False]
    for image, length in itertools.product(images, [0, *lengths]):
      if image or length:
        yield Kind(image, length)
      if image and length:
        yield Kind(image, length, views=True)

  def warm_up(self) -> int:
    """Compiles and runs every program; returns their number."""
    wanted = [(kind, size) for kind in self.kinds() for size in self.sizes_of(kind)]
    with console.progress('compiling', len(wanted), 'programs') as bar:
      for kind, size in wanted:
        present = np.array([kind.image, kind.length > 0])
        mask = np.arange(len(self._empty['token_mask'])) < kind.length
        example = {**self._empty, 'present': present, 'token_mask': mask}
        self.compute(kind, [example] * size)
        bar.advance(1)
    return len(wanted)

  # ---- Answers -----------------------------------------------------------------------------------

  def answer(
    self,
    present_m: np.ndarray,
    p_vk: np.ndarray,
    *,
    top_k: int = 5,
    views: bool = False,
    coverage: float | None = None,
  ) -> dict[str, Any]:
    """Returns what a request is answered.

    Args:
      present_m: bool[2], what the example has.
      p_vk: as `compute` returned it.
      top_k: labels.
      views: whether to tell what image and text alone are answered; the example was made with it.
      coverage: see `Predictor.predict`.

    Returns:
      As `Predictor.predict`, with 'views': {'complete': labels, 'image': labels, 'text': labels},
      None for what is not there, and 'shares': {'image', 'text'}, what each brought to the
      likeliest label, in nats (`evaluation.contributions`).

    Raises:
      UserError: the probabilities are not finite, or sets cannot be made.
    """
    present_m = np.asarray(present_m, bool)
    if not np.isfinite(p_vk[0]).all():
      raise UserError('the probabilities are not finite; check the towers')
    found: dict[str, Any] = {'labels': self._labels(p_vk[0], top_k)}
    found |= {'image': bool(present_m[0]), 'text': bool(present_m[1])}
    if views:
      there = [present_m.any(), *present_m]
      found['views'] = {
        name: self._labels(p_k, top_k) if is_there else None
        for name, p_k, is_there in zip(VIEWS, p_vk, there, strict=True)
      }
    if views and self.calibration is not None:
      found['shares'] = self._shares(present_m, p_vk)
    if coverage is not None:
      if self.calibration is None:
        raise UserError('coverage: this model was written without a calibration; leave it out')
      rule = self.calibration.rule(coverage)
      (in_k,) = rule.members(p_vk[:1], present_m[None])
      found['set'] = prediction_sets.names_in(p_vk[0], in_k, self.class_names)
      found['coverage'] = coverage
    return found

  def _shares(self, present_m: np.ndarray, p_vk: np.ndarray) -> dict[str, float]:
    label = int(p_vk[0].argmax())
    value_v1 = np.log(np.maximum(p_vk[:, label, None].astype(np.float64), contributions.LEAST))
    nothing_1 = np.log(self.calibration.prior_k[[label]])
    (share_m,) = contributions.shares(value_v1, nothing_1, present_m[None])
    return {name: round(float(x), 4) for name, x in zip(MODALITIES, share_m, strict=True)}

  def _labels(self, p_k: np.ndarray, top_k: int) -> list[dict[str, Any]]:
    best = np.argsort(-p_k, kind='stable')[:top_k]
    return [{'label': self.class_names[k], 'probability': round(float(p_k[k]), 6)} for k in best]


def _calibration(model: Any) -> Calibration | None:
  try:
    return model.calibration
  except UserError as error:
    console.log(f'served without prediction sets: {error}')
    return None
