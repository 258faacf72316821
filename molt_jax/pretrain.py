"""Pretrains an image tower and a text tower on pairs: `python -m molt_jax.pretrain
--config=pretrain_openmoji --workdir=DIR`.

DIR holds config.json (resolved), metrics.jsonl, events/ (TensorBoard), checkpoints/{latest,best}/
and, at the end, tower/: the image tower as a Hugging Face directory, for `backbones.image.path` and
`transformers.CLIPVisionModel`; and, where the towers are a CLIP with its own projections, pair/:
both as one `transformers.CLIPModel`. The same command goes on where a run stopped, bit for bit.
"""

import sys

from molt_jax import commands

if __name__ == '__main__':  # Arguments are read before JAX is imported, so that --help is quick.
  commands.end(commands.run('pretrain', sys.argv[1:]))

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from molt_jax.config.pretraining import PRETRAINING
from molt_jax.data.sources import Dataset, Source
from molt_jax.errors import UserError
from molt_jax.evaluation import trained
from molt_jax.features import opening
from molt_jax.objectives import contrastive
from molt_jax.pairs import augment, batches, in_use, retrieval, towers
from molt_jax.pairs import method as pairs
from molt_jax.runtime import compiling, console, sharding
from molt_jax.runtime.signals import exit_code
from molt_jax.towers import export
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.training import train_state, workdir
from molt_jax.training.assembly import Assembly
from molt_jax.training.monitor import StepMonitor
from molt_jax.training.schedule import StepSchedule
from molt_jax.training.train_state import TrainState
from molt_jax.training.trainer import Trainer

SPLITS = ('train', 'validation')


def pretrain(
  config: ml_collections.ConfigDict, folder: pathlib.Path, *, data_changed: bool = False
) -> pathlib.Path | None:
  """Trains (or goes on training) a pair of towers in `folder`, then writes the image tower.

  Args:
    config: a validated config of pretraining.
    folder: the run's folder; made if need be.
    data_changed: go on with data that have changed since the checkpoint; refused otherwise.

  Returns:
    The folder of the image tower, `folder`/tower; None if it was frozen.

  Raises:
    UserError: a mistake of the user's, or a loss that is not finite.
    Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  with workdir.working_in(config, pathlib.Path(folder)) as folder:
    return PairTrainer(config, folder, data_changed=data_changed).run()


class PairTrainer(Trainer):
  """A run of a pair of towers."""

  title, unit = 'pretraining', 'images'

  @property
  def units_per_step(self) -> int:
    """See `Trainer`."""
    return self.assembly.config.train.batch_size

  def check(self, assembly: Assembly) -> None:
    """See `Trainer`."""
    _check_pairs(assembly.config, assembly.data)

  def num_examples(self) -> int:
    """See `Trainer`."""
    return len(batches.complete_rows(self.assembly.data.splits['train']))

  def before_state(self) -> None:
    """See `Trainer`."""
    self.objective = pairs.PairLoss(pairs.objectives(self.assembly.config))

  def introduce(self, state: TrainState, schedule: StepSchedule) -> None:
    """See `Trainer`."""
    _introduce(self.assembly, state, schedule)

  def open_features(self) -> None:
    """See `Trainer`."""
    self._pooled = _pool_frozen_texts(self.assembly)
    method = self.assembly.method
    self.frozen = dict.fromkeys(method.modules)
    if 'image' in method.frozen:
      config = self.assembly.config
      mesh, dtype = self.assembly.mesh, config.compute_dtype
      self.frozen['image'] = towers.load_weights(config, mesh, 'image', dtype)
    self._embed = compiling.jit(method.embed_batch)

  def begin(self, state: TrainState) -> TrainState:
    """See `Trainer`; pooled texts are standardised by those of the training split."""
    state = super().begin(state)
    if not self._pooled:
      return state
    complete = batches.complete_rows(self.assembly.data.splits['train'])
    found = in_use.statistics(self._pooled['train'][complete])
    placed = {name: jax.device_put(x, state.statistics[name].sharding) for name, x in found.items()}
    return state.replace(statistics=placed)

  def iterator(self) -> Any:
    """See `Trainer`."""
    config = self.assembly.config
    return batches.train_iterator(
      self.assembly.data.splits['train'],
      self.assembly.preprocess,
      _views(config),
      self.assembly.batching('train'),
      seed=config.seed,
      text_pooled_nd=self._pooled.get('train'),
    )

  def validate(self, state: TrainState, monitor: StepMonitor) -> tuple[dict[str, Any], str]:
    """See `Trainer`."""
    variables = {'params': state.params, 'statistics': state.statistics}
    scores = self._scores(self.assembly.method.whole(variables, self.frozen))
    seconds = monitor.epoch_seconds
    record = {**scores, 'epoch_seconds': round(seconds, 2)}
    score_is = 'fewer than two validation images with a text can be read'
    if 'image_to_text' in scores:
      both = [scores[way]['R@10'] for way in ('image_to_text', 'text_to_image')]
      record['score'], score_is = float(np.mean(both)), 'R@10, mean of both ways'
    return record, f'{score_is}; {seconds:.0f} s an epoch'

  def finish(self) -> pathlib.Path | None:
    """See `Trainer`: writes the image tower."""
    if self.assembly.preprocess.report.counts():
      console.log(self.assembly.preprocess.report.line())
    if towers.has_own_projections(self.assembly.config):
      write_pair(self.workdir)
    return write_tower(self.workdir)

  def _scores(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Scores the pairs of the validation split that have both modalities."""
    source = self.assembly.data.splits['validation']
    images, texts, positions = [], [], []
    for batch in self.assembly.eval_batches(source):
      if self._pooled:  # Padding has index -1 and is dropped.
        batch['text_pooled'] = self._pooled['validation'][batch['index']]
      placed = sharding.put_batch(batch, self.assembly.mesh)
      embeddings = self._embed(variables, placed)
      complete_b = batch['present'].all(axis=-1)
      images.append(np.asarray(embeddings.image_bc)[complete_b])
      texts.append(np.asarray(embeddings.text_bc)[complete_b])
      positions.append(batch['index'][complete_b])
    for name, parts in (('images', images), ('texts', texts)):
      in_use.check_finite(np.concatenate(parts), name)
    written = [source.read(int(n), image=False)['text'] for n in np.concatenate(positions)]
    return retrieval.evaluate_pair(np.concatenate(images), np.concatenate(texts), texts=written)


