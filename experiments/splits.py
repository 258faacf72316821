"""Our default against what a user would build in an afternoon, over several splits of a data set:
where a test has a hundred examples, one split says little.

  python experiments/splits.py --data=NAME=FOLDER [...] --seeds=0 [--splits=5] [--methods=REGEX]
  [--set=FIELD=VALUE] [--runs=...] [--out=...]

FOLDER is one of build_datasets.py. Its examples are drawn to splits of the same shares N times
(RUNS/splits/NAME_N; examples of one text or picture stay together), and rows of usefulness.py are
made on each. OUT/NAME_N.json holds what they score, OUT/splits.md their means and how far the
default is from them, paired by split.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import grid
import jobs
import numpy as np
import usefulness
from absl import flags
from datasets import folders

from molt_jax.errors import UserError
from molt_jax.runtime import atomic

SPLITS = flags.DEFINE_integer('splits', 5, 'How many.', lower_bound=2)


def drawn(data: str, n: int) -> str:
  """Returns split n of a data set as `--data` has it, written where it is not there yet."""
  name, _, source = data.partition('=')
  if not (pathlib.Path(source) / 'train.csv').is_file():
    raise UserError(f'--data: {data!r} is no NAME=FOLDER with a train.csv')
  folder = pathlib.Path(grid.RUNS.value) / 'splits' / f'{name}_{n}'
  if not folder.exists():
    folders.redraw(pathlib.Path(source), folder, seed=n)
  return f'{folder.name}={folder}'


def table(name: str, splits: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the Markdown of one data set.

  Args:
    name: of the data set.
    splits: row -> seed -> result, of each split.
  """
  rows = [row for row in usefulness.ROWS if all(row in made for made in splits)]
  lines = [f'## {name}, {len(splits)} splits', '']
  lines += [f'| | {" | ".join(jobs.COLUMNS.values())} |', '|---|' + '--:|' * len(jobs.COLUMNS)]
  for row in rows:
    cells = [_cell(splits, row, condition) for condition in jobs.COLUMNS]
    lines.append(f'| {row} | {" | ".join(cells)} |')
  return [*lines, '']


def _cell(splits, row, condition):
  """Returns 'mean (how far the default is ahead ± standard deviation)'."""
  own, other = (
    [usefulness.mean(made, name, condition) for made in splits]
    for name in (usefulness.DEFAULT, row)
  )
  if None in other or None in own:
    return '-'
  if row == usefulness.DEFAULT:
    return f'{100 * np.mean(own):.1f}'
  ahead = 100 * np.subtract(own, other)
  return f'{100 * np.mean(other):.1f} ({np.mean(ahead):+.1f} ± {np.std(ahead, ddof=1):.1f})'


def report(folder: pathlib.Path) -> None:
  """Writes and prints splits.md of all data sets that have results of two splits at least."""
  found = {}
  for path in sorted(folder.glob('*_*.json')):
    found.setdefault(path.stem.rpartition('_')[0], []).append(jobs.results(path))
  lines = ['Test accuracy in percent, mean over splits; in brackets by how much the default is']
  lines += ['ahead, mean ± standard deviation over splits.', '']
  for name, splits in found.items():
    splits = [rows for rows in splits if usefulness.DEFAULT in rows]
    lines += table(name, splits) if len(splits) > 1 else []
  atomic.write(folder / 'splits.md', '\n'.join(lines) + '\n')
  print('\n'.join(lines))


def main():
  folder = grid.folder_of('splits')
  flags.FLAGS.out = str(folder)  # Where usefulness.py keeps what it makes.
  for n in range(SPLITS.value):
    for data in grid.DATA.value:
      usefulness.make(drawn(data, n))
  report(folder)


if __name__ == '__main__':
  grid.start(main)
