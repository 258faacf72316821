"""Trains on a table as it is: `molt fit products.csv --workdir=DIR`, `molt_jax.fit(data, ...)`.

A fit is the training of a preset (`table`) on a data set that is made from the user's file: which
of its columns are what is given or guessed, shown, and kept in DIR/config.json and DIR/run.json, so
that every other command works on DIR as on that of `molt train`. Odd rows are set aside and listed
in DIR/rows_set_aside.csv.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('fit', sys.argv[1:]))

import argparse
import dataclasses
import difflib
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from molt_jax import train
from molt_jax.config import preset_files, qualities
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data.tables.as_config import Options, configure, options_of
from molt_jax.errors import UserError
from molt_jax.runtime import processes
from molt_jax.runtime.flags import DURATION, duration
from molt_jax.runtime.signals import exit_code

PRESET = 'table'


def fit(
  data: Any,
  image: str | Sequence[str] | None = None,
  text: str | Sequence[str] | None = None,
  label: str | None = None,
  *,
  workdir: str | os.PathLike,
  **options: Any,
) -> Any:
  """Trains a classifier on a table as it is and returns its `Predictor`.

  Args:
    data: the path of a table (CSV, Excel, JSON lines, Parquet, Arrow), of a folder of train and
      test tables, of one saved by `datasets`, or of one of images in a folder a class; or a
      DataFrame, an Arrow table, a `datasets.Dataset`, a list of dicts or a dict of lists.
    image: the column of images, or several; None: guessed; '': there is none.
    text: the column of texts, or several, which become one text; None: guessed; '': none.
    label: the column of labels; None: guessed.
    workdir: folder of the run; a run that stopped goes on there.
    **options: those of `Options`; `preset`, how much is spent (fast, good or best), or the config
      it starts from; `method`, e.g. 'maple', and `config`, {field: value} of fields that differ
      from it; `time_limit`, seconds or '10m'; `init_from` and `data_changed`, as of `molt train`.

  Returns:
    `molt_jax.predict.Predictor`.

  Raises:
    UserError: one line on what is wrong with the data or an argument.
    Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  from molt_jax import predict

  others = {name: options.pop(name) for name in _OF_THE_RUN if name in options}
  known = [field.name for field in dataclasses.fields(Options)]
  for name in options:
    if name not in known:
      near = difflib.get_close_matches(name, [*known, *_OF_THE_RUN], n=1)
      hint = f'did you mean {near[0]}?' if near else f'known: {", ".join([*known, *_OF_THE_RUN])}'
      raise UserError(f'fit: no argument {name!r}; {hint}')
  options['null_words'] = _listed(options.get('null_words'))
  chosen = Options(image=_listed(image), text=_listed(text), label=label, **options)
  config, how = _how(others)
  run(data, chosen, config, pathlib.Path(workdir), **how)
  return predict.load(workdir)


# Arguments that are not of the table.
_OF_THE_RUN = ('preset', 'method', 'config', 'data_changed', 'time_limit', 'init_from')


def _how(given: Mapping[str, Any]) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
  """Returns the config, and the other arguments of `run`, that arguments of `fit` say."""
  preset, fields = os.fspath(given.get('preset', PRESET)), dict(given.get('config', {}))
  method = given.get('method')
  if method is not None and fields.setdefault('method', method) != method:
    other = fields['method']
    raise UserError(f"fit: method={method!r} beside config={{'method': {other!r}}}; give one")
  spent = preset in qualities.QUALITIES
  if not (spent or preset.partition(':')[0] in preset_files.names() or '.' in preset):
    raise UserError(
      f'fit: preset={preset!r}; give {", ".join(qualities.QUALITIES)}, a config '
      f'({", ".join(preset_files.names())}), or the path of one'
    )
  config = CLASSIFIER.load(
    PRESET if spent else preset, {name: str(value) for name, value in fields.items()}
  )
  limit = given.get('time_limit')
  choices = train.Choices(
    preset=preset if spent else 'good',
    given=tuple(fields),
    time_limit=None if limit is None else _seconds(limit),
    init_from=os.fspath(given.get('init_from') or ''),
  )
  return config, {'data_changed': given.get('data_changed', False), 'choices': choices}


def _seconds(limit: Any) -> float:
  try:
    return duration(str(limit))
  except ValueError as error:
    raise UserError(f'time_limit: {limit!r} is not legal; give {DURATION.text}') from error


def _listed(names: str | Sequence[str] | None) -> Sequence[str] | None:
  """Returns one name, or several, as a list; '' is an empty one."""
  if isinstance(names, str):
    return [name.strip() for name in names.split(',') if name.strip()]
  return names


def run(
  data: Any,
  options: Options,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  data_changed: bool = False,
  choices: train.Choices = train.AS_IT_IS,
) -> dict[str, Any]:
  """Trains on a table; see `fit`.

  Args:
    data: a path, or a table in memory.
    options: how it is read.
    config: of a preset.
    workdir: the run's folder.
    data_changed: go on with data that have changed since the checkpoint.
    choices: how much is spent, and what the run begins with.

  Returns:
    The content of evaluation.json.
  """
  config, facts = configure(data, options, config, workdir)
  return train.train(config, workdir, data_changed=data_changed, facts=facts, choices=choices)


def command(flags: argparse.Namespace) -> int | None:
  """The work of the command; exit code 130 or 143: stopped by a signal, saved."""
  processes.join()
  options = options_of(flags)
  folder = pathlib.Path(flags.workdir)
  how = {'data_changed': flags.data_changed, 'choices': train.choices_of(flags)}
  return exit_code(lambda: run(flags.table, options, flags.config, folder, **how))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('fit', argv)


class _Callable(types.ModuleType):
  """This module has the name of the function `molt_jax.fit`, and can be called as it is."""

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return fit(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