def _check_pairs(config: ml_collections.ConfigDict, data: Dataset) -> None:
  """Refuses splits without enough complete pairs."""
  for split in SPLITS:
    if getattr(data.splits[split], 'most_images', 1) > 1:
      raise UserError(
        f'config.dataset: the {split} split has examples of several images; give one a row'
      )
  counts = {split: len(batches.complete_rows(data.splits[split])) for split in SPLITS}
  for split, count in counts.items():
    if count < 2:
      raise UserError(
        f'config.dataset: the {split} split has {count} example(s) with image and text, which '
        'leaves nothing to contrast; give more'
      )
  if config.train.batch_size > counts['train']:
    raise UserError(
      f'config.train.batch_size: {config.train.batch_size} is more than the {counts["train"]} '
      'examples with image and text, so that a pair would '
      'be its own negative; give at most that'
    )


def _texts(source: Source) -> list[str]:
  return [source.read(int(row), image=False)['text'] for row in batches.complete_rows(source)]


def _pool_frozen_texts(assembly: Assembly) -> dict[str, np.ndarray]:
  """Returns split -> float32[N, D], the pooled text of each example (zeros where it is not used);
  {} if the text tower is trained.
  """
  if 'text' not in assembly.method.frozen:
    return {}
  texts = {split: _texts(assembly.data.splits[split]) for split in SPLITS}
  every = texts['train'] + texts['validation']
  both_nd = opening.pooled_texts(assembly.extraction, every, assembly.config.input.text_store)
  pooled, start = {}, 0
  for split, own in texts.items():
    source = assembly.data.splits[split]
    pooled[split] = np.zeros((len(source), both_nd.shape[1]), np.float32)
    pooled[split][batches.complete_rows(source)] = both_nd[start : start + len(own)]
    start += len(own)
  return pooled


