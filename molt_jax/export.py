"""Writes a run as one file that works anywhere, or as programs of StableHLO: `python -m
molt_jax.export --workdir=DIR --out=NAME.molt`.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('export', sys.argv[1:]))

import argparse
import dataclasses
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from molt_jax.config import resolved
from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.evaluation import calibration, model_file, trained
from molt_jax.evaluation.prediction_sets import Calibration
from molt_jax.exporting import card, examples, hub, programs
from molt_jax.features import frozen
from molt_jax.predict import Predictor
from molt_jax.runtime import atomic, console, sealed, terminal
from molt_jax.towers import kept

LIBRARIES = ('molt_jax', 'jax', 'flax', 'numpy')
EXACT = 1e-6  # What answers may differ by when the file is read again on the same machine.


def export(
  workdir: str | pathlib.Path, out: str | pathlib.Path, *, quantize: str = 'none', split: str = ''
) -> dict[str, Any]:
  """Writes the file of a run and reads it again.

  Args:
    workdir: the run's folder, or its file.
    out: the file, NAME.molt; it is there whole or not at all.
    quantize: 'none' or 'int8', of the towers' matrices.
    split: the split that its examples are of; '': they are made up, and no data leave the machine.

  Returns:
    {'out', 'bytes', 'difference': the largest one of a probability of an example when the file is
    read again, 'card': the model card}.

  Raises:
    UserError: no run there, its towers cannot be written, the file cannot be written, or answers
      otherwise.
  """
  out = pathlib.Path(out)
  run = trained.open(workdir)
  atomic.try_out(out.parent, tried=f'{out} cannot be written')
  if run.config.backbones.quantization == 'int4':
    raise UserError('--workdir: towers in int4 are not written; give a run with int8 or none')
  pairs = _pairs(run, split)
  run.check_towers()
  model = Predictor(_portable(run, quantize))
  answers_nk = model.probabilities(pairs)
  known = [
    model_file.Example(*pair, p_k.tolist()) for pair, p_k in zip(pairs, answers_nk, strict=True)
  ]
  text = card.text(out.stem, model.config.to_dict(), model.run.meta, _scores(run))
  about = {
    'kind': model_file.KIND,
    'version': model_file.VERSION,
    'written_with': {name: importlib.metadata.version(name) for name in LIBRARIES},
  }
  sealed.write(out, _members(model, known, text, run), about)
  read = Predictor(out).probabilities(pairs)
  difference = float(np.abs(read - answers_nk).max())
  if difference > EXACT:
    raise UserError(f'{out}: it answers otherwise than the run, by up to {difference:.3g}')
  return {'out': str(out), 'bytes': out.stat().st_size, 'difference': difference, 'card': text}


def _pairs(run: trained.Trained, split: str) -> list[examples.Pair]:
  modalities = resolved.modalities(run.config)
  if split:
    return examples.of_split(trained.open_split(run, split)[0], modalities)
  return examples.made_up(run.class_names, modalities)


def _portable(run: trained.Trained, quantize: str) -> trained.Trained:
  """Returns a run that says nothing of where it was and computes on one device."""
  config = trained.portable(run.config)
  if quantize != 'none':
    config.backbones.quantization = quantize
  changed = dataclasses.replace(run, config=config, examples=())
  backbones = frozen.identities(changed.assembly.towers)
  meta = {key: value for key, value in run.meta.items() if key != 'config'}
  return dataclasses.replace(changed, meta={**meta, 'backbones': backbones})


def _scores(run: trained.Trained) -> dict[str, Any] | None:
  """Returns evaluation.json of the run where it is of its checkpoint."""
  found = run.evaluation
  if found.get('step') != run.meta['step'] or not found.get('results'):
    return None
  return {key: found[key] for key in ('split', 'num_examples', 'step', 'results')}


def _members(
  model: Predictor,
  known: Sequence[model_file.Example],
  text: str,
  source: trained.Trained,
) -> Iterator[tuple[str, bytes]]:
  run = model.run
  config = _named(run.config)
  yield 'README.md', text.encode()
  variables = {key: value for key, value in model.variables.items() if value}
  yield from model_file.members(config, {**run.meta, 'config': config}, variables, known)
  if scores := _scores(source):
    yield model_file.SCORES, (json.dumps(scores, indent=1) + '\n').encode()
  if found := _calibration(source, run):
    content = io.BytesIO()
    found.dump(content)
    yield calibration.CALIBRATION, content.getvalue()
  for modality, tower in run.assembly.towers.items():
    reads = run.assembly.method.reads[modality]
    last = tower.config.num_layers
    if reads.lowest is None and not reads.heads and not reads.pooled:
      last = max(reads.states)
    yield from kept.members(tower, model.towers([modality])[modality], last)


def _calibration(source: trained.Trained, written: trained.Trained) -> Calibration | None:
  """Returns what prediction sets are made by; None, and a message, where there is none.

  Of towers that were quantised it is another.
  """
  same = source.config.backbones.quantization == written.config.backbones.quantization
  try:
    if same:
      return calibration.of_run(source)
    quantized = source.config.copy_and_resolve_references()
    quantized.backbones.quantization = written.config.backbones.quantization
    return calibration.computed(dataclasses.replace(written, config=quantized))
  except UserError as error:
    console.log(f'written without prediction sets: {error}')
    return None


def _named(config: Any) -> dict[str, Any]:
  """The config with names in the place of paths of this machine."""
  fields = config.to_dict()
  for modality in MODALITIES:
    fields['backbones'][modality]['path'] = modality
  return fields


def export_programs(workdir: str | pathlib.Path, out: str | pathlib.Path) -> dict[str, Any]:
  """Writes the programs of a run; see `exporting.programs`.

  Raises:
    UserError: no run there, or it cannot be written so.
  """
  run = trained.open(workdir)
  run.check_towers()
  model = Predictor(_portable(run, run.config.backbones.quantization))
  towers = model.towers(list(model.run.assembly.towers))
  names = programs.write(pathlib.Path(out), model.run.assembly, model.variables, towers)
  return {'out': str(out), 'programs': names}


def command(flags: argparse.Namespace) -> None:
  """The work of the command: prints one JSON object."""
  if flags.format == 'stablehlo':
    print(terminal.json_line(export_programs(flags.workdir, flags.out)))
    return
  found = export(flags.workdir, flags.out, quantize=flags.quantize, split=flags.examples or '')
  text = found.pop('card')
  console.log(f'{flags.out} is written, and answers its examples when it is read again')
  if flags.push_to_hub:
    found['hub'] = hub.push(flags.push_to_hub, pathlib.Path(flags.out), text)
  print(terminal.json_line(found))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('export', argv)
