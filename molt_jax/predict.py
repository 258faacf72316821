"""Predicts from an image, a text or both: `python -m molt_jax.predict --workdir=DIR [--image=FILE] [--text=STRING]`."""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from molt_jax import cli, sharding, trained
from molt_jax import config as config_lib
from molt_jax import model as model_lib
from molt_jax.config import UserError
from molt_jax.data import pipeline


class Predictor:
  """A trained classifier, ready to use; made by `molt_jax.load(DIR)`. A tower is loaded when an input first needs it."""

  def __init__(self, workdir: str | pathlib.Path):
    """Opens the run in `workdir`.

    Raises:
      UserError: no run there or a damaged one, or a tower that is gone or has changed.
    """
    run = trained.open_run(workdir)
    self.config = run.config
    self.class_names: list[str] = run.class_names
    self._saved = run.meta['backbones']
    self._towers = model_lib.describe_towers(self.config)
    self._mesh = sharding.make_mesh(self.config)
    self._model = model_lib.make_model(self.config, self._towers, num_classes=len(self.class_names))
    self._preprocess = model_lib.make_preprocess(self.config, self._towers, num_classes=len(self.class_names))
    self._variables = trained.restore_variables(run, self._model.init, self._mesh)
    self._frozen: dict[str, Any] = dict.fromkeys(model_lib.MODALITIES)
    self._step = jax.jit(self._forward)

  def predict(self, image: Any = None, text: Any = None, *, top_k: int = 5) -> dict[str, Any] | list[dict[str, Any]]:
    """Classifies one example, or a list of them.

    Args:
      image: None, a path, a uint8 array [H, W, 3] or a PIL image; or a list of these.
      text: None or a string; or a list of these, as long as the list of images where both are given.
      top_k: labels to return.

    Returns:
      {'labels': [{'label', 'probability'}, ...] best first, 'image': bool, 'text': bool (what was there)}; for lists a list of these.
      Probabilities are softmax's, or each label's own sigmoid for a multi-label model.

    Raises:
      UserError: an example with neither image nor text, a modality that this run does not know, an unreadable image, lists of unequal
        length, top_k below 1, probabilities that are not finite.
    """
    if top_k < 1:
      raise UserError(f'top_k: {top_k} is not legal; give a number >= 1')
    pairs, many = _pairs(image, text)
    self._check_used(pairs)
    examples = [pipeline.single_example(self._preprocess, image=i, text=t) for i, t in pairs]
    probabilities_nk = self._probabilities(examples) if examples else []
    broken = [n for n, p_k in enumerate(probabilities_nk) if not np.isfinite(p_k).all()]
    if broken:
      where = f' of example {broken[0]}' if many else ''
      raise UserError(
          f'predict: the probabilities{where} are not finite; check the towers (config.backbones)')
    results = [self._result(p, example['present'], top_k) for p, example in zip(probabilities_nk, examples, strict=True)]
    return results if many else results[0]

  def _check_used(self, pairs: Sequence[tuple[Any, Any]]) -> None:
    for modality, given in zip(model_lib.MODALITIES, zip(*pairs, strict=True), strict=False):
      if modality not in self._towers and any(content is not None for content in given):
        other, = self._towers
        raise UserError(f'predict: {config_lib.article(modality)} was given, but this run knows {other}s alone '
                        f'(config.dataset.modalities={other!r}); give {config_lib.article(other)} and nothing else')

  def _probabilities(self, examples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    size = self.config.eval.batch_size
    chunks = [examples[i:i + size] for i in range(0, len(examples), size)]
    return np.concatenate([self._batch(chunk) for chunk in chunks])

  def _batch(self, examples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    rows = self._mesh.shape['data']
    while rows < len(examples):  # Few batch sizes, so that few programs are compiled.
      rows *= 2
    padded = list(examples) + [examples[0]] * (rows - len(examples))
    batch = {name: np.stack([example[name] for example in padded]) for name in ('image', 'tokens', 'token_mask', 'present')}
    frozen = self._towers_for(batch['present'].any(axis=0))
    return np.asarray(self._step(self._variables, frozen, sharding.put_batch(batch, self._mesh)))[: len(examples)]

  def _towers_for(self, used: Sequence[bool]) -> dict[str, Any]:
    modalities = [m for m, use in zip(model_lib.MODALITIES, used, strict=True) if use]
    new = [m for m in modalities if self._frozen[m] is None]
    if new:
      model_lib.check_same_towers(self._saved, self._towers, new)
      loaded = model_lib.load_frozen(self.config, self._mesh, new)
      self._frozen |= {m: loaded[m] for m in new}
    return {m: self._frozen[m] if m in modalities else None for m in model_lib.MODALITIES}

  def _forward(self, variables, frozen, batch):
    logits_bk = self._model.classify(variables, self._model.taps(frozen, batch), batch['present']).logits_bk
    return jax.nn.sigmoid(logits_bk) if self.config.dataset.multi_label else jax.nn.softmax(logits_bk)

  def _result(self, probability_k: np.ndarray, present_m: np.ndarray, top_k: int) -> dict[str, Any]:
    best = np.argsort(-probability_k, kind='stable')[:top_k]
    labels = [{'label': self.class_names[k], 'probability': round(float(probability_k[k]), 6)} for k in best]
    return {'labels': labels, 'image': bool(present_m[0]), 'text': bool(present_m[1])}


def load(workdir: str | pathlib.Path) -> Predictor:
  """Opens the trained classifier in `workdir`; see `Predictor`."""
  return Predictor(workdir)


def _pairs(image: Any, text: Any) -> tuple[list[tuple[Any, Any]], bool]:
  many = isinstance(image, list) or isinstance(text, list)
  if not many:
    return [_pair(image, text, '')], False
  count = len(image) if isinstance(image, list) else len(text)
  images = image if isinstance(image, list) else [image] * count
  texts = text if isinstance(text, list) else [text] * count
  if len(images) != len(texts):
    raise UserError(f'predict: {len(images)} images and {len(texts)} texts; give lists of equal length')
  return [_pair(i, t, f' (example {n})') for n, (i, t) in enumerate(zip(images, texts, strict=True))], True


def _pair(image: Any, text: Any, where: str) -> tuple[Any, Any]:
  if image is None and text is None:
    raise UserError(f'predict: both image and text are absent{where}; give at least one')
  return image, text


FLAGS = (
    cli.Flag('workdir', 'folder of a run of molt_jax.train', required=True),
    cli.Flag('image', 'image file'),
    cli.Flag('text', 'text'),
    cli.Flag('top_k', 'labels to print', '5'),
)


@cli.command
def main(argv: Sequence[str]) -> None:
  """Command line of the module: prints one JSON object."""
  flags, _ = cli.parse('molt_jax.predict', 'Classify an image, a text, or both.', FLAGS, argv)
  top_k = cli.whole_number(flags, 'top_k')
  if flags.image is None and flags.text is None:
    raise UserError('--image and --text are both absent; give at least one of them')
  print(json.dumps(load(flags.workdir).predict(image=flags.image, text=flags.text, top_k=top_k), ensure_ascii=False))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
