"""Where taps come from: the towers in each step or, with `features.store`, a store that is filled
here first with what it lacks.

Filling gives each input of every split to its tower once: an image that many rows share is one
input, equal texts are one, an absent modality is none. Several processes may fill one store; each
takes its batches in another order and leaves out what it finds done.
"""

import collections
import concurrent.futures
import functools
import random
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.config import resolved
from molt_jax.data import packing, pipeline, transforms
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.features import store
from molt_jax.methods import model as model_lib
from molt_jax.runtime import console, processes, sharding
from molt_jax.towers import loading

SCAN_ROWS = 256  # Rows that a thread identifies at a time.
UNITS = {'image': 'images', 'text': 'texts'}


class Input(NamedTuple):
  """One input of a tower: its key in the store, and the token ids of a text or (source, row) of an
  image.
  """

  key: str
  content: Any


def open_taps(
  config: ml_collections.ConfigDict,
  wanted: Mapping[str, tuple[Source, np.ndarray]],
  *,
  model: model_lib.Model,
  towers: Mapping[str, loading.TowerSpec],
  preprocess: pipeline.Preprocess,
  mesh: jax.sharding.Mesh,
  modalities: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, pipeline.StoredTaps] | None]]:
  """Loads the towers or, with a feature store, sees to it that all wanted taps are in it; a
  complete store needs no tower.

  Args:
    config: `features.*` says where; `backbones`, `molt.num_layers`, `text.max_tokens`,
      `eval.batch_size`, `input.num_threads` are read too.
    wanted: split -> (source, bool[N, 2]), the modalities of each row that will be read (columns
      image, text).
    model: the classifier; runs the towers.
    towers: their descriptions.
    preprocess: how an example becomes arrays; what cannot be used is reported there.
    mesh: where to compute.
    modalities: those to be read at all; default: all that `config.dataset.modalities` names.

  Returns:
    (frozen, stored): tower parameters by modality, None for one that is not to be run; split ->
    taps by modality, None without a store.

  Raises:
    UserError: the store cannot be used, is damaged, or does not fit on the disk.
  """
  modalities = resolved.modalities(config) if modalities is None else modalities
  if not config.features.store:
    return model_lib.load_frozen(config, mesh, modalities), dict.fromkeys(wanted)
  inputs = _identify(wanted, preprocess, modalities, num_threads=config.input.num_threads)
  stored = {split: {} for split in wanted}
  for modality in modalities:
    shape = _largest(config, towers[modality], modality)
    kept = store.FeatureStore(
      config.features.store,
      _spec(config, towers[modality], preprocess, modality),
      config.features.dtype,
    )
    unique = {x.key: x for split in wanted for x in inputs[split][modality] if x}
    faults = _fill_together(
      kept,
      list(unique.values()),
      modality,
      config=config,
      model=model,
      preprocess=preprocess,
      mesh=mesh,
      shape=shape,
    )
    for split, (source, _) in wanted.items():
      keys = [x.key if x else None for x in inputs[split][modality]]
      for row in (row for row, key in enumerate(keys) if key in faults):
        preprocess.report.add(source.ids[row], modality, faults[keys[row]])
        keys[row] = None
      stored[split][modality] = pipeline.StoredTaps(
        keys, kept.read, kept.num_tokens, shape, kept.codec.read
      )
  return dict.fromkeys(model_lib.MODALITIES), stored


def _spec(
  config, tower: loading.TowerSpec, preprocess: pipeline.Preprocess, modality: str
) -> dict[str, Any]:
  """All that taps depend on beside their input. The input of the text tower is token ids: tokenizer
  and `max_tokens` are in them.
  """
  spec = {
    'modality': modality,
    'tower': tower.identity['sha256'],
    'tower_dtype': config.backbones.dtype,
    'num_taps': config.molt.num_layers,
  }
  if modality == 'image':
    spec['preprocess'] = {
      'size': preprocess.image_size,
      'mean': preprocess.mean,
      'std': preprocess.std,
      'resize': preprocess.resize,
      'resample': preprocess.resample,
    }
    spec['decoding'] = transforms.DECODING
  return spec


def _largest(config, tower: loading.TowerSpec, modality: str) -> tuple[int, int, int]:
  """Returns (layers, most tokens, width) of an entry."""
  tokens = tower.config.num_tokens if modality == 'image' else config.text.max_tokens
  return config.molt.num_layers, tokens, tower.config.hidden_size


# ---- What is needed ------------------------------------------------------------------------------


