"""A small search, decided by validation (`--preset=best`).

Other hidden states are tried first, each by a short run; then, on the best of them, other ways to
train the head. A change is taken if it lowers the log loss of validation and does not lower its
score, both as means over the conditions. The test split is not looked at. What a trial has read is
in the feature store, so the next one trains the head alone. The winner's run becomes the run of
the folder. A search that is stopped goes on where it was, from DIR/search.json.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from molt_jax.config import qualities, resolved
from molt_jax.config.json_files import read_json
from molt_jax.config.qualities import Alternative
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console
from molt_jax.training import resuming, workdir

RECORD, TRIALS = 'search.json', 'search'
# What becomes that of the run, in this order: with config.json a run has begun.
_ADOPTED = ('checkpoints', 'metrics.jsonl', 'events', 'config.json')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came out of a trial.

  Attributes:
    name: what was changed last.
    fields: all that differ from the config of the search.
    score, loss: of validation, means over the conditions that have them.
    ended: whether it had its time.
    seconds: that it took.
    class_counts: training examples of each class.
  """

  name: str
  fields: Mapping[str, Any]
  score: float
  loss: float
  ended: bool
  seconds: float
  class_counts: Sequence[int]

  def is_better_than(self, other: 'Outcome') -> bool:
    """Whether validation says that this one's change is for the better."""
    return self.ended and self.loss < other.loss and self.score >= other.score


# (config, folder, deadline) -> (the last record of validation, whether it had its time, training
# examples of each class).
Run = Callable[
  [ml_collections.ConfigDict, pathlib.Path, float],
  tuple[Mapping[str, Any], bool, Sequence[int]],
]


class Search:
  """The search in the folder of a run."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    run: Run,
    *,
    given: Collection[str] = (),
    deadline: float = math.inf,
  ):
    """Reads what was tried before.

    Args:
      config: what is changed, validated.
      folder: of the run.
      run: trains with a config, without looking at the test split.
      given: fields that are not to be changed.
      deadline: of `time.monotonic`; what would not be done by then is not begun.

    Raises:
      UserError: the folder holds a search from another config, or a run without one.
    """
    self._config, self._folder, self._run = config, folder, run
    self._given, self._deadline = frozenset(given), deadline
    self._tried: list[Outcome] = []
    self._chosen: dict[str, Any] | None = None
    if (folder / RECORD).exists():
      self._read()
    elif (folder / 'config.json').exists():
      raise UserError(
        f'--preset=best: {str(folder)!r} holds a run that no search has made; give another folder'
      )

  def choose(self) -> ml_collections.ConfigDict:
    """Returns the config of the run in the folder, which may have come out of the search already.

    Raises:
      UserError: as training.
    """
    if self._chosen is None:
      with workdir.held(self._folder):
        best = self._search()
        self._chosen = dict(best.fields)
        self._write()
        self._adopt(best)
    shutil.rmtree(self._folder / TRIALS, ignore_errors=True)
    return qualities.apply(self._config, self._chosen)

  def _search(self) -> Outcome:
    config = self._config
    tenth = self._allowed(qualities.shortened(config))
    states = [one for one in qualities.inputs(config) if self._is_free(one)]
    fields: dict[str, Any] = {}
    if states:
      first = self._try(Alternative('as it is, a tenth of the steps', tenth), {})
      incumbent = first
      for one in states:
        # Its hidden states may take longer, and the whole training comes after it.
        found = self._try(one, incumbent.fields, needs=2.5 * first.seconds)
        incumbent = found if found and found.is_better_than(incumbent) else incumbent
      fields = {n: v for n, v in incumbent.fields.items() if n not in tenth}
    whole = best = self._try(Alternative('all of the steps', {}), fields)
    chosen = qualities.apply(config, fields)
    for one in qualities.heads(chosen, best.class_counts):
      needs = 1.3 * whole.seconds
      found = self._try(one, best.fields, needs=needs) if self._is_free(one) else None
      best = found if found and found.is_better_than(best) else best
    console.log(f'chosen: {best.name} (validation score {best.score:.4f}, loss {best.loss:.4f})')
    return best

  def _try(
    self, one: Alternative, fields: Mapping[str, Any], *, needs: float | None = None
  ) -> Outcome | None:
    """Returns the outcome of a change to fields that are changed already; None where time is short.

    Args:
      one: the change.
      fields: what is changed already.
      needs: seconds that must be left; None: it has to be done.
    """
    fields = {**fields, **one.fields}
    for old in self._tried:
      if old.name == one.name and old.fields == fields:
        return old
    start = time.monotonic()
    if needs is not None and start + needs > self._deadline:
      console.log(f'not tried, for time: {one.name}')
      return None
    console.log(f'trial {len(self._tried) + 1}: {one.name}')
    folder = self._trial(len(self._tried), fields)
    config = qualities.apply(self._config, fields)
    try:
      record, ended, counts = self._run(config, folder, self._deadline)
    except UserError as error:
      if needs is None:
        raise
      console.log(f'not tried: {error}')  # A tower that is not installed, for instance.
      shutil.rmtree(folder, ignore_errors=True)
      return None
    score, loss = _mean(record, 'score'), _mean(record, 'loss')
    seconds = time.monotonic() - start
    outcome = Outcome(one.name, fields, score, loss, ended, seconds, [int(n) for n in counts])
    self._tried.append(outcome)
    self._write()
    return outcome

  def _adopt(self, best: Outcome) -> None:
    """Makes a trial's run that of the folder."""
    trial = self._trial(self._tried.index(best), best.fields)
    for name in _ADOPTED:
      if (trial / name).exists():
        (trial / name).rename(self._folder / name)

  def _trial(self, number: int, fields: Mapping[str, Any]) -> pathlib.Path:
    """Returns the folder of a trial: another one than that of a trial that was given up."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return self._folder / TRIALS / f'{number:02d}-{digest[:8]}'

  def _allowed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in self._given}

  def _is_free(self, one: Alternative) -> bool:
    return not self._given & set(one.fields)

  def _write(self) -> None:
    record = {
      'config': self._config.to_dict(),
      'given': sorted(self._given),
      'trials': [dataclasses.asdict(one) for one in self._tried],
      'chosen': self._chosen,
    }
    atomic.write(self._folder / RECORD, json.dumps(record, indent=1) + '\n')

  def _read(self) -> None:
    path = self._folder / RECORD
    record = read_json(path, 'delete it, and the search begins anew')
    try:
      begun = resuming.schema_of(self._config).from_dict(record['config'])
      self._tried = [Outcome(**one) for one in record['trials']]
      self._chosen = record['chosen']
      given = record['given']
    except (KeyError, TypeError, UserError) as error:
      raise UserError(f'{path} is no record of a search ({error}); delete it') from error
    changed = resolved.differences(begun, workdir.as_begun(self._config, self._folder))
    changed = [line for line in changed if line.split(':')[0] not in resuming.FREE_ON_RESUME]
    if changed or given != sorted(self._given):
      raise UserError(
        f'--workdir: {str(self._folder)!r} holds a search from another config '
        f'({"; ".join(changed) or "other fields were given"}); give another folder or that config'
      )
    if self._chosen is not None and not (self._folder / 'config.json').exists():
      best = next(one for one in self._tried if dict(one.fields) == self._chosen)
      self._adopt(best)


def _mean(record: Mapping[str, Any], key: str) -> float:
  """Returns the mean over conditions of a score, or the record's own."""
  if isinstance(record.get(key), float):
    return record[key]
  found = [x[key] for x in record.values() if isinstance(x, Mapping) and key in x]
  return float(np.mean(found)) if found else math.inf
