"""Pretrains an image tower and a text tower on pairs: `python -m molt_jax.pretrain
--config=configs/pretrain_openmoji.py --workdir=DIR`.

DIR holds config.json (resolved), metrics.jsonl, events/ (TensorBoard), checkpoints/{latest,best}/
and, at the end, tower/: the image tower as a Hugging Face directory, for `backbones.image.path` and
`transformers.CLIPVisionModel`. The same command goes on where a run stopped, bit for bit.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from molt_jax.config import schema as config_lib
from molt_jax.data import datasets, pipeline
from molt_jax.data.sources import Dataset, Source
from molt_jax.errors import UserError
from molt_jax.methods import model as model_lib
from molt_jax.objectives import contrastive
from molt_jax.pairs import augment, batches, retrieval
from molt_jax.pairs import model as dual
from molt_jax.runtime import cli, sharding
from molt_jax.towers import export
from molt_jax.training import checkpoint, loop, runs, train_state

SPLITS = ('train', 'validation')

# ---- The step ------------------------------------------------------------------------------------


def pretrain_step(
  state: train_state.TrainState,
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  *,
  model: dual.DualModel,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  """One update of all that is trained; `frozen` (towers by parameter name) is only read. Returns
  the new state and metrics (scalars).
  """
  key, patches_key = (
    train_state.stream(state.seed, name, state.step) for name in ('objective', 'patches')
  )

  def loss_fn(params):
    variables = {'params': {**params, **frozen}, 'statistics': state.statistics}
    scale = jnp.exp(params['log_scale'])
    return contrastive.pair_loss(
      model.embed_batch(variables, batch, patches_key), dual.objectives(config), scale, key
    )

  (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  params = {
    **params,
    'log_scale': jnp.minimum(params['log_scale'], math.log(config.temperature.max_scale)),
  }
  metrics = {
    'loss': loss,
    **{f'loss_{name}': value for name, value in parts.items()},
    'grad_norm': optax.tree.norm(grads),
    'scale': jnp.exp(state.params['log_scale']),
  }
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


# ---- The loop ------------------------------------------------------------------------------------


def pretrain(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, data_changed: bool = False
) -> pathlib.Path | None:
  """Trains (or goes on training) a pair of towers in `workdir`, then writes the image tower.

  Args:
    config: a validated config of `config.PRETRAIN_SCHEMA`.
    workdir: the run's folder; made if need be.
    data_changed: go on with data that have changed since the checkpoint; refused otherwise.

  Returns:
    The folder of the image tower, `workdir`/tower; None if it was frozen.

  Raises:
    UserError: a mistake of the user's, or a loss that is not finite.
    loop.Interrupted: SIGTERM or SIGINT; the state is saved.
  """
  schema = config_lib.PRETRAIN_SCHEMA
  with loop.working_in(config, pathlib.Path(workdir), schema=schema) as workdir:
    return _pretrain(config, workdir, data_changed)


def _pretrain(config, workdir, data_changed):
  mesh = sharding.make_mesh(config)
  for name in ('train', 'eval'):
    sharding.check_batch_size(f'{name}.batch_size', config[name].batch_size, mesh)
  towers = dual.describe_towers(config)
  data = datasets.load_dataset(config)
  _check_pairs(config, data)
  model = dual.make_model(config, towers)
  checkpoints = checkpoint.Checkpoints(workdir)
  saved = checkpoints.meta()
  data = runs.go_on(
    saved,
    config,
    towers,
    data,
    checkpoints=checkpoints,
    data_changed=data_changed,
    schema=config_lib.PRETRAIN_SCHEMA,
  )
  preprocess = model_lib.make_preprocess(config, towers, num_classes=len(data.class_names))
  meta = runs.new_meta(config, towers, data)
  plan = loop.Plan(config, len(batches.complete_rows(data.splits['train'])))
  tx = train_state.make_optimizer(config, plan.total)
  pooled = _pool_frozen_texts(config, model, towers, data, preprocess, mesh)
  frozen = (
    {'image_tower': dual.load_weights(config, mesh, 'image', config.compute_dtype)}
    if 'image' in model.frozen
    else {}
  )
  state = _new_state(config, model, tx, _statistics(data, pooled), mesh, resumed=bool(saved))
  _introduce(config, data, towers, model, state, plan)
  iterator = _iterator(config, data.splits['train'], preprocess, pooled.get('train'))
  if saved:
    state, position = checkpoints.restore(state)
    checkpoints.move(iterator, position)
    cli.say(f'going on from step {int(state.step)} of {plan.total} in {workdir}')
  loop.claim_workdir(config, workdir)
  run = _Run(
    config,
    workdir,
    mesh,
    data,
    checkpoints,
    meta,
    plan,
    model=model,
    tx=tx,
    preprocess=preprocess,
    frozen=frozen,
    pooled=pooled,
  )
  run.run(state, iterator)
  if preprocess.report.counts():
    cli.say(preprocess.report.line())
  return write_tower(workdir)


def _iterator(config, source, preprocess, text_pooled_nd):
  return batches.train_iterator(
    source,
    preprocess,
    _views(config),
    batch_size=config.train.batch_size,
    seed=config.seed,
    text_pooled_nd=text_pooled_nd,
    num_threads=config.input.num_threads,
    prefetch=config.input.prefetch,
  )


class _Run(loop.Loop):
  """A run of a pair of towers."""

  title, unit = 'pretraining', 'images'

  def __init__(
    self,
    config,
    workdir,
    mesh,
    data,
    checkpoints,
    meta,
    plan,
    *,
    model,
    tx,
    preprocess,
    frozen,
    pooled,
  ):
    super().__init__(config, workdir, mesh, data, checkpoints, meta, plan)
    self.preprocess, self.frozen, self.pooled = preprocess, frozen, pooled
    frozen_config = ml_collections.FrozenConfigDict(config)
    self.step_fn = jax.jit(
      functools.partial(pretrain_step, model=model, tx=tx, config=frozen_config), donate_argnums=0
    )
    self.embed_fn = jax.jit(model.embed_batch)

  def step(self, state, batch):
    return self.step_fn(state, self.frozen, batch)

  def validate(self, state, watch):
    results = self._scores(
      {'params': {**state.params, **self.frozen}, 'statistics': state.statistics}
    )
    seconds = watch.epoch_seconds
    record = {**results, 'epoch_seconds': round(seconds, 2)}
    said = 'fewer than two validation images with a text can be read'
    if 'image_to_text' in results:
      both = [results[way]['R@10'] for way in ('image_to_text', 'text_to_image')]
      record['score'], said = float(np.mean(both)), 'R@10, mean of both ways'
    return record, f'{said}; {seconds:.0f} s an epoch'

  def _scores(self, variables):
    """Scores the pairs of the validation split that have both modalities."""
    source = self.data.splits['validation']
    images, texts, rows = [], [], []
    for batch in pipeline.eval_batches(
      source,
      self.preprocess,
      batch_size=self.config.eval.batch_size,
      num_threads=self.config.input.num_threads,
      prefetch=self.config.input.prefetch,
    ):
      if self.pooled:
        batch['text_pooled'] = self.pooled['validation'][
          batch['index']
        ]  # Padding has index -1 and is dropped.
      embeddings = self.embed_fn(variables, sharding.put_batch(batch, self.mesh))
      complete_b = batch['present'].all(axis=-1)
      images.append(np.asarray(embeddings.image_bc)[complete_b])
      texts.append(np.asarray(embeddings.text_bc)[complete_b])
      rows.append(batch['index'][complete_b])
    for name, parts in (('images', images), ('texts', texts)):
      dual.check_finite(np.concatenate(parts), name)
    written = [source.read(int(row), image=False)['text'] for row in np.concatenate(rows)]
    return retrieval.evaluate_pair(
      np.concatenate(images), np.concatenate(texts), texts=written
    )


def _check_pairs(config: ml_collections.ConfigDict, data: Dataset) -> None:
  """Refuses splits without enough complete pairs."""
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


def _pool_frozen_texts(config, model, towers, data, preprocess, mesh) -> dict[str, np.ndarray]:
  """Returns split -> float32[N, D], the pooled text of each row (zeros where it is not used); {} if
  the text tower is trained.
  """
  if 'text' not in model.frozen:
    return {}
  texts = {split: _texts(data.splits[split]) for split in SPLITS}

  def compute():
    params = {'text_tower': dual.load_weights(config, mesh, 'text', config.compute_dtype)}
    return dual.pool_texts(
      model,
      {'params': params, 'statistics': {}},
      preprocess,
      sum(texts.values(), []),
      batch_size=config.eval.batch_size,
      mesh=mesh,
    )

  both_nd = dual.stored_texts(config, towers['text'], sum(texts.values(), []), compute)
  pooled, start = {}, 0
  for split, own in texts.items():
    pooled[split] = np.zeros((len(data.splits[split]), both_nd.shape[1]), np.float32)
    pooled[split][batches.complete_rows(data.splits[split])] = both_nd[start : start + len(own)]
    start += len(own)
  return pooled


def _statistics(data: Dataset, pooled: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return (
    dual.statistics(pooled['train'][batches.complete_rows(data.splits['train'])]) if pooled else {}
  )


def _views(config: ml_collections.ConfigDict) -> batches.PairViews:
  """Returns what the objectives need to see of each pair."""
  a = config.augment
  second = any(
    'augmented' in field for name in dual.objectives(config) for field in contrastive.NEEDS[name]
  )
  text = augment.TextAugmentation(delete=a.text.delete, swap=a.text.swap)
  return batches.PairViews(
    image=augment.ImageAugmentation(
      min_area=a.image.min_area,
      max_aspect=a.image.max_aspect,
      flip=a.image.flip,
      color=a.image.color,
    ),
    text=text,
    num_views={'image': 1 + second, 'text': 1 + (second and text.changes)},
    across=a.image.across,
    keep=config.input.cache,
  )


def _new_state(config, model, tx, statistics, mesh, *, resumed) -> train_state.TrainState:
  """Returns the state before the first step; a run that goes on takes its weights from the
  checkpoint.
  """
  state = train_state.create(
    functools.partial(model.init, text_statistics=statistics),
    tx,
    lambda: (),
    seed=config.seed,
    mesh=mesh,
  )
  pretrained = [t for t in dual.TOWERS if config.backbones[t].pretrained and t not in model.frozen]
  if resumed or not pretrained:
    return state
  loaded = {f'{t}_tower': dual.load_weights(config, mesh, t, 'float32') for t in pretrained}
  placed = jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding),
    loaded,
    {name: state.params[name] for name in loaded},
  )
  return state.replace(params={**state.params, **placed})


def _introduce(config, data, towers, model, state, plan) -> None:
  """Says in a few lines what is about to be trained."""
  cli.say(
    f'data: {data.name}, '
    + ', '.join(
      f'{len(batches.complete_rows(data.splits[split]))} pairs in {split}' for split in SPLITS
    )
  )
  for name, tower in towers.items():
    start = (
      'frozen'
      if name in model.frozen
      else 'trained on'
      if config.backbones[name].pretrained
      else 'trained from scratch'
    )
    cli.say(

        f'{name} tower: {tower.identity["path"]}, {tower.config.num_layers} layers, width '
        f'{tower.config.hidden_size}, {start}'

    )
  cli.say(

      f'{train_state.count(state.params):,} parameters to train; {plan.total} steps of '
      f'{config.train.batch_size} pairs'

  )


# ---- What comes out ------------------------------------------------------------------------------


def _open(workdir: pathlib.Path):
  """Returns (config, class names, towers, model, the trained variables, mesh) of a run."""
  return _parts(open_run(workdir))


def _parts(run: runs.Run):
  """As `_open`, of an opened run."""
  config = run.config
  towers = dual.describe_towers(config)
  model_lib.check_same_towers(run.meta['backbones'], towers)
  model, mesh = dual.make_model(config, towers), sharding.make_mesh(config)
  width = towers['text'].config.hidden_size
  standardised = (
    {name: np.zeros(width, np.float32) for name in ('mean', 'deviation')}
    if 'text' in model.frozen
    else {}
  )
  init = functools.partial(model.init, text_statistics=standardised)
  variables = runs.restore_variables(run, init, mesh)
  return config, run.class_names, towers, model, variables, mesh


def open_run(workdir: pathlib.Path) -> runs.Run:
  """Opens a run of this command; see `trained.open_run`."""
  return runs.open_run(workdir, schema=config_lib.PRETRAIN_SCHEMA)


def load_pair(workdir: pathlib.Path) -> dual.TowerPair:
  """Opens the checkpoint of a run that `eval.select` names, with its frozen towers.

  Raises:
    UserError: there is no run or a damaged one, or a tower is not the one it was trained with.
  """
  return make_pair(open_run(workdir))


def make_pair(run: runs.Run) -> dual.TowerPair:
  """As `load_pair`, of an opened run."""
  config, class_names, towers, model, variables, mesh = _parts(run)
  frozen = {
    f'{t}_tower': dual.load_weights(config, mesh, t, config.compute_dtype) for t in model.frozen
  }
  preprocess = model_lib.make_preprocess(config, towers, num_classes=len(class_names))
  variables = {**variables, 'params': {**variables['params'], **frozen}}
  return dual.TowerPair(model, variables, preprocess, config.eval.batch_size, mesh)


def write_tower(workdir: pathlib.Path) -> pathlib.Path | None:
  """Writes the trained image tower of a run to `workdir`/tower; one that was frozen is where it was
  (None).
  """
  config, _, towers, model, variables, _ = _open(workdir)
  if 'image' in model.frozen:
    return None
  folder = export.save_image_tower(
    workdir / 'tower',
    variables['params']['image_tower'],
    towers['image'].config,
    towers['image'].preprocess,
    dtype=config.export.dtype,
  )
  cli.say(
    f'image tower: {folder} ({sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB)'
  )
  return folder


FLAGS = (
  cli.Flag('config', 'preset, e.g. configs/pretrain_openmoji.py', required=True),
  cli.Flag('workdir', 'folder of the run', required=True),
  cli.Flag('data_changed', 'go on with data that have changed since the checkpoint', switch=True),
)


@cli.command
def main(argv: Sequence[str]) -> int | None:
  """Command line of the module. Exit code 0: done; 2: a mistake of the user's; 130 or 143: stopped
  by a signal, saved.
  """
  flags, overrides = cli.parse(
    'molt_jax.pretrain', 'Train an image tower and a text tower on pairs.', FLAGS, argv
  )

  def work():
    pretrain(
      config_lib.load_config(flags.config, overrides, schema=config_lib.PRETRAIN_SCHEMA),
      pathlib.Path(flags.workdir),
      data_changed=flags.data_changed,
    )

  return loop.exit_code(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
