"""Predicts from an image, a text or both: `python -m molt_jax.predict --workdir=DIR [--image=FILE]
[--text=STRING]`; or every row of a table: `--table=FILE --out=FILE`.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('predict', sys.argv[1:]))

import argparse
import concurrent.futures
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.config import resolved
from molt_jax.data import cells, findings, given, pipeline
from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError, article
from molt_jax.evaluation import (
  calibration,
  contributions,
  model_file,
  notebook,
  occlusion,
  other_classes,
  prediction_files,
  prediction_sets,
  table_predictions,
  thresholds,
  trained,
  unlabelled,
)
from molt_jax.evaluation.forward import Forward
from molt_jax.evaluation.prediction_sets import Calibration, SetRule
from molt_jax.runtime import console, terminal


class _Wanted(NamedTuple):
  """What an answer shall have: labels, a prediction set, what each modality brought."""

  top_k: int
  rule: SetRule | None
  explain: bool


class Predictor:
  """A trained classifier, ready to use; made by `molt_jax.load(WORKDIR)`. A tower is loaded when an
  input first needs it.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path | trained.Trained,
    class_names: Sequence[str] | None = None,
  ):
    """Opens the run in a folder, or in a file of `molt export`, which answers its examples first.

    Args:
      workdir: the folder or the file, or the run itself, opened.
      class_names: other classes than it was trained on, where its method reads their names.

    Raises:
      UserError: no run there or a damaged one, a tower that is gone or has changed, or a method
        that has learned its classes.
    """
    if isinstance(workdir, trained.Trained):
      run = workdir
    elif class_names is None:
      run = trained.open(workdir)
    else:
      run = other_classes.open(workdir, class_names)
    self._run = run
    self._assembly = run.assembly
    self.config = run.config
    self.class_names: list[str] = run.class_names
    self._forward = Forward(run)
    if run.examples:
      self._try_examples()

  def _try_examples(self) -> None:
    """Raises UserError unless the examples of a file are answered as when it was written."""
    written = self._run.examples
    examples = self._examples([(x.image, x.text) for x in written])
    found_nk = self._forward.probabilities(examples, once=True)
    model_file.check(str(self._run.workdir), written, found_nk, self.config.backbones.dtype)

  @property
  def run(self) -> trained.Trained:
    """The run that it is of."""
    return self._run

  @property
  def variables(self) -> dict[str, Any]:
    """What was trained, {'params', 'statistics'}."""
    return self._forward.variables

  def towers(self, modalities: Sequence[str]) -> dict[str, Any]:
    """Returns the parameters of towers, loaded where they are not yet; None for the others."""
    return self._forward.towers([m in modalities for m in MODALITIES])

  def probabilities(self, pairs: Sequence[tuple[Any, str | None]]) -> np.ndarray:
    """Returns float32[N, K] of N pairs of an image and a text, computed as one batch.

    Args:
      pairs: as `predict` takes one of each; None is absent.

    Raises:
      UserError: one cannot be used.
    """
    return self._forward.probabilities(self._examples(pairs))

  def __repr__(self) -> str:
    used = ' and '.join(resolved.modalities(self.config))
    return f'<Predictor: {len(self.class_names)} classes, from {used}>'

  def _repr_html_(self) -> str:
    """What a notebook shows: what the run is, and its scores where there are some."""
    towers = {name: tower.identity['path'] for name, tower in self._assembly.towers.items()}
    facts = {'folder': self._run.workdir, 'method': self.config.method, **towers}
    facts |= {'classes': findings.some(self.class_names), 'steps': self._run.meta['step']}
    shown = notebook.table(('', f'{len(self.class_names)} classes'), list(facts.items()))
    evaluation = self._run.evaluation
    of_these = not isinstance(self._run, other_classes.OtherClasses)
    if of_these and isinstance(evaluation.get('results'), dict):
      shown += notebook.scores_table(evaluation)
    return shown

  @property
  def classes_(self) -> np.ndarray:
    """The names of the K classes in the order of probabilities, as scikit-learn calls them."""
    return np.array(self.class_names)

  @functools.cached_property
  def calibration(self) -> Calibration:
    """What prediction sets are made by; computed where the run has none.

    Raises:
      UserError: the run's validation examples cannot be read, or are of other classes.
    """
    if isinstance(self._run, other_classes.OtherClasses):
      raise UserError(
        'coverage: what prediction sets promise was measured on the classes of the training, not '
        'on class_names; leave it out'
      )
    return calibration.of_run(self._run)

  def predict(
    self,
    image: Any = None,
    text: Any = None,
    *,
    top_k: int = 5,
    errors: str = 'raise',
    coverage: float | None = None,
    adaptive: bool = False,
    explain: bool | str = False,
  ) -> dict[str, Any] | list[dict[str, Any]]:
    """Classifies one example, or a list of them.

    Args:
      image: None, a path, the bytes of an image file, a uint8 array [H, W] or [H, W, 3 or 4], or a
        PIL image; or several of these.
      text: None or a string; or several, as many as images where both are several.
      top_k: labels to return.
      errors: what is done with an example that has something that cannot be used, or nothing:
        'raise' raises UserError; with 'row' that is absent, and the answer has its reason, 'error'.
      coverage: above 0 and below 1: each answer has a 'set' too, of labels that hold the true one
        with this probability (`molt_jax/evaluation/prediction_sets.py`).
      adaptive: sets are larger for hard examples and smaller for easy ones.
      explain: each answer has an 'explanation' too: what each modality brought to its first label.
        With 'parts' that has the weight of each word and region of the image, which costs as many
        predictions.

    Several are a list, a tuple, an iterator or another sequence, a NumPy array of strings, or a
    column of a table; one of them may be absent, as a cell of a table may be
    (`molt_jax/data/cells.py`).

    Returns:
      {'labels': [{'label', 'probability'}, ...] best first, 'image': bool, 'text': bool (what was
      there)}; for lists a list of these. Probabilities are softmax's, or each label's own sigmoid
      for a multi-label model. An example of which nothing is left has no labels.

      An explanation is {'label', 'prior', 'both', 'image', 'text': probability of the label by its
      share in training, with everything, of each modality alone (None: not there); 'shares':
      {'image', 'text'}, in nats, which sum to log both - log prior
      (`molt_jax/evaluation/contributions.py`)}; with parts {'words': [{'word', 'weight'}],
      'regions': weights [4, 4]}, what log both loses without them.

    Raises:
      UserError: an example with neither image nor text, an unreadable image or a value of another
        kind, unless errors is 'row'; a modality that this run does not know, lists of unequal
        length, top_k below 1, probabilities that are not finite.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
      raise UserError(f'top_k: {cells.plain(str(top_k))} is not legal; give a whole number >= 1')
    if errors not in ('raise', 'row'):
      raise UserError(f"errors: {cells.plain(str(errors))} is not legal; give 'raise' or 'row'")
    if not isinstance(explain, bool) and explain != 'parts':
      raise UserError(f"explain: {cells.plain(str(explain))} is not legal; give True or 'parts'")
    wanted = _Wanted(top_k, self._rule(coverage, adaptive), bool(explain))
    lost: dict[int, str] | None = {} if errors == 'row' else None
    pairs, many = given.read_inputs(image, text, lost)
    self._check_used(pairs)
    results = []
    size = self.config.eval.batch_size
    with concurrent.futures.ThreadPoolExecutor(self.config.input.num_threads) as pool:
      for start in range(0, len(pairs), size):
        numbers = [n if many else None for n in range(start, min(start + size, len(pairs)))]
        some = pairs[start : start + size]
        examples = list(pool.map(self._example, some, numbers, itertools.repeat(lost)))
        results += self._answers(examples, numbers, wanted)
    for number, why in (lost or {}).items():
      results[number]['error'] = why
    for pair, result in zip(pairs, results, strict=True) if explain == 'parts' else ():
      if result['labels']:
        result['explanation'] |= self._parts_of(pair, result)
    return notebook.Answers(results) if many else results[0]

  def predict_proba(
    self,
    table: Any,
    *,
    image: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    image_folder: str | os.PathLike = '',
  ) -> Any:
    """Returns the probabilities of every row of a table.

    Args:
      table: the path of a table (CSV, JSON lines, Parquet, Arrow, a folder of images), a DataFrame,
        an Arrow table, a `datasets.Dataset`, a list of dicts or a dict of lists.
      image: columns of images; None: those of the table that the run was trained on.
      text: columns of text, likewise.
      image_folder: what paths of images are relative to; '': the folder of the table.

    Returns:
      float32[N, K] in the order of rows and of `classes_`, of a pandas DataFrame a DataFrame. An
      image that cannot be used is absent; a row of which nothing can be used is NaN.

    Raises:
      UserError: the table cannot be read, has no column that the run knows, or most of its rows or
        images cannot be used; probabilities that are not finite.
    """
    opened = self._opened(table, image, text, image_folder)
    parts = list(self._parts(opened))
    empty = np.zeros((0, len(self.class_names)), np.float32)
    p_nk = np.concatenate([empty, *(part.probability_nk for part in parts)])
    problems = [part.ids[n] for part in parts for n, why in enumerate(part.problems) if why]
    if problems:
      console.log(f'predict: {len(problems):,} rows have a problem: {findings.some(problems)}')
    if not hasattr(table, 'iloc'):
      return p_nk
    import pandas as pd  # The table is one of its own.

    return pd.DataFrame(p_nk, index=table.index, columns=self.class_names)

  def predict_table(
    self,
    table: Any,
    out: str | os.PathLike,
    *,
    image: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    image_folder: str | os.PathLike = '',
    coverage: float | None = None,
    adaptive: bool = False,
  ) -> dict[str, int]:
    """Writes a file with a label, probabilities and what was there for every row of a table.

    Its columns are those of `molt_jax/evaluation/prediction_files.py`. Memory does not grow with
    images or probabilities: they are worked through a batch at a time.

    Args:
      table: as for `predict_proba`, and so are the columns and the folder.
      out: the file, .csv or .parquet; it is there whole or not at all.
      image: as above.
      text: as above.
      image_folder: as above.
      coverage: as for `predict`; the file then has the set of each row.
      adaptive: as for `predict`.

    Returns:
      {'rows', 'unanswered': of which nothing can be used, 'problems': rows that have one}.

    Raises:
      UserError: as `predict_proba`; the file cannot be written.
    """
    path = pathlib.Path(out)
    prediction_files.check_kind(path)
    rule = self._rule(coverage, adaptive)
    opened = self._opened(table, image, text, image_folder)
    several = self.config.dataset.multi_label
    how = {'thresholds': thresholds.of_run(self._run.meta) if several else None, 'rule': rule}
    return prediction_files.write(path, self._parts(opened), self.class_names, **how)

  def _opened(
    self, table: Any, image: Any, text: Any, image_folder: str | os.PathLike
  ) -> unlabelled.Unlabelled:
    columns = {'image': image, 'text': text}
    columns = {role: [x] if isinstance(x, str) else x for role, x in columns.items()}
    return unlabelled.open_table(
      self._assembly.config, table, **columns, image_folder=os.fspath(image_folder)
    )

  def _parts(self, table: unlabelled.Unlabelled) -> Iterator[table_predictions.Part]:
    step = self._forward.step(table.used)
    return table_predictions.answers(self._assembly, table, step)

  def _answers(
    self,
    examples: Sequence[Mapping[str, np.ndarray] | None],
    numbers: Sequence[int | None],
    wanted: _Wanted,
  ) -> list[dict[str, Any]]:
    """Returns the answers to a batch, without labels where an example is None."""
    there = [n for n, example in enumerate(examples) if example is not None]
    results = [notebook.Answer(labels=[], image=False, text=False) for _ in examples]
    for result in results if wanted.rule else ():
      result.update(set=[], coverage=wanted.rule.coverage)
    if not there:
      return results
    some = [examples[n] for n in there]
    log_nvk = None
    if wanted.explain:
      log_nvk = np.moveaxis(self._forward.log_patterns(some), 0, 1).astype(np.float64)
      probabilities_nk = np.exp(log_nvk[:, 0]).astype(np.float32)
    else:
      probabilities_nk = self._forward.probabilities(some)
    for row, (n, p_k) in enumerate(zip(there, probabilities_nk, strict=True)):
      if not np.isfinite(p_k).all():
        where = '' if numbers[n] is None else f' of example {numbers[n]}'
        raise UserError(
          f'predict: the probabilities{where} are not finite; check the towers (config.backbones)'
        )
      present_m = examples[n]['present']
      results[n] |= self._result(p_k, present_m, wanted.top_k)
      if wanted.rule:
        (in_k,) = wanted.rule.members(p_k[None], present_m[None])
        results[n]['set'] = prediction_sets.names_in(p_k, in_k, self.class_names)
      if wanted.explain:
        results[n]['explanation'] = self._explanation(log_nvk[row], present_m)
    return results

  def _explanation(self, log_vk: np.ndarray, present_m: np.ndarray) -> dict[str, Any]:
    """Returns what each modality brought to the likeliest label; see `predict`."""
    label = int(log_vk[0].argmax())
    prior = float(self.calibration.prior_k[label])
    value_v1 = log_vk[:, label, None]
    (share_m,) = contributions.shares(value_v1, np.log([prior]), present_m[None])
    found = {'label': self.class_names[label], 'prior': prior}
    there = {'both': True} | dict(zip(MODALITIES, present_m, strict=True))
    for name, value in zip(there, value_v1[:, 0], strict=True):
      found[name] = float(np.exp(value)) if there[name] else None
    return found | {'shares': dict(zip(MODALITIES, share_m.tolist(), strict=True))}

  def _parts_of(self, pair: tuple[Any, str | None], result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights of the words and regions of an example; see `predict`."""
    image, text = pair
    if not result['image']:
      image = None
    elif isinstance(image, str | bytes):
      image = given.decoded(image, 'image')
    label = self.class_names.index(result['explanation']['label'])
    variants = occlusion.variants(image, text if result['text'] else None)
    every = [(variant.image, variant.text) for variant in variants]
    p_n, size = [], self.config.eval.batch_size
    for start in range(0, len(every), size):
      batch = [self._example(x, None, None) for x in every[start : start + size]]
      p_n += self._forward.probabilities(batch)[:, label].tolist()
    whole = np.log(result['explanation']['both'])
    weight_n = (whole - np.log(np.maximum(p_n, contributions.LEAST))).tolist()
    return occlusion.weights(variants, weight_n, text if result['text'] else None)

  def _rule(self, coverage: float | None, adaptive: bool) -> SetRule | None:
    """Returns what makes prediction sets; None: none are asked for."""
    if coverage is None:
      if adaptive:
        raise UserError('adaptive: it goes with coverage; give coverage=0.9, or leave it out')
      return None
    kind = 'adaptive' if adaptive else 'threshold'
    prediction_sets.check(coverage, kind)
    return self.calibration.rule(float(coverage), kind)

  def _examples(self, pairs: Sequence[tuple[Any, str | None]]) -> list[dict[str, np.ndarray]]:
    return [self._example(pair, number, None) for number, pair in enumerate(pairs)]

  def _example(
    self, pair: tuple[Any, str | None], number: int | None, lost: dict[int, str] | None
  ) -> dict[str, np.ndarray] | None:
    """Returns the arrays of one example.

    Args:
      pair: image and text.
      number: its place among several.
      lost: where given, what cannot be used is absent, and why is put here; an example of which
        nothing is left is None.
    """
    image, text = pair
    try:
      if isinstance(image, str | bytes):
        image = given.decoded(image, given.place('image', number))
    except UserError as error:
      if lost is None:
        raise
      lost.setdefault(number or 0, str(error).removeprefix('predict: '))
      image = None
    try:
      return pipeline.single_example(self._assembly.preprocess, image=image, text=text)
    except UserError as error:
      if lost is None:
        where = '' if number is None else f'example {number}: '
        raise UserError(f'predict: {where}{error}') from error
      lost.setdefault(number or 0, str(error))
      return None if image is None or text is None else self._example((None, text), number, lost)

  def _check_used(self, pairs: Sequence[tuple[Any, Any]]) -> None:
    for modality, contents in zip(MODALITIES, zip(*pairs, strict=True), strict=False):
      used = resolved.modalities(self.config)
      if modality not in used and any(content is not None for content in contents):
        (other,) = used
        raise UserError(
          f'predict: {article(modality)} was given, but this run knows {other}s alone '
          f'(config.dataset.modalities={other!r}); give {article(other)} and nothing '
          'else'
        )

  def _result(self, probability_k: np.ndarray, present_m: np.ndarray, top_k: int) -> dict[str, Any]:
    best = np.argsort(-probability_k, kind='stable')[:top_k]
    labels = [
      {'label': self.class_names[k], 'probability': round(float(probability_k[k]), 6)} for k in best
    ]
    had = {'image': bool(present_m[0]), 'text': bool(present_m[1])}
    return notebook.Answer(labels=labels, **had)


def load(workdir: str | pathlib.Path, class_names: Sequence[str] | None = None) -> Predictor:
  """Opens the trained classifier in a folder or a file; see `Predictor`."""
  return Predictor(workdir, class_names)


def command(flags: argparse.Namespace) -> None:
  """The work of the command: prints one JSON object."""
  model = load(flags.workdir)
  sets = {'coverage': flags.coverage, 'adaptive': flags.adaptive}
  if flags.table is None:
    explain = 'parts' if flags.occlude else flags.explain
    how = {'top_k': flags.top_k, 'explain': explain, **sets}
    found = model.predict(image=flags.image, text=flags.text, **how)
  else:
    columns = {
      role: [name.strip() for name in getattr(flags, role).split(',')]
      for role in MODALITIES
      if getattr(flags, role)
    }
    folder = flags.image_folder or ''
    how = {**columns, **sets, 'image_folder': folder}
    found = model.predict_table(flags.table, flags.out, **how)
    found['out'] = flags.out
  print(terminal.json_line(found))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('predict', argv)
