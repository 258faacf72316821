"""Where features come from: the towers in each step or, with `features.store`, a store in which
what is lacking is computed first.

Each input of every split goes to its tower once: an image that many examples share is one input,
equal texts are one, a missing modality is none.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from molt_jax.config import resolved
from molt_jax.data import pipeline
from molt_jax.data.sources import Source
from molt_jax.errors import UserError
from molt_jax.features import extract, store
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.extract import Extraction
from molt_jax.features.frozen import Reads
from molt_jax.features.inputs import identify, text_input
from molt_jax.runtime import console


def can_store(reads: Mapping[str, Reads]) -> bool:
  """Whether features can come from a store: no tower is run from its input on."""
  return all(
    wanted.run_from is None or wanted.run_from in wanted.states for wanted in reads.values()
  )


def open_features(
  how: Extraction,
  wanted: Mapping[str, tuple[Source, np.ndarray]],
  modalities: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, pipeline.CachedStates] | None]]:
  """Loads the towers or, with a feature store, sees to it that all that is wanted is in it; a
  complete store needs no tower but one that the method runs itself.

  Args:
    how: what is needed to compute features.
    wanted: split -> (source, bool[N, 2]), the modalities of each example that will be read.
    modalities: those to be read at all; default: all that `config.dataset.modalities` names.

  Returns:
    (frozen, stored): tower parameters by modality, None for one that is not to be run; split ->
    features by modality, None without a store.

  Raises:
    UserError: the store cannot be used, is damaged, or does not fit on the disk.
  """
  config = how.config
  modalities = resolved.modalities(config) if modalities is None else modalities
  if 'image' in modalities:
    _check_images(how, wanted)
  if not config.features.store or not can_store(how.reads):
    if config.features.store:
      console.log('features.store is not used: this method runs the towers from their input on')
    needed = frozen_towers.needed(how.reads, modalities)
    frozen = frozen_towers.load_frozen(config, how.mesh, how.reads, needed)
    return frozen, dict.fromkeys(wanted)
  found = identify(wanted, how.preprocess, modalities, num_threads=config.input.num_threads)
  stored = {split: {} for split in wanted}
  for modality in modalities:
    kept = store.FeatureStore(config.features.store, how.spec(modality), config.features.dtype)
    unique = {x.key: x for split in wanted for of_one in found[split][modality] for x in of_one}
    faults = extract.into_store(kept, list(unique.values()), modality, how)
    for split, (source, _) in wanted.items():
      keys = _usable(found[split][modality], faults, source, modality, how.preprocess)
      shape = how.largest(modality)
      stored[split][modality] = pipeline.CachedStates(
        keys, kept.read, kept.num_tokens, shape, kept.codec.read
      )
  needed = frozen_towers.needed(how.reads, modalities)
  live = [m for m in needed if how.reads[m].lowest is not None]
  frozen = frozen_towers.load_frozen(config, how.mesh, how.reads, live, stored=True)
  return frozen, stored


def _check_images(how: Extraction, wanted: Mapping[str, tuple[Source, np.ndarray]]) -> None:
  """Raises UserError where an example has several images and the method cannot average them."""
  for split, (source, _) in wanted.items():
    most = getattr(source, 'most_images', 1)
    if most > 1 and how.reads['image'].run_from is not None:
      raise UserError(
        f'the {split} split has examples of {most} images, and config.method={how.config.method!r} '
        'runs the image tower itself, on one image each: give one image per row, or the method molt'
      )


def _usable(inputs, faults, source, modality, preprocess) -> list[tuple[str, ...]]:
  """Returns the keys of each example that can be used; reports the others."""
  usable = []
  for n, of_one in enumerate(inputs):
    for x in of_one:
      if x.key in faults:
        preprocess.report.add(source.ids[n], modality, faults[x.key])
    usable.append(tuple(x.key for x in of_one if x.key not in faults))
  return usable


def pooled_texts(how: Extraction, texts: Sequence[str], folder: str) -> np.ndarray:
  """Returns the pooled last state of each text by a frozen tower, float32[N, D].

  Args:
    how: what is needed to compute features; its reads say 'pooled'.
    texts: each has tokens.
    folder: of the store that keeps them; '': none does.

  Raises:
    UserError: a text has no tokens, or the store cannot be used.
  """
  if not texts:
    return np.zeros((0, how.towers['text'].config.hidden_size), np.float32)
  kept = store.MemoryStore()
  if folder:
    root = pathlib.Path(folder) / 'store'  # Beside it, earlier versions kept files of their own.
    kept = store.FeatureStore(root, how.spec('text'), 'float32', field='input.text_store')
  found = [text_input(text, how.preprocess) for text in texts]
  empty = [text for text, x in zip(texts, found, strict=True) if x is None]
  if empty:
    raise UserError(f'the text {empty[0]!r} has no tokens: leave it out')
  unique = {x.key: x for x in found}
  extract.into_store(kept, list(unique.values()), 'text', how)
  return np.stack([kept.read(x.key)[0, 0] for x in found]).astype(np.float32)
