"""PMF: the last layers of both towers exchange prompts (Li et al., CVPR 2023, "Efficient Multimodal
Fusion via Interactive Prompting").

In each fusion layer, query prompts Q with their context QC first read the layer's input in their
own tower; what they read is translated into the other tower by a small MLP and, with a fusion
context FC, is read there. Both passes go through the same frozen layer, and both queries see what
enters it. Logits are the mean of a linear head on each tower's readout.

Where the paper is silent: a missing modality is not queried, the prompts that would come from it
are masked out of attention, and its head is left out. In a causal tower the query prompts stand
behind the text, where they read all of it, and the fusion prompts in front of it, where all of it
reads them; rotary positions of the text stay as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.data.modalities import COLUMN, MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import entering
from molt_jax.methods.parts.cases import OTHER, check_depth
from molt_jax.methods.parts.interface import Output, available_mean
from molt_jax.methods.parts.prompts import SMALL, Front, spread
from molt_jax.towers import stack


class Prompts(nn.Module):
  """What is trained: prompts, the maps between towers, and the heads.

  Attributes:
    num_layers: M.
    num_tokens: prompts of each kind.
    widths: modality -> width of its tower.
    hidden: of the maps; 0: half the width of the wider tower.
    num_classes: K.
  """

  num_layers: int
  num_tokens: int
  widths: Mapping[str, int]
  hidden: int
  num_classes: int

  def setup(self):
    prompts = {}
    for m, width in self.widths.items():
      shape = (self.num_layers, self.num_tokens, width)
      for kind in ('query', 'query_context', 'fusion_context'):
        prompts[f'{m}_{kind}'] = self.param(f'{m}_{kind}', SMALL, shape, jnp.float32)
    self.prompts = prompts
    hidden = self.hidden or max(self.widths.values()) // 2
    # Maps into a tower, from the other one.
    self.maps = {
      m: [(nn.Dense(hidden), nn.Dense(self.widths[m])) for _ in range(self.num_layers)]
      for m in self.widths
    }
    self.heads = {m: nn.Dense(self.num_classes) for m in self.widths}

  def __call__(self):
    """Makes every parameter; used for initialisation alone."""
    for m in self.widths:
      other = jnp.zeros((1, self.num_tokens, self.widths[OTHER[m]]))
      for layer in range(self.num_layers):
        self.map_into(m, layer, other)
      self.classify(m, jnp.zeros((1, self.widths[m])))

  def map_into(self, modality: str, layer: int, x_bkd: jax.Array) -> jax.Array:
    """Maps what the other tower's queries read into this tower."""
    first, second = self.maps[modality][layer]
    return second(nn.relu(first(x_bkd.astype(jnp.float32))))

  def classify(self, modality: str, pooled_bd: jax.Array) -> jax.Array:
    """Logits of one tower's readout, float32[B, K]."""
    return self.heads[modality](pooled_bd.astype(jnp.float32))

  def of(self, modality: str, kind: str, layer: int) -> jax.Array:
    """Prompts of a kind, [K, D]."""
    return self.prompts[f'{modality}_{kind}'][layer]


