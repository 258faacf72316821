"""Pooled hidden states of the frozen towers that a config names, for probes: every state of a
tower, computed once and kept.
"""

import dataclasses
import hashlib
import json
import pathlib
import resource
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.data import fingerprint
from molt_jax.data.modalities import MODALITIES
from molt_jax.data.sources import Dataset
from molt_jax.features import frozen
from molt_jax.features.frozen import Reads
from molt_jax.features.inputs import InputBatches, ahead, identify
from molt_jax.runtime import sharding
from molt_jax.training.assembly import assemble


def load(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the pooled states of a data set, computed unless `folder` has them.

  Of a text the mean over its tokens; of an image the mean over its patches and, where the tower has
  one, the class token beside it.

  Returns:
    {'states': modality -> split -> float32[L, N, D], zeros where absent; 'cpu_seconds': what
    computing took; 'towers': modality -> identity}
  """
  assembly = assemble(config)
  how = assembly.extraction
  found = {'states': {}, 'cpu_seconds': 0.0, 'towers': frozen.identities(assembly.towers)}
  for modality in MODALITIES:
    states = tuple(range(assembly.towers[modality].config.num_layers + 1))
    own = dataclasses.replace(how, reads={**how.reads, modality: Reads(states=states)})
    spec = json.dumps([own.spec(modality), prints(assembly.data)], sort_keys=True)
    digest = hashlib.sha256(spec.encode()).hexdigest()[:16]
    path = folder / f'{modality}_{digest}.npz'
    if not path.exists():
      before = _cpu_seconds()
      arrays = _compute(own, modality, assembly.data)
      folder.mkdir(parents=True, exist_ok=True)
      part = path.with_suffix('.part.npz')
      np.savez(part, seconds=_cpu_seconds() - before, **arrays)
      part.rename(path)
    with np.load(path) as kept:
      found['cpu_seconds'] += float(kept['seconds'])
      splits = {split: kept[split].astype(np.float32) for split in assembly.data.splits}
    found['states'][modality] = splits
  return found


def prints(data: Dataset) -> dict[str, Any]:
  """Returns split -> fingerprint of its examples."""
  return {split: fingerprint.of(source, data.class_names) for split, source in data.splits.items()}


def _cpu_seconds():
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _compute(how, modality, data) -> Mapping[str, np.ndarray]:
  """Returns split -> float16[L, N, D]."""
  config = how.config
  wanted = {s: (source, np.ones((len(source), 2), bool)) for s, source in data.splits.items()}
  found = identify(wanted, how.preprocess, [modality], num_threads=config.input.num_threads)
  # A row may have several images: their mean.
  inputs = [x for split in wanted for of_one in found[split][modality] for x in of_one]
  unique = {x.key: x for x in inputs}
  params = frozen.load_frozen(config, how.mesh, how.reads, [modality])
  tower = how.towers[modality].config

  @jax.jit
  def run(params, arrays, length_b):
    states_blnd = how.run(params, arrays, modality).astype(jnp.float32)
    if modality == 'image':
      patches = states_blnd[:, :, tower.num_prefix_tokens :].mean(axis=2)
      class_token = [states_blnd[:, :, 0]] if tower.class_token else []
      return jnp.concatenate([*class_token, patches], axis=-1)
    mask_bn = jnp.arange(states_blnd.shape[2]) < length_b[:, None]
    total = jnp.where(mask_bn[:, None, :, None], states_blnd, 0).sum(axis=2)
    return total / length_b[:, None, None]

  batching = InputBatches(config.eval.batch_size, how.mesh.shape['data'], how.preprocess)
  batches = batching.cut(list(unique.values()), modality)
  pooled = {}
  for batch in ahead(lambda x: batching.prepare(x, modality), batches, config.input.num_threads):
    length_b = np.ones(batching.examples, np.int32)
    length_b[: len(batch.lengths)] = [length or 1 for length in batch.lengths]
    states_bld = run(params, sharding.put_batch(batch.arrays, how.mesh), length_b)
    # What is left over at the end is padding.
    pooled.update(zip(batch.keys, np.asarray(states_bld, np.float32), strict=False))
  blank = np.zeros_like(next(iter(pooled.values())))
  arrays = {}
  for split in wanted:
    rows = []
    for of_one in found[split][modality]:
      states = [pooled[x.key] for x in of_one if x.key in pooled]
      rows.append(np.mean(states, axis=0) if states else blank)
    arrays[split] = np.stack(rows, axis=1)
  return arrays
