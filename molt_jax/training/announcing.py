"""What a user is told of a run of a classifier, before it and after it."""

import pathlib
import shlex

import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.data.sources import UNLABELLED, Source
from molt_jax.runtime import console
from molt_jax.training import (
  train_state,
)
from molt_jax.training.assembly import Assembly
from molt_jax.training.schedule import StepSchedule
from molt_jax.training.train_state import TrainState


def what_next(config: ml_collections.ConfigDict, folder: pathlib.Path) -> list[str]:
  """Returns the commands that a user may give on a run that has ended."""
  where = f'--workdir={shlex.quote(str(folder))}'
  used = resolved.modalities(config)
  rates = ' --missing_rate=0.3,0.7 --missing_type=text,image' if len(used) > 1 else ''
  example = {'image': '--image=photo.jpg', 'text': "--text='some words'"}
  one = ' '.join(example[modality] for modality in used)
  return [
    'next, for example:',
    f'  molt evaluate {where}{rates}',
    f'  molt predict {where} {one}',
    f'  molt report {where}',
  ]


def introduce(assembly: Assembly, state: TrainState, schedule: StepSchedule) -> None:
  """Tells the user in a few lines what is about to be trained."""
  data, config = assembly.data, assembly.config
  sizes = [f'{len(source)} {name}{_gaps(source)}' for name, source in data.splits.items()]
  console.log(f'data: {data.name}, {", ".join(sizes)}, {assembly.num_classes} classes')
  for modality, tower in assembly.towers.items():
    path, shape = tower.identity['path'], tower.config
    note = ', frozen'
    if config.backbones[modality].trainable:
      note = f', trained where {config.backbones[modality].trainable!r} matches'
    if path.startswith('random:'):
      note += ' (RANDOM weights: nothing was learned before)'
    layers = f'{shape.num_layers} layers, width {shape.hidden_size}'
    console.log(f'{modality} tower: {path}, {layers}{note}')
  count = train_state.count(state.params)
  how = f'{count:,} parameters; {schedule.total} steps of {config.train.batch_size}'
  if not assembly.method.is_trained:
    how = 'solved in one pass; nothing is trained'
  console.log(f'head: {config.method}, {how}')


def _gaps(source: Source) -> str:
  """Says how many rows lack a modality or their label by nature; nothing where none does."""
  image_n, text_n = source.present.T
  counts = {
    'both': image_n & text_n,
    'image only': image_n & ~text_n,
    'text only': text_n & ~image_n,
  }
  parts = (
    [] if counts['both'].all() else [f'{np.sum(has_n)} {name}' for name, has_n in counts.items()]
  )
  unlabelled = sum(label == UNLABELLED for label in source.labels)
  parts += [f'{unlabelled} without a label'] if unlabelled else []
  return f' ({", ".join(parts)})' if parts else ''
