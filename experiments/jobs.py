"""Rows of a table that are made each in a process of its own, so that processor seconds and peak
memory are theirs, and whose results are kept as they come: a call that was cut off goes on, and
several calls may make parts of a table at once.

A script's own process starts itself with `--job=ROW --job_to=FILE` for one row of one data set; the
file then holds seed -> result. OUT/DATA.json holds row -> seed -> result, each with a key of all
that it depends on, so that what is there is not made again.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grid
import ml_collections
import runs
from absl import flags

from molt_jax.config import resolved
from molt_jax.config.json_files import read_json
from molt_jax.data.modalities import CONDITIONS, MODALITIES
from molt_jax.errors import UserError
from molt_jax.evaluation import records
from molt_jax.runtime import atomic, logbook

LIST = flags.DEFINE_bool('list', False, 'Only names what is lacking.')
JOB = flags.DEFINE_string('job', '', 'Used by the script itself: the row that a process makes.')
JOB_TO = flags.DEFINE_string('job_to', '', 'Used by the script itself: where its result goes.')

MISSING_RATE = '70 % both'
COLUMNS = {
  'none_absent': 'complete',
  'text_absent': 'without text',
  'image_absent': 'without image',
  MISSING_RATE: MISSING_RATE,
}


def in_process(
  script: str, data: str, row: str, seeds: Sequence[int | str], more: Sequence[str] = ()
) -> dict[str, Any]:
  """Makes a row in a process of its own; returns seed -> result.

  Args:
    script: path of the script.
    data: as `--data` has it.
    row: name of the row.
    seeds: all in this one process.
    more: flags beside those of this call.

  Raises:
    UserError: the process failed.
  """
  target = pathlib.Path(grid.RUNS.value) / f'job_{os.getpid()}.json'
  target.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, script, f'--data={data}', f'--seeds={",".join(map(str, seeds))}']
  command += [f'--job={row}', f'--job_to={target}', f'--runs={grid.RUNS.value}']
  command += [*(f'--set={item}' for item in grid.SET.value), *more]
  done = subprocess.run(command, check=False)
  if done.returncode:
    raise UserError(f'{row} on {grid.name_of(data)} ended with exit code {done.returncode}')
  found = read_json(target, 'start again')
  target.unlink()
  return found


def answer(found: Mapping[str, Any]) -> None:
  """Writes what a process was asked for: seed -> result."""
  atomic.write(pathlib.Path(JOB_TO.value), logbook.to_json(found))


def cost() -> dict[str, float]:
  """Returns the processor seconds and the peak memory of this process."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return {
    'cpu_seconds': round(used.ru_utime + used.ru_stime, 1),
    'peak_megabytes': round(used.ru_maxrss / 1024),
  }


def cost_of(calls: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns `cost` if this process did all of a run, else nothing of it: one that was killed left
  checkpoints, and no record of itself among the run's calls.
  """
  is_whole = [call['from_step'] for call in calls] == [0]
  return cost() if is_whole else dict.fromkeys(cost())


def trained(config: ml_collections.ConfigDict, data: str) -> dict[str, Any]:
  """Trains and evaluates a config, or reads the run where that is done.

  Returns:
    'metric' (of the headline), 'validation' (score), 'test' (condition -> scores), 'seconds',
    'cpu_seconds' and 'peak_megabytes' of the process that trained it (None where several did, or an
    older script), 'parameters' that are trained, 'epochs' (None where nothing is), whether it
    'extracted_features', 'towers' (paths).
  """
  folder = pathlib.Path(grid.RUNS.value) / grid.name_of(data) / resolved.config_hash(config)
  was_there = (folder / 'result.json').exists()
  result = runs.run(config, folder)
  record = read_json(folder / 'run.json', 'delete the run')
  if not (folder / 'cost.json').exists():
    spent = cost_of([] if was_there else record['calls'])
    atomic.write(folder / 'cost.json', logbook.to_json(spent) + '\n')
  log = (folder / 'log.txt').read_text(encoding='utf-8')
  return {
    'metric': grid.metric(config),
    'validation': result['validation'].get('score'),
    'test': scores(records.Predictions.load(folder / records.PREDICTIONS)),
    'seconds': result['seconds'],
    **read_json(folder / 'cost.json', 'delete the run'),
    'parameters': record['parameters'],
    'epochs': _epochs(config, folder, record) if record['parameters'] else None,
    'extracted_features': 'through the tower once' in log,
    'towers': towers(config),
  }


def tried(config: ml_collections.ConfigDict, data: str) -> dict[str, Any]:
  """Tries a config out, or reads what came of it.

  Returns:
    'validation' (score), 'seconds'.
  """
  folder = pathlib.Path(grid.RUNS.value) / grid.name_of(data) / resolved.config_hash(config)
  result = runs.try_out(config, folder)
  return {'validation': result['validation']['score'], 'seconds': result['seconds']}


def _epochs(config, folder, record):
  steps = logbook.read(folder)[-1]['step']
  return round(steps * config.train.batch_size / record['examples']['train'], 2)


def towers(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns modality -> path of its tower."""
  return {modality: config.backbones[modality].path for modality in MODALITIES}


def scores(predictions: records.Predictions) -> dict[str, dict[str, float]]:
  """Returns condition -> scores on the test split, of the conditions that there are."""
  found = {name: predictions.scores(name) for name in predictions.conditions}
  if set(CONDITIONS) <= set(predictions.conditions):
    found[MISSING_RATE] = predictions.missing_rate(*grid.MISSING[MISSING_RATE])
  return found


def with_store(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Returns the config with a feature store among the runs, unless the user named one."""
  if not config.features.store or any('features.store=' in item for item in grid.SET.value):
    return config
  store = pathlib.Path(grid.RUNS.value) / 'features' / grid.name_of(data)
  return runs.override(config, {'features.store': str(store)})


def fields_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns what a result depends on: not where data and stores lie."""
  fields = resolved.identity(config)
  fields['dataset'].pop('path')
  fields['features'].pop('store')
  return fields


def digest(row: str, fields: Mapping[str, Any], prints: Mapping[str, Any]) -> str:
  """Returns the key of a result: of the row, of the fields that it reads, of the data."""
  content = json.dumps([row, fields, prints], sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def results(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns row -> seed -> result, of those that are there."""
  return read_json(path, 'delete it')['rows'] if path.exists() else {}


def keep(path: pathlib.Path, order: Sequence[str], row: str, found: Mapping[str, Any]) -> None:
  """Adds results (seed -> result) of a row to a file; other processes may do so too.

  Args:
    path: of the file.
    order: of the rows in it.
    row, found: what is added.
  """
  lock = pathlib.Path(grid.RUNS.value) / f'{path.stem}.lock'
  lock.parent.mkdir(parents=True, exist_ok=True)
  with lock.open('w') as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    rows = results(path)
    rows[row] = dict(sorted({**rows.get(row, {}), **found}.items()))
    ordered = {name: rows[name] for name in order if name in rows}
    content = {'versions': runs.provenance()['versions'], 'rows': ordered}
    atomic.write(path, logbook.to_json(content, indent=1) + '\n')
