"""Looks for rows of a run's data that may not be what is meant: `python -m molt_jax.audit
--workdir=DIR`.

Writes audit.html, one page that opens from disk, with the most suspect rows and their pictures, and
audit.csv, a line for each suspected row: pairs whose image and text say different things, labels
that may be wrong, examples that are there twice, outliers, and guesses for rows without a label
(`evaluation/data_faults.py`, `data/duplicates.py`).
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('audit', sys.argv[1:]))

import argparse
import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molt_jax.data import duplicates
from molt_jax.data.duplicates import Duplicate
from molt_jax.data.sources import Source, classes_of
from molt_jax.evaluation import data_faults, out_of_fold, pooled_states, trained
from molt_jax.evaluation.data_faults import Suspect
from molt_jax.evaluation.recorder import exhibit
from molt_jax.explain import check_out
from molt_jax.reporting import audited
from molt_jax.runtime import atomic, console, terminal

COLUMNS = ('kind', 'split', 'row', 'score', 'label', 'guess', 'probability', 'modality', 'like')


class Audit(NamedTuple):
  """What was found.

  Attributes:
    suspects: rows of the split by kind, the most suspect first, suspected or not.
    duplicates: of all splits.
    p_vnk: float32[3, N, K], answers under each missing pattern by models that have not seen the
      row.
  """

  suspects: list[Suspect]
  duplicates: list[Duplicate]
  p_vnk: np.ndarray


def look(opened: trained.Trained, splits: Mapping[str, Source], split: str, *, folds: int) -> Audit:
  """Audits a split of a run's data.

  Args:
    opened: the run.
    splits: name -> examples; duplicates are looked for in all.
    split: whose pairs and labels are judged; training examples are learned from too.
    folds: models, each of which has not seen one part of the split.
  """
  found = duplicates.find(splits)
  sources = {name: splits[name] for name in dict.fromkeys((split, 'train'))}
  states = pooled_states.read(opened, sources)
  examples = _examples(opened, sources, states, found, folds)
  seed = opened.config.seed
  suspects, p_vnk = data_faults.find(examples, seed=seed)
  count = len(splits[split])
  return Audit([x for x in suspects if x.row < count], found, p_vnk[:, :count])


def _examples(opened, sources, states, found, folds) -> out_of_fold.Examples:
  """The examples of a split, and behind them those of train."""
  num_classes, multi_label = len(opened.class_names), opened.config.dataset.multi_label
  labels = [label for source in sources.values() for label in source.labels]
  target_nk = np.zeros((len(labels), num_classes), np.float32)
  for n, label in enumerate(labels):
    target_nk[n, list(classes_of(label))] = 1
  labelled_n = np.ones(len(labels), bool) if multi_label else target_nk.any(axis=1)
  # What is the same example must not be judged by a model that has seen its twin.
  place, offset = {}, 0
  for name, source in sources.items():
    place |= {(name, row): offset + row for row in range(len(source))}
    offset += len(source)
  group_n = np.arange(offset)
  for x in found:
    one, other = place.get((x.split, x.row)), place.get((x.other_split, x.other_row))
    if x.kind in ('example', 'image') and one is not None and other is not None:
      group_n[one] = group_n[other]
  pooled = {}
  for modality in set.intersection(*(set(of_split) for of_split, _ in states.values())):
    parts = zip(*(of_split[modality] for of_split, _ in states.values()), strict=True)
    pooled[modality] = tuple(np.concatenate(part) for part in parts)
  present_nm = np.concatenate([present_nm for _, present_nm in states.values()])
  fold_n = out_of_fold.folds(group_n, folds, opened.config.seed)
  return out_of_fold.Examples(pooled, present_nm, target_nk, labelled_n, fold_n, multi_label)


def run(
  workdir: pathlib.Path,
  *,
  split: str = 'train',
  folds: int = 5,
  out: str | pathlib.Path | None = None,
) -> dict[str, int]:
  """Audits a split; writes the page and the CSV file beside it.

  Args:
    workdir: the run's folder.
    split: train, validation or test.
    folds: see `look`.
    out: the page; default: audit.html in the folder of the run.

  Returns:
    kind -> how many rows are suspected.

  Raises:
    UserError: no run there, its data cannot be read, or the page cannot be written.
  """
  page = pathlib.Path(out) if out else workdir / 'audit.html'
  opened = trained.open(workdir)
  splits = {name: trained.open_split(opened, name)[0] for name in duplicates.ORDER}
  check_out(page)
  found, source = look(opened, splits, split, folds=folds), splits[split]
  names = opened.class_names
  given = ['|'.join(names[k] for k in classes_of(label)) for label in source.labels]
  shown = _shown(found, split)
  content = audited.Content(
    name=opened.workdir.name,
    split=split,
    ids=source.ids,
    class_names=names,
    given=given,
    suspects=found.suspects,
    p_vnk=found.p_vnk,
    duplicates=found.duplicates,
    shown={key: exhibit(splits[key[0]], key[1]) for key in shown},
  )
  atomic.write(page, audited.render(content))
  atomic.write(page.with_suffix('.csv'), _as_csv(content, splits))
  counts = _counts(found)
  across = sum(x.split != x.other_split for x in found.duplicates)
  console.log(
    f'{counts["pair"]} pairs, {counts["label"]} labels and {counts["outlier"]} outliers of '
    f'{len(source):,} {split} rows are suspected; {across} rows are in two splits'
  )
  return counts


def _counts(found: Audit) -> dict[str, int]:
  """Returns kind -> how many rows are suspected."""
  counts = dict.fromkeys(audited.KINDS, 0)
  for suspect in found.suspects:
    counts[suspect.kind] += suspect.suspected
  counts['duplicate'] = len(found.duplicates)
  return counts


def _shown(found: Audit, split: str) -> list[tuple[str, int]]:
  """The (split, row) that the page shows."""
  keys = {}
  for kind in audited.KINDS:
    keys |= dict.fromkeys((split, x.row) for x in audited.of_kind(found.suspects, kind))
  for x in audited.shown_duplicates(found.duplicates):
    keys |= {(x.split, x.row): None, (x.other_split, x.other_row): None}
  return list(keys)


def _as_csv(content: audited.Content, splits: Mapping[str, Source]) -> str:
  """A line a suspected row; of duplicates `like` names the other."""
  rows: list[Sequence[Any]] = []
  for x in content.suspects:
    if x.suspected:
      guess = content.class_names[x.guess] if x.guess >= 0 else ''
      probability = f'{x.probability:.4f}' if guess else ''
      own = (x.kind, content.split, content.ids[x.row], f'{x.score:.4g}', content.given[x.row])
      rows.append((*own, guess, probability, x.modality, ''))
  for x in content.duplicates:
    own, other = splits[x.split].ids[x.row], splits[x.other_split].ids[x.other_row]
    rows.append((f'same {x.kind}', x.split, own, '', '', '', '', '', other))
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(COLUMNS)
  writer.writerows(rows)
  return file.getvalue()


def command(flags: argparse.Namespace) -> None:
  """The work of the command: prints the page's path."""
  folder = pathlib.Path(flags.workdir)
  page = pathlib.Path(flags.out) if flags.out else folder / 'audit.html'
  run(folder, split=flags.split, folds=flags.folds, out=page)
  print(terminal.clean(page))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('audit', argv)