def _views(config: ml_collections.ConfigDict) -> batches.PairViews:
  """Returns what the objectives need to see of each pair."""
  a = config.augment
  needs = [field for name in pairs.objectives(config) for field in contrastive.NEEDS[name]]
  second = any('augmented' in field for field in needs)
  text = augment.TextAugmentation(delete=a.text.delete, swap=a.text.swap)
  image = augment.ImageAugmentation(
    min_area=a.image.min_area,
    max_aspect=a.image.max_aspect,
    flip=a.image.flip,
    color=a.image.color,
  )
  return batches.PairViews(
    image=image,
    text=text,
    num_views={'image': 1 + second, 'text': 1 + (second and text.changes)},
    across=a.image.across,
    keep=config.input.cache,
  )


def _introduce(assembly: Assembly, state: TrainState, schedule: StepSchedule) -> None:
  """Tells the user in a few lines what is about to be trained."""
  data, config = assembly.data, assembly.config
  counts = [
    f'{len(batches.complete_rows(data.splits[split]))} pairs in {split}' for split in SPLITS
  ]
  console.log(f'data: {data.name}, {", ".join(counts)}')
  for name, tower in assembly.towers.items():
    start = 'trained from scratch'
    if name in assembly.method.frozen:
      start = 'frozen'
    elif config.backbones[name].pretrained:
      start = 'trained on'
    shape = f'{tower.config.num_layers} layers, width {tower.config.hidden_size}'
    console.log(f'{name} tower: {tower.identity["path"]}, {shape}, {start}')
  count = train_state.count(state.params)
  console.log(
    f'{count:,} parameters to train; {schedule.total} steps of {config.train.batch_size} pairs'
  )


# ---- What comes out ------------------------------------------------------------------------------


def open_run(folder: pathlib.Path) -> trained.Trained:
  """Opens a run of this command; see `trained.open`."""
  return trained.open(folder, schema=PRETRAINING)


def load_pair(folder: pathlib.Path) -> in_use.TowerPair:
  """Opens the checkpoint of a run that `eval.select` names, with its frozen towers.

  Raises:
    UserError: there is no run or a damaged one, or a tower is not the one it was trained with.
  """
  return make_pair(open_run(folder))


def make_pair(run: trained.Trained) -> in_use.TowerPair:
  """As `load_pair`, of an opened run."""
  run.check_towers()
  assembly, method = run.assembly, run.assembly.method
  variables = method.whole(run.variables(), pairs.load_frozen(method))
  size = run.config.eval.batch_size
  return in_use.TowerPair(method, variables, assembly.preprocess, size, assembly.mesh)


def write_tower(folder: pathlib.Path) -> pathlib.Path | None:
  """Writes the trained image tower of a run to `folder`/tower; one that was frozen is where it was
  (None).
  """
  run = open_run(folder)
  run.check_towers()
  if 'image' in run.assembly.method.frozen:
    return None
  tower = run.assembly.towers['image']
  written = export.save_image_tower(
    folder / 'tower',
    run.variables()['params']['image_tower'],
    tower.config,
    _seen(run),
    dtype=run.config.export.dtype,
  )
  _tell('image tower', written)
  return written


def write_pair(folder: pathlib.Path) -> pathlib.Path:
  """Writes both trained towers of a run with their own projections to `folder`/pair."""
  run = open_run(folder)
  run.check_towers()
  written = export.save_pair(
    folder / 'pair',
    run.variables()['params'],
    run.assembly.towers,
    _seen(run),
    dtype=run.config.export.dtype,
  )
  _tell('pair', written)
  return written


def _seen(run: trained.Trained) -> ImageSpec:
  """How the run has made pictures what its image tower sees."""
  how = run.assembly.preprocess
  own = run.assembly.towers['image'].preprocess
  return dataclasses.replace(own, resize=how.resize, scaled=how.scaled)


def _tell(what: str, written: pathlib.Path) -> None:
  size = sum(file.stat().st_size for file in written.iterdir()) / 1e6
  console.log(f'{what}: {written} ({size:.1f} MB)')


def command(flags: argparse.Namespace) -> int | None:
  """The work of the command; exit code 130 or 143: stopped by a signal, saved."""
  folder, data_changed = pathlib.Path(flags.workdir), flags.data_changed
  return exit_code(lambda: pretrain(flags.config, folder, data_changed=data_changed))


def main(argv: Sequence[str]) -> int:
  """The command line; see `commands.run`. Exit code 0: done; 2: a mistake of the user's."""
  return commands.run('pretrain', argv)
