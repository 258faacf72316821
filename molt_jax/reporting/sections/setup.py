"""Set-up: what was run on what, and with which config."""

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.reporting.document import (
  Page,
  percent,
  safe,
  series_of,
)
from molt_jax.reporting.runs import Run

MOST_CONFIG = 100_000  # Characters of a config.


def setup(page: Page) -> str:
  """What was run on what, a column a run; what was chosen other than by default; every field."""
  names = [safe(run.name) for run in page.runs]
  rows = [[title, *(cell(run) for run in page.runs)] for title, cell in FACTS.items()]
  table = page.table(['', *names], rows, 'The runs.')
  rows = []
  for name in _changed(page.runs):
    rows.append([f'<code>{name}</code>', *(_field(run, name) for run in page.runs)])
  caption = 'Fields of the config that differ from their defaults.'
  chosen = page.table(['field', *names], rows, caption)
  whole = ''.join(
    f'<details><summary>Every field of {safe(run.name)}</summary><pre>{_whole(run)}</pre></details>'
    for run in page.runs
  )
  return table + chosen + whole


def _changed(runs: Sequence[Run]) -> list[str]:
  """The fields that differ from their default in one of the runs."""
  default = CLASSIFIER.default()
  changed = set()
  for run in runs:
    changed |= {line.split(': ', 1)[0] for line in resolved.differences(default, run.config)}
  return [name for name, _ in CLASSIFIER.items() if name in changed]


def _field(run: Run, name: str) -> str:
  return f'<code>{safe(CLASSIFIER.get(run.config, name))}</code>'


def _whole(run: Run) -> str:
  """The config, with its line breaks."""
  text = resolved.to_json(run.config)[:MOST_CONFIG]
  return '\n'.join(safe(line, MOST_CONFIG) for line in text.split('\n'))


def _dataset(run: Run) -> str:
  return safe(run.config.dataset.name)


def _sizes(run: Run) -> str:
  sizes = run.about.get('examples', {})
  return safe(', '.join(f'{count:,} {split}' for split, count in sizes.items())) or '-'


def _parameters(run: Run) -> str:
  return f'{run.about["parameters"]:,}' if 'parameters' in run.about else '-'


def _device(run: Run) -> str:
  if 'device' not in run.about:
    return '-'
  return safe(f'{run.about.get("devices", 1)} x {run.about["device"]}')


def _seconds(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes:02d} min'
  return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def _time(run: Run) -> str:
  calls = run.about.get('calls')
  if not calls:
    return '-'
  total = _seconds(sum(call['seconds'] for call in calls))
  return f'{total} in {len(calls)} calls' if len(calls) > 1 else total


def _peak(run: Run, key: str) -> str:
  peaks = [call[key] for call in run.about.get('calls', ()) if call.get(key)]
  return f'{max(peaks) / 1e9:.2f} GB' if peaks else '-'


def _tower(run: Run, modality: str) -> str:
  tower = run.evaluation['backbones'].get(modality)
  if not tower:
    return 'not used'
  sha256 = safe(tower['sha256'][:12])
  return f'<code>{safe(tower["path"])}</code><br><small>sha256 {sha256}</small>'


def _speed(run: Run) -> str:
  _, rates = series_of(run.lines('train'), 'images_per_second')
  rates = [rate for rate in rates if np.isfinite(rate)]
  return f'{np.median(rates):,.0f} examples/s' if rates else '-'


def _absence(run: Run) -> str:
  c = run.config.missing
  trained = 'complete inputs only'
  if c.views:
    trained = 'three views'
  elif c.train_dropout:
    trained = f'modality dropout {c.train_dropout:g}'
  gaps = ''
  if c.train_rate:
    gaps = f', {percent(c.train_rate, 0)} % of the training rows lack {c.train_type}'
  return safe(f'{c.strategy}; trained on {trained}{gaps}')


def _command(run: Run) -> str:
  command = f'python -m molt_jax.evaluate --workdir={shlex.quote(str(run.folder))}'
  return f'<code>{safe(command, 5_000)}</code>'


FACTS: Mapping[str, Callable[[Run], str]] = {
  'method': lambda run: safe(run.config.method),
  'absence': _absence,
  'data': lambda run: f'{_dataset(run)} <small>{safe(run.config.dataset.path)}</small>',
  'examples': _sizes,
  'image tower': functools.partial(_tower, modality='image'),
  'text tower': functools.partial(_tower, modality='text'),
  'trained parameters': _parameters,
  'epochs, batch': lambda run: f'{run.config.train.epochs:g}, {run.config.train.batch_size}',
  'evaluated step': lambda run: str(run.evaluation['step']),
  'seed': lambda run: str(run.config.seed),
  'device': _device,
  'time': lambda run: f'{_time(run)} <small>training and test</small>',
  'speed': _speed,
  'peak memory of the process': functools.partial(_peak, key='peak_host_bytes'),
  'peak memory of a device': functools.partial(_peak, key='peak_device_bytes'),
  'versions': lambda run: safe(', '.join(map(' '.join, run.evaluation['versions'].items()))),
  'evaluate again': _command,
}
