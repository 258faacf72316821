"""Runs that experiments share: trains and evaluates a config in a folder of its own, once; what is
finished is read, not repeated.
"""

import contextlib
import importlib.metadata
import pathlib
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
import numpy as np

from molt_jax import train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.json_files import read_json
from molt_jax.runtime import atomic, logbook
from molt_jax.training import workdir

LIBRARIES = ('jax', 'flax', 'optax', 'numpy')


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates `config` in `folder` unless that is done; a run that was cut off goes on
  where it stopped.

  Args:
    config: validated here.
    folder: the run's own; its console output goes to `log.txt` there.

  Returns:
    {'config_hash', 'test': condition -> metrics, 'validation': the record of the selected step,
    'seconds': of this call's training}.
  """
  config = CLASSIFIER.validate(config)

  def trained():
    record = train.train(config, folder)
    validation = next(
      line
      for line in logbook.read(folder)
      if line['kind'] == 'validation' and line['step'] == record['step']
    )
    return {'test': record['results'], 'validation': validation}

  return _once(config, folder, 'result.json', trained)


def try_out(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  """The same for a config that is only tried: the test split is not scored.

  Returns:
    {'config_hash', 'validation': the last record, 'seconds'}.
  """
  config = CLASSIFIER.validate(config)

  def tried():
    with workdir.working_in(config, folder):
      validation, *_ = train.Trial(config, folder, data_changed=False).run()
    return {'validation': validation}

  return _once(config, folder, 'trial.json', tried)


def _once(config, folder, name, make):
  """What `make` returns, from a file of the folder where it is there."""
  path = folder / name
  if path.exists():
    result = read_json(path, 'delete it, and the run is finished anew')
    if result['config_hash'] == resolved.config_hash(config):
      return result
  folder.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  with (
    (folder / 'log.txt').open('a', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    made = make()
  seconds = round(time.monotonic() - start, 1)
  result = {'config_hash': resolved.config_hash(config), **made, 'seconds': seconds}
  atomic.write(path, logbook.to_json(result) + '\n')
  return result


def override(
  config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Returns a copy of `config` with dotted fields changed, validated."""
  config = config.copy_and_resolve_references()
  for name, value in changes.items():
    resolved.set_field(config, name, value)
  return CLASSIFIER.validate(config)


def spread(values: Iterable[float | None], *, scale: float = 100.0, digits: int = 1) -> str:
  """Returns 'mean ± sample standard deviation' of a few runs, in percent unless scaled otherwise;
  of the runs that have a value (not None or NaN), '-' where none has.
  """
  values = scale * np.array(list(values), float)
  values = values[np.isfinite(values)]
  if not len(values):
    return '-'
  spread = f' ± {values.std(ddof=1):.{digits}f}' if len(values) > 1 else ''
  return f'{values.mean():.{digits}f}{spread}'


def provenance() -> dict[str, Any]:
  """Returns the command, with FOLDER for absolute paths, and versions that results are published
  with.
  """
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES} | {
    'python': platform.python_version()
  }
  return {
    'command': ' '.join(
      ['python', *(re.sub(r'(^|=)/\S*', r'\1FOLDER', word) for word in sys.argv)]
    ),
    'versions': versions,
  }