def _identify(
  wanted: Mapping[str, tuple[Source, np.ndarray]],
  preprocess: pipeline.Preprocess,
  modalities: Collection[str],
  *,
  num_threads: int,
) -> dict[str, dict[str, list[Input | None]]]:
  """Reads every row once, images undecoded; returns split -> modality -> the input of each row,
  None where there is none.
  """
  inputs = {}
  with console.progress(
    'looking up features', sum(len(source) for source, _ in wanted.values()), 'examples'
  ) as bar:
    for split, (source, present_nm) in wanted.items():
      used_nm = source.present & present_nm & [m in modalities for m in model_lib.MODALITIES]
      inputs[split] = {m: [] for m in modalities}
      identify = functools.partial(
        _identify_rows, source=source, preprocess=preprocess, used_nm=used_nm
      )
      ranges = [range(i, min(i + SCAN_ROWS, len(source))) for i in range(0, len(source), SCAN_ROWS)]
      for rows in _ahead(identify, ranges, num_threads):
        for m in modalities:
          inputs[split][m] += [row[m] for row in rows]
        bar.advance(len(rows))
  return inputs


def _identify_rows(rows: range, *, source, preprocess, used_nm) -> list[dict[str, Input | None]]:
  return [
    _identify_row(row, source=source, preprocess=preprocess, used_m=used_nm[row]) for row in rows
  ]


