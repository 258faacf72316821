"""The frozen towers that a config names: their descriptions, weights and identities."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import ml_collections

from molt_jax.config.methods import METHODS
from molt_jax.config.resolved import modalities as used_modalities
from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.runtime import sharding
from molt_jax.towers import kept, loading

NO_TOWER = {'path': 'none', 'sha256': ''}


@dataclasses.dataclass(frozen=True)
class Reads:
  """What a method reads of one tower.

  Attributes:
    states: hidden states that are features: they depend on the frozen tower alone and may be
      stored. Numbered from 0, ascending.
    run_from: the hidden state from which on the method runs the tower itself, in each step: one of
      `states`, or 0, the embeddings, without features. None: it never does, and a store that holds
      the states makes the tower's weights needless.
    heads: what it reads above the last hidden state, see `towers.base.Family`.
    pooled: the feature is what the tower's `pool` makes of the last of `states`, not its tokens.
    cells: of an image: cells along a side whose means are read in the place of all patches
      (`features.cells`); 0: every token is read.
    always: its tower is run for examples without this modality too.
    names_from: the hidden state from which on it runs the names of the classes, whatever the
      examples have; None: it reads no names.
  """

  states: tuple[int, ...] = ()
  run_from: int | None = None
  heads: tuple[str, ...] = ()
  pooled: bool = False
  cells: int = 0
  always: bool = False
  names_from: int | None = None

  @property
  def lowest(self) -> int | None:
    """The hidden state from which on the tower is run in each step; None: it is not."""
    found = [state for state in (self.run_from, self.names_from) if state is not None]
    return min(found) if found else None


def describe_towers(config: ml_collections.ConfigDict) -> dict[str, loading.TowerSpec]:
  """Opens the towers that `dataset.modalities` needs without their weights, and the text tower that
  belongs to the image tower where the method may read the classes' names.

  Returns:
    modality -> architecture, identity, tokenizer or image preprocessing.
  """
  towers = {modality: _describe(config, modality) for modality in used_modalities(config)}
  image = towers.get('image')
  of_pair = image is not None and 'projection' in image.heads
  for_names = METHODS[config.method].names and of_pair and config.backbones.text.path
  if for_names and 'text' not in towers:
    towers['text'] = _describe(config, 'text')
  return towers


def _describe(config: ml_collections.ConfigDict, modality: str) -> loading.TowerSpec:
  c = config.backbones
  return _opener(c[modality].path).describe_tower(
    c[modality].path,
    modality=modality,
    quantization=c.quantization,
    resolution=c[modality].get('resolution', 0),
  )


def needed(reads: Mapping[str, Reads], modalities: Collection[str]) -> list[str]:
  """Returns the modalities whose towers a method needs to answer examples with these modalities:
  them, those whose tower is always run, and those that it reads the classes' names with.
  """
  always = [m for m, x in reads.items() if x.always or x.names_from is not None]
  return [m for m in MODALITIES if m in modalities or m in always]


def _opener(path: str) -> Any:
  """The module that opens a tower: within the file of a whole model, or by itself."""
  return kept if kept.is_one(path) else loading


def dtype(config: ml_collections.ConfigDict) -> str:
  """Returns the type of computation in the towers; in pretraining that of everything."""
  return config.backbones.get('dtype') or config.compute_dtype


def param_dtype(config: ml_collections.ConfigDict) -> str:
  """Returns the type of the towers' weights."""
  own = config.backbones.get('param_dtype', 'auto')
  return dtype(config) if own == 'auto' else own


def load_frozen(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  reads: Mapping[str, Reads],
  modalities: Collection[str] | None = None,
  *,
  stored: bool = False,
) -> dict[str, Any]:
  """Loads towers in their final type and sharding.

  Args:
    config: reads `backbones`.
    mesh: where to.
    reads: what is read of each tower.
    modalities: those to load; default: all that are `needed`.
    stored: features come from a store, so layers below `run_from` are not loaded.

  Returns:
    modality -> parameters; None for one that is not named.
  """
  c = config.backbones
  if modalities is None:
    modalities = needed(reads, used_modalities(config))
  frozen = dict.fromkeys(MODALITIES)
  for modality in modalities:
    wanted = reads[modality]
    frozen[modality] = _opener(c[modality].path).load_params(
      c[modality].path,
      modality=modality,
      dtype=dtype(config),
      param_dtype=param_dtype(config),
      attention=c.attention,
      quantization=c.get('quantization', 'none'),
      shardings=sharding.param_shardings(mesh),
      heads=wanted.heads,
      first_layer=wanted.lowest if stored else 0,
      resolution=c[modality].get('resolution', 0),
    )
  return frozen


def identities(towers: Mapping[str, loading.TowerSpec]) -> dict[str, dict[str, str]]:
  """Returns {'image': {'path', 'sha256'}, 'text': ...} of the towers that are used: what a
  checkpoint belongs to.
  """
  return {modality: dict(tower.identity) for modality, tower in towers.items()}


def check_same_towers(
  saved: Mapping[str, Mapping[str, str]],
  towers: Mapping[str, loading.TowerSpec],
  modalities: Collection[str] | None = None,
) -> None:
  """Raises UserError unless the towers (of these modalities; default: all that are used) are those
  that the checkpoint was trained on.
  """
  for modality in towers if modalities is None else modalities:
    old, new = saved.get(modality, NO_TOWER), towers[modality].identity
    if old['sha256'] != new['sha256']:
      raise UserError(
        f'config.backbones.{modality}.path: {_name(new)} is not the tower this checkpoint was '
        f'trained on, {_name(old)}; give that tower, or another --workdir'
      )
    if 'input_sha256' in old and old['input_sha256'] != new.get('input_sha256'):
      what = 'image preprocessing' if modality == 'image' else 'tokenizer'
      raise UserError(
        f'config.backbones.{modality}.path: {_name(new)} has another {what} than when this '
        'checkpoint was trained; give the files as they were, or another --workdir'
      )


def _name(identity: Mapping[str, str]) -> str:
  how = [f', {key} {identity[key]}' for key in ('quantization', 'resolution') if key in identity]
  return f'{identity["path"]!r} (sha256 {identity["sha256"][:12]}{"".join(how)})'
