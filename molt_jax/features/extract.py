"""Feature extraction: towers run on the inputs that a store lacks.

Several processes may do so for one store; each takes its batches in another order and leaves out
what it finds done.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.data import pipeline, transforms
from molt_jax.errors import UserError
from molt_jax.features import cells, hidden_states, store
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.frozen import Reads
from molt_jax.features.inputs import Input, InputBatches, TowerBatch, ahead
from molt_jax.runtime import compiling, console, processes, sharding
from molt_jax.towers import loading

UNITS = {'image': 'images', 'text': 'texts'}
# Most tokens of a batch on a CPU: what passes between layers fits its caches, which makes an image
# tower 15 % faster than with four times as many.
CPU_TOKENS = 1056


@dataclasses.dataclass(frozen=True)
class Extraction:
  """What is needed to compute features.

  Attributes:
    config: reads `backbones`, `features`, `eval.batch_size`, `input.num_threads` and
      `text.max_tokens`.
    reads: modality -> what is read of the tower.
    towers: their descriptions.
    modules: their Linen modules.
    preprocess: how an example becomes arrays; what cannot be used is reported there.
    mesh: where to compute.
  """

  config: ml_collections.ConfigDict
  reads: Mapping[str, Reads]
  towers: Mapping[str, loading.TowerSpec]
  modules: Mapping[str, nn.Module | None]
  preprocess: pipeline.Preprocess
  mesh: jax.sharding.Mesh

  def spec(self, modality: str) -> dict[str, Any]:
    """All that features depend on beside their input.

    The input of the text tower is token ids: tokenizer and `max_tokens` are in them.
    """
    spec = {
      'modality': modality,
      'tower': self.towers[modality].identity['sha256'],
      'tower_dtype': frozen_towers.dtype(self.config),
      'states': list(self.reads[modality].states),
    }
    param_dtype = frozen_towers.param_dtype(self.config)
    if param_dtype != spec['tower_dtype']:
      spec['param_dtype'] = param_dtype
    if self.reads[modality].pooled:
      spec['pooled'] = True
    if self._cells(modality):
      spec['cells'] = self._cells(modality)
    if modality == 'image':
      p = self.preprocess
      spec['preprocess'] = {
        'size': p.image_size,
        'mean': p.mean,
        'std': p.std,
        'resize': p.resize,
        'resample': p.resample,
      }
      if p.scaled:  # What older stores do not have is left out where it says nothing.
        spec['preprocess']['scaled'] = p.scaled
      if not p.rounded:
        spec['preprocess']['rounded'] = False
      spec['decoding'] = transforms.DECODING
    return spec

  def largest(self, modality: str) -> tuple[int, int, int]:
    """Returns (hidden states, most tokens, width) of an entry."""
    architecture, wanted = self.towers[modality].config, self.reads[modality]
    tokens = self.config.text.max_tokens
    if modality == 'image':
      tokens = cells.num_tokens(architecture, wanted.cells)
    return len(wanted.states), 1 if wanted.pooled else tokens, architecture.hidden_size

  def _cells(self, modality: str) -> int:
    """Cells along a side that images are pooled to, 0 where every token is kept."""
    wanted = self.reads[modality].cells
    if modality != 'image' or not wanted:
      return 0
    return wanted if cells.pools(self.towers[modality].config, wanted) else 0

  def run(self, frozen: Mapping[str, Any], arrays: Mapping[str, jax.Array], modality: str):
    """Returns the features of a batch, [B, L, N, D]."""
    states = {modality: self.reads[modality].states}
    found_lbnd = hidden_states.extract(self.modules, frozen, arrays, states).of(modality)
    if self.reads[modality].pooled:
      inputs = hidden_states.clean_inputs(arrays, modality)
      variables = {'params': frozen[modality]}
      pooled_bd = self.modules[modality].apply(variables, found_lbnd[-1], *inputs, method='pool')
      found_lbnd = pooled_bd[None, :, None].astype(jnp.float32)
    if modality == 'image':
      found_lbnd = cells.pool(found_lbnd, self.towers[modality].config, self._cells(modality))
    return jnp.moveaxis(found_lbnd, 1, 0)


def into_store(
  kept: store.FeatureStore, inputs: Sequence[Input], modality: str, how: Extraction
) -> dict[str, str]:
  """Sees to it that a store has the features of inputs.

  Each process of a run computes its share on its own devices; each looks itself at what is still
  lacking then, which cannot be used.

  Args:
    kept: the store.
    inputs: different ones.
    modality: theirs.
    how: what is needed to compute features.

  Returns:
    key -> why, for those that cannot be used.

  Raises:
    UserError: the store cannot be used, or what is lacking does not fit on the disk.
  """
  index, count = jax.process_index(), jax.process_count()
  if count == 1:
    return _extract(kept, inputs, modality, how)
  lacking = [x for x in inputs if x.key not in kept]
  # Nobody adds to it before all have looked, so that the shares cover it.
  processes.wait('feature store: what is lacking')
  mesh = sharding.local_mesh(how.mesh)
  if lacking and mesh is None:
    raise UserError(
      f'config.features.store: {len(lacking)} {UNITS[modality]} are not in it, and a model axis '
      'over several processes cannot compute them; do so with mesh.model = the devices of one '
      "process, or give features.store=''"
    )
  how = dataclasses.replace(how, mesh=mesh)
  _extract(kept, lacking[index::count], modality, how)
  processes.wait('feature store: complete')
  kept.refresh()
  return _extract(kept, inputs, modality, how)


def _extract(
  kept: store.FeatureStore, inputs: Sequence[Input], modality: str, how: Extraction
) -> dict[str, str]:
  """Computes the inputs that the store lacks.

  Returns:
    key -> why, for those that cannot be used.
  """
  missing = [x for x in inputs if x.key not in kept]
  shards = how.mesh.shape['data'] if how.mesh else 1
  batches = InputBatches(how.config.eval.batch_size, shards, how.preprocess, **_bounds(how))
  compute = _Compute(kept, modality, how, missing)
  prepare = functools.partial(batches.prepare, modality=modality)
  faults, unit = {}, UNITS[modality]
  with console.progress(f'extracting features, {unit}', len(missing), unit, compiles=True) as bar:
    try:
      lacking = _lacking(kept, batches.cut(missing, modality), bar)
      for batch in ahead(prepare, lacking, how.config.input.num_threads):
        faults |= batch.faults
        compute(batch)
        bar.advance(len(batch.keys) + len(batch.faults))
      compute.finish()
    finally:  # Interrupted, what was computed is kept.
      kept.flush()
  if not compute.began:
    count = len(inputs) - len(faults)
    console.log(f'feature store {kept.root}: all {count} {unit} are there')
  return faults


def _bounds(how: Extraction) -> dict[str, int]:
  """Bounds of the tokens in a batch, of `InputBatches`: on a CPU alone."""
  if how.mesh is None or how.mesh.devices.flat[0].platform != 'cpu':
    return {}
  image = how.towers.get('image')
  image_tokens = image.config.num_tokens if image else 1
  return {'image_tokens': image_tokens, 'most_tokens': CPU_TOKENS}


class _Compute:
  """Runs the tower on batches and adds what comes out to a store; the weights are loaded when the
  first batch needs them. A batch is fetched while the next one is computed.
  """

  def __init__(self, kept, modality: str, how: Extraction, missing: Sequence[Input]):
    self._kept, self._modality, self._how, self._missing = kept, modality, how, missing
    self._frozen = None
    self._flying = None
    dtype = kept.codec.read
    self._run = compiling.jit(
      lambda frozen, arrays: how.run(frozen, arrays, modality).astype(dtype)
    )

  @property
  def began(self) -> bool:
    return self._frozen is not None

  def __call__(self, batch: TowerBatch) -> None:
    if not batch.keys:
      return
    how, modality = self._how, self._modality
    if self._frozen is None:
      _announce(self._kept, self._missing, modality, how.largest(modality))
      reads = {modality: dataclasses.replace(how.reads[modality], run_from=None, names_from=None)}
      self._frozen = frozen_towers.load_frozen(how.config, how.mesh, reads, [modality])
    before = self._flying
    self._flying = batch, self._run(self._frozen, sharding.put_batch(batch.arrays, how.mesh))
    self._keep(before)

  def finish(self) -> None:
    """Adds what is still being computed."""
    self._keep(self._flying)
    self._flying = None

  def _keep(self, flying) -> None:
    if flying is None:
      return
    batch, states_blnd = flying[0], jax.device_get(flying[1])
    pooled = self._how.reads[self._modality].pooled
    # What is left over at the end is padding.
    for key, length, x_lnd in zip(batch.keys, batch.lengths, states_blnd, strict=False):
      self._kept.add(key, x_lnd if pooled else x_lnd[:, :length])


def _announce(
  kept: store.FeatureStore, missing: Sequence[Input], modality: str, shape: tuple[int, int, int]
) -> None:
  if kept.root is None:
    return
  layers, most, width = shape
  tokens = len(missing) * most
  if modality == 'text' and most > 1:
    tokens = sum(len(x.content) for x in missing)
  needed, free = kept.codec.stored_bytes(layers, tokens, width), shutil.disk_usage(kept.root).free
  if needed > free:
    raise UserError(
      f'config.features.store: {str(kept.root)!r} has {_bytes(free)} free, the {UNITS[modality]} '
      f'take {_bytes(needed)}; give another folder, features.dtype=int8, or '
      "features.store='' to run the towers in each step"
    )
  kept.try_out()
  console.log(
    f'feature store {kept.root}: {len(missing)} {UNITS[modality]} go through the tower once and '
    f'take {_bytes(needed)} ({_bytes(free)} free)'
  )


def _bytes(count: int) -> str:
  return f'{count / 1e9:.2f} GB' if count >= 1e8 else f'{count / 1e6:.1f} MB'


def _lacking(
  kept: store.FeatureStore, batches: Iterable[list[Input]], bar: console.Progress
) -> Iterator[list[Input]]:
  """Leaves out what another process has finished in the meantime."""
  for batch in batches:
    kept.refresh()
    lacking = [x for x in batch if x.key not in kept]
    bar.advance(len(batch) - len(lacking))
    if lacking:
      yield lacking