def _identify_row(row: int, *, source, preprocess, used_m) -> dict[str, Input | None]:
  found = {'image': None, 'text': None}
  if not used_m.any():
    return found
  example = pipeline.read_example(source, row, image=bool(used_m[0]), report=preprocess.report)
  if example['image'] is not None:
    found['image'] = Input(store.key_of(example['image']), (source, row))
  if used_m[1]:
    ids_t = np.asarray(preprocess.encode(example['text'], preprocess.max_tokens), np.int32)
    if len(ids_t):
      found['text'] = Input(store.key_of(ids_t.tobytes()), ids_t)
    else:
      preprocess.report.add(example['id'], 'text', 'no tokens')
  return found


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
  """Maps in threads, in order, at most `threads` items ahead of the reader."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    flying = collections.deque()
    for item in items:
      flying.append(pool.submit(function, item))
      if len(flying) > threads:
        yield flying.popleft().result()
    while flying:
      yield flying.popleft().result()


# ---- What is missing -----------------------------------------------------------------------------


class _Batch(NamedTuple):
  """Inputs ready for a tower: their keys, their lengths in tokens (None: all), the arrays; and the
  inputs that cannot be used, with the reason.
  """

  keys: list[str]
  lengths: list[int | None]
  arrays: dict[str, np.ndarray]
  faults: dict[str, str]


def _fill_together(
  kept: store.FeatureStore, inputs: Sequence[Input], modality: str, *, mesh, **how
) -> dict[str, str]:
  """`_fill`, each process of a run its part on its own devices; each looks itself at what is still
  not there then, which cannot be used.
  """
  index, count = jax.process_index(), jax.process_count()
  if count == 1:
    return _fill(kept, inputs, modality, mesh=mesh, **how)
  lacking = [x for x in inputs if x.key not in kept]
  processes.wait(
    'feature store: what is lacking'
  )  # Nobody adds to it before all have looked, so that the parts cover it.
  mesh = sharding.local_mesh(mesh)
  if lacking and mesh is None:
    raise UserError(
      f'config.features.store: {len(lacking)} {UNITS[modality]} are not in it, and a model axis '
      'over several processes cannot fill it; fill it '
      "with mesh.model = the devices of one process, or give features.store=''"
    )
  _fill(kept, lacking[index::count], modality, mesh=mesh, **how)
  processes.wait('feature store: filled')
  kept.refresh()
  return _fill(kept, inputs, modality, mesh=mesh, **how)


def _fill(
  kept: store.FeatureStore,
  inputs: Sequence[Input],
  modality: str,
  *,
  config,
  model,
  preprocess,
  mesh,
  shape: tuple[int, int, int],
) -> dict[str, str]:
  """Computes the inputs that the store lacks; returns key -> why, for those that cannot be used."""
  missing = [x for x in inputs if x.key not in kept]
  size, faults, frozen = config.eval.batch_size, {}, None
  cut, prepare = _PREPARE[modality]
  step = jax.jit(
    functools.partial(_run_tower, model=model, modality=modality, dtype=kept.codec.read)
  )
  prepare = functools.partial(
    prepare, rows=size, preprocess=preprocess, shards=mesh.shape['data'] if mesh else 1
  )
  with console.progress(
    f'filling the feature store, {UNITS[modality]}', len(missing), UNITS[modality]
  ) as bar:
    try:
      for batch in _ahead(
        prepare,
        _lacking(kept, cut(missing, size, preprocess.max_tokens), bar),
        config.input.num_threads,
      ):
        faults |= batch.faults
        if batch.keys:
          if frozen is None:
            _announce(kept, missing, modality, shape)
            frozen = model_lib.load_frozen(config, mesh, [modality])
          taps_blnd = jax.device_get(step(frozen, sharding.put_batch(batch.arrays, mesh)))
          for key, length, x_lnd in zip(
            batch.keys, batch.lengths, taps_blnd, strict=False
          ):  # The last rows are padding.
            kept.add(key, x_lnd[:, :length])
        bar.advance(len(batch.keys) + len(batch.faults))
    finally:  # Interrupted, what was computed is kept.
      kept.flush()
  if frozen is None:
    console.log(
      f'feature store {kept.root}: all {len(inputs) - len(faults)} {UNITS[modality]} are there'
    )
  return faults


def _announce(
  kept: store.FeatureStore, missing: Sequence[Input], modality: str, shape: tuple[int, int, int]
) -> None:
  layers, most, width = shape
  tokens = sum(most if modality == 'image' else len(x.content) for x in missing)
  needed, free = kept.codec.stored_bytes(layers, tokens, width), shutil.disk_usage(kept.root).free
  if needed > free:
    raise UserError(
      f'config.features.store: {str(kept.root)!r} has {_bytes(free)} free, the {UNITS[modality]} '
      f'take {_bytes(needed)}; give another folder, '
      "features.dtype=int8, or features.store='' to run the towers in each step"
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
  """Drops what another process has finished in the meantime."""
  for batch in batches:
    kept.refresh()
    lacking = [x for x in batch if x.key not in kept]
    bar.advance(len(batch) - len(lacking))
    if lacking:
      yield lacking


def _run_tower(
  frozen: Mapping[str, Any],
  arrays: Mapping[str, jax.Array],
  *,
  model: model_lib.Model,
  modality: str,
  dtype: Any,
) -> jax.Array:
  """Returns the taps, [B, L, N, D]."""
  taps = model.taps(frozen, arrays)
  taps_lbnd = taps.image_lbid if modality == 'image' else taps.text_lbtd
  return jnp.moveaxis(taps_lbnd, 1, 0).astype(dtype)


def _cut(inputs: Sequence[Input], size: int) -> list[list[Input]]:
  return [list(inputs[i : i + size]) for i in range(0, len(inputs), size)]


def _cut_images(inputs: Sequence[Input], size: int, max_tokens: int) -> list[list[Input]]:
  return _shuffled(_cut(inputs, size))


def _cut_texts(inputs: Sequence[Input], size: int, max_tokens: int) -> list[list[Input]]:
  """Texts that are padded to one length, in batches of about as many tokens, so that few programs
  are compiled.
  """
  by_length = collections.defaultdict(list)
  for x in inputs:
    by_length[packing.padded_length(len(x.content), max_tokens)].append(x)
  return _shuffled([batch for group in by_length.values() for batch in _cut(group, size)])


def _shuffled(batches: list[list[Input]]) -> list[list[Input]]:
  random.SystemRandom().shuffle(
    batches
  )  # No result depends on the order; processes that fill the same store begin at different ends.
  return batches


def _prepare_images(
  inputs: Sequence[Input], *, rows: int, preprocess: pipeline.Preprocess, shards: int
) -> _Batch:
  image_bhwc = np.zeros((rows, preprocess.image_size, preprocess.image_size, 3), np.float32)
  keys, faults = [], {}
  for key, (source, row) in inputs:
    example = pipeline.read_example(source, row, image=True, report=preprocess.report)
    if example['image'] is None or store.key_of(example['image']) != key:
      raise UserError(
        f'the image of example {example["id"]!r} was changed while it was read; start again'
      )
    try:
      image_bhwc[len(keys)] = pipeline.pixels(transforms.decode(example['image']), preprocess)
      keys.append(key)
    except transforms.DecodeError as error:
      faults[key] = str(error)
  nothing_bt = np.zeros((rows, 1), bool)
  arrays = {
    'image': image_bhwc,
    'token_mask': nothing_bt,
    'present': np.tile([True, False], (rows, 1)),
  }
  return _Batch(keys, [None] * len(keys), arrays, faults)


def _prepare_texts(
  inputs: Sequence[Input], *, rows: int, preprocess: pipeline.Preprocess, shards: int
) -> _Batch:
  length = packing.padded_length(max(len(ids_t) for _, ids_t in inputs), preprocess.max_tokens)
  padded = [
    transforms.pad_tokens(ids_t, max_tokens=length, pad_id=preprocess.pad_id) for _, ids_t in inputs
  ]
  padded += [transforms.pad_tokens([], max_tokens=length, pad_id=preprocess.pad_id)] * (
    rows - len(inputs)
  )
  tokens_bt, mask_bt = (np.stack(column) for column in zip(*padded, strict=True))
  arrays = {
    'tokens': tokens_bt,
    'token_mask': mask_bt,
    'present': np.tile([False, True], (rows, 1)),
  }
  arrays |= packing.token_positions(mask_bt, packing.groups(rows, (shards, 1)))
  return _Batch([key for key, _ in inputs], [len(ids_t) for _, ids_t in inputs], arrays, {})


_PREPARE = {'image': (_cut_images, _prepare_images), 'text': (_cut_texts, _prepare_texts)}
