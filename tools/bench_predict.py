"""Rows a processor second of `molt predict --table` and of `molt evaluate --table`, side by side.

  python tools/bench_predict.py --workdir=DIR --table=FILE [--rows=400] [--rounds=3] [--many=100000]

Both commands answer the first `--rows` rows of FILE, which has labels, and twice as many. Each is a
process of its own, in turns. The difference of the two is what the rows alone take, without what a
process takes to start, load and compile. It is the processor time of all threads, which what else
the machine does changes less than seconds; medians, after one of each that is not counted. DIR is a
run that keeps no states (`features.store`), so that towers run in both.

With `--many`, `predict` also answers so many rows, those of FILE again and again, and the memory
that it has taken at most is compared with that of `--rows` rows.
"""

import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence

import bench_evaluate

from molt_jax.config.fields import at_least
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

FLAGS = (
  Flag('workdir', 'folder of a run of molt train', required=True),
  Flag('table', 'CSV with labels and the columns of the run, one row a line', required=True),
  Flag('rows', 'rows of the smaller table', 400, type=int, rule=at_least(1)),
  Flag('rounds', 'of each command and table', 3, type=int, rule=at_least(1)),
  Flag('many', 'rows whose memory is measured; 0: none', 0, type=int, rule=at_least(0)),
)


def run(name: str, workdir: str, table: pathlib.Path) -> dict[str, float]:
  """Runs a command over a table; see `bench_evaluate.measure`."""
  own = {'predict': f'--out={table.with_name("scored.csv")}', 'evaluate': '--absent=none'}
  return bench_evaluate.measure(name, [f'--workdir={workdir}', f'--table={table}', own[name]])


def first_rows(table: pathlib.Path, folder: pathlib.Path, rows: int) -> pathlib.Path:
  """Writes the first rows of a table to a folder, from the beginning again where there are no more;
  returns the new table.
  """
  with table.open(encoding='utf-8') as file:
    head, *lines = file
  path = folder / f'first_{rows}_rows.csv'
  with path.open('w', encoding='utf-8') as file:
    file.write(head)
    file.writelines(itertools.islice(itertools.cycle(lines), rows))
  return path


def rates(workdir: str, tables: Mapping[int, pathlib.Path], rounds: int) -> dict[str, dict]:
  """Returns command -> processor seconds of both tables, and rows a processor second."""
  taken = {name: {rows: [] for rows in tables} for name in ('predict', 'evaluate')}
  for name in taken:  # Compiles, and brings files into memory.
    run(name, workdir, tables[max(tables)])
  for _ in range(rounds):
    for rows, table in tables.items():
      for name, of_rows in taken.items():
        of_rows[rows].append(run(name, workdir, table)['cpu_seconds'])
  found = {}
  for name, of_rows in taken.items():
    (few, less), (many, more) = ((n, statistics.median(x)) for n, x in of_rows.items())
    rate = (many - few) / (more - less)
    found[name] = {
      'cpu_seconds': [round(less, 2), round(more, 2)],
      'rows_per_cpu_second': round(rate, 1),
    }
  one, other = (found[name]['rows_per_cpu_second'] for name in taken)
  return {**found, 'ratio': round(one / other, 3), 'rows': list(tables), 'rounds': rounds}


@command
def main(argv: Sequence[str]) -> None:
  """Command line; prints JSON."""
  flags, _ = parse(
    'python tools/bench_predict.py', 'Rows a second of predict and evaluate.', FLAGS, argv
  )
  table = pathlib.Path(flags.table).absolute()
  with tempfile.TemporaryDirectory(prefix='molt_jax_rows_') as name:
    folder = pathlib.Path(name)
    for path in table.parent.iterdir():  # Images, by their paths from the table.
      (folder / path.name).symlink_to(path)
    counts = flags.rows, 2 * flags.rows
    tables = {rows: first_rows(table, folder, rows) for rows in counts}
    try:
      found = rates(flags.workdir, tables, flags.rounds)
    finally:
      for path in tables.values():
        (pathlib.Path(flags.workdir) / f'evaluation_{path.stem}.json').unlink(missing_ok=True)
    if flags.many:
      peak = {
        rows: run('predict', flags.workdir, first_rows(table, folder, rows))['peak_bytes']
        for rows in (flags.rows, flags.many)
      }
      found['peak_bytes'] = peak
  print(json.dumps(found))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