@dataclasses.dataclass(frozen=True)
class PMF(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    modules: modality -> the tower's module.
    reads: modality -> what is read of it: the state that enters the first fusion layer.
    prompts: what is trained.
    begin: modality -> tokens that stay in front of fusion prompts.
    over_patterns: see `base.Method`; what a tower computes depends on the other one.
  """

  config: ml_collections.FrozenConfigDict
  modules: Mapping[str, nn.Module]
  reads: Mapping[str, Reads]
  prompts: Prompts
  begin: Mapping[str, int]
  over_patterns: Any = jax.lax.map

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    return {'params': self.prompts.init(key)['params'], 'statistics': {}}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    trained = self.prompts.bind({'params': variables['params']})
    there = {}
    towers = {}
    for modality in MODALITIES:
      if features.of(modality) is not None and frozen.get(modality) is not None:
        there[modality] = present_bm[:, COLUMN[modality]] & batch['present'][:, COLUMN[modality]]
        module = self.modules[modality].bind({'params': frozen[modality]})
        begin = self.begin[modality]
        towers[modality] = _Tower(modality, module, features, there[modality], begin)
    for layer in range(self.prompts.num_layers):
      read = {m: tower.query(trained, layer) for m, tower in towers.items()}
      for m, tower in towers.items():
        tower.fuse(trained, layer, read.get(OTHER[m]), there.get(OTHER[m]))
    logits = [trained.classify(m, tower.readout()) for m, tower in towers.items()]
    there_bm = jnp.stack(list(there.values()), axis=-1)
    return Output(logits_bk=available_mean(logits, there_bm))


class _Tower:
  """One tower on its way through the fusion layers."""

  def __init__(self, modality, module, features, there_b, begin):
    self.modality, self.module, self.begin = modality, module, begin
    self.start = module.config.num_layers
    states_sbtd = features.of(modality)
    content = there_b[:, None, None]
    self.h_btd = jnp.where(content, states_sbtd[-1], 0).astype(module.dtype)
    self.mask_bt = None
    if modality == 'text':
      self.mask_bt = features.text_mask_bt & there_b[:, None]

  def _layer(self, trained, layer):
    first = self.start - trained.num_layers + layer
    return {'start': first, 'stop': first + 1}

  def _prompts(self, trained, kind, layer):
    x_kd = trained.of(self.modality, kind, layer).astype(self.h_btd.dtype)
    return spread(x_kd, len(self.h_btd))

  def query(self, trained, layer: int) -> jax.Array:
    """What the query prompts read of the layer's input, [B, K, D]."""
    kinds = ('query_context', 'query')
    prompts = jnp.concatenate([self._prompts(trained, kind, layer) for kind in kinds], axis=1)
    how = self._layer(trained, layer)
    count = trained.num_tokens
    if self.mask_bt is None:
      h, _ = self.module.run(jnp.concatenate([prompts, self.h_btd], axis=1), **how)
      return h[:, prompts.shape[1] - count : prompts.shape[1]]
    lengths_b = stack.lengths(self.mask_bt)
    h, new_lengths_b = stack.insert_behind(self.h_btd, lengths_b, prompts)
    mask = jnp.arange(h.shape[1])[None] < new_lengths_b[:, None]
    h, _ = self.module.run(h, mask, **how)
    return stack.read_behind(h, lengths_b + count, count)

  def fuse(self, trained, layer: int, read_bkd, other_b) -> None:
    """Runs the layer with what the other tower's queries read; it is masked where the other
    modality is missing.
    """
    context = self._prompts(trained, 'fusion_context', layer)
    parts, seen = [context], [jnp.ones(context.shape[:2], bool)]
    if read_bkd is not None:
      y_bkd = trained.map_into(self.modality, layer, read_bkd).astype(self.h_btd.dtype)
      parts.append(y_bkd)
      seen.append(jnp.broadcast_to(other_b[:, None], y_bkd.shape[:2]))
    prompts, seen = jnp.concatenate(parts, axis=1), jnp.concatenate(seen, axis=1)
    how, place = self._layer(trained, layer), Front(prompts.shape[1], self.begin)
    h = place.insert(self.h_btd, prompts)
    how['keys_bt'] = place.mask(jnp.ones(self.h_btd.shape[:2], bool), seen)
    if self.mask_bt is not None:
      how['positions_bt'] = place.positions(self.h_btd.shape[1])
    h, _ = self.module.run(h, place.mask(self.mask_bt), **how)
    self.h_btd = place.without(h)

  def readout(self) -> jax.Array:
    """The vector that the head reads, [B, D]."""
    return self.module.pool(self.module.finish(self.h_btd), None, self.mask_bt)


def build(config, towers, *, num_classes, class_names=()) -> PMF:
  """See `base.make_method`.

  Raises:
    UserError: one modality alone, or a tower with fewer layers than are to fuse.
  """
  del class_names
  if len(towers) < 2:
    raise UserError(
      f"config.dataset.modalities: {config.dataset.modalities!r}, but config.method='pmf' fuses "
      'two; give image,text, or another method'
    )
  check_depth('pmf.num_layers', config.pmf.num_layers, towers)
  reads = {}
  for modality, tower in towers.items():
    depth = tower.config.num_layers
    first = depth - config.pmf.num_layers
    heads = tuple(head for head in tower.heads if head == 'pool')
    reads[modality] = Reads((first,), run_from=first, heads=heads)
  prompts = Prompts(
    num_layers=config.pmf.num_layers,
    num_tokens=config.pmf.num_tokens,
    widths={modality: tower.config.hidden_size for modality, tower in towers.items()},
    hidden=config.pmf.hidden,
    num_classes=num_classes,
  )
  modules = base.tower_modules(config, towers, reads)
  begin = entering.beginnings(towers)
  return PMF(ml_collections.FrozenConfigDict(config), modules, reads, prompts, begin)
