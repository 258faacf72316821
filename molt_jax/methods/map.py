"""MAP: prompts that say what is missing (Lee et al., CVPR 2023, "Multimodal Prompting with Missing
Modalities for Visual Recognition").

The first layers of both frozen towers get prompts that depend on the missing pattern alone: a set
for complete examples, and one for examples of this modality alone. They stand in front of the
sequence (`map.placement=input`), a new set before each layer beside the earlier ones, or are keys
and values that every token reads beside its own (`attention`). A classifier reads both towers.

Where the paper feeds a blank image or an empty text, its tower is not run here, and zeros take the
place of what it would have been. `docs/methods/map.md` says what else differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import cases, entering
from molt_jax.methods.parts.cases import Prompted
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.prompts import SMALL, Front


class Prompts(nn.Module):
  """What is trained: prompts and the classifier.

  Attributes:
    num_layers: L, layers with prompts.
    num_tokens: K, prompts of each layer and case.
    widths: modality -> width of a prompt.
    towers: modality -> width of the tower.
    hidden: of the classifier.
    num_classes: C.
  """

  num_layers: int
  num_tokens: int
  widths: Mapping[str, int]
  towers: Mapping[str, int]
  hidden: int
  num_classes: int

  def setup(self):
    prompts = {}
    for m, width in self.widths.items():
      shape = (cases.NUM_OF_TOWER, self.num_layers, self.num_tokens, width)
      prompts[m] = self.param(f'{m}_prompts', SMALL, shape, jnp.float32)
    self.prompts = prompts
    self.first = nn.Dense(self.hidden)
    self.norm = nn.LayerNorm()
    self.last = nn.Dense(self.num_classes)

  def __call__(self, read_bd: jax.Array) -> jax.Array:
    """Logits of what is read of both towers, float32[B, C]."""
    return self.last(nn.gelu(self.norm(self.first(read_bd)), approximate=False))

  def of(self, modality: str, case_b: jax.Array) -> jax.Array:
    """Prompts of each example's case, float32[L, B, K, D]."""
    return jnp.moveaxis(self.prompts[modality][case_b], 1, 0)


@dataclasses.dataclass(frozen=True)
class MAP(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    prompts: what is trained.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: nothing, it is run from its input on.
    begin: modality -> tokens that stay first.
    in_attention: whether prompts are keys and values.
    over_patterns: see `base.Method`; what a tower computes depends on what is missing.
  """

  prompts: Prompts
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  begin: Mapping[str, int]
  in_attention: bool
  over_patterns: Any = jax.lax.map

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    width = sum(self.prompts.towers.values())
    return {'params': self.prompts.init(key, jnp.zeros((1, width)))['params'], 'statistics': {}}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    del features, training
    trained = self.prompts.bind({'params': variables['params']})
    there_bm = present_bm & batch['present']
    run = cases.there(self.modules, frozen, there_bm)
    read = []
    for modality in MODALITIES:
      if modality in run:
        how = (modality, self.modules[modality], frozen[modality], batch, run[modality])
        tower = Prompted.enter(*how, self.begin[modality])
        prompts_lbkd = trained.of(modality, cases.of_tower(modality, there_bm))
        run_tower = self._with_prefix if self.in_attention else self._with_tokens
        read.append(tower.read(*run_tower(tower, prompts_lbkd), run[modality]))
      elif modality in self.prompts.towers:
        read.append(jnp.zeros((len(there_bm), self.prompts.towers[modality])))
    return Output(logits_bk=trained(jnp.concatenate(read, axis=-1)))

  def _with_tokens(self, tower: Prompted, prompts_lbkd) -> tuple[jax.Array, int]:
    """Runs a tower with a new set of tokens before each of the first layers.

    Returns:
      (what leaves the last layer, tokens in front).
    """
    layers, count = self.prompts.num_layers, self.prompts.num_tokens
    h_bpd, place = tower.h_btd, Front(count, tower.begin)
    for layer in range(layers):
      h_bpd = place.insert(h_bpd, prompts_lbkd[layer])
      h_bpd = tower.run(layer, layer + 1, h_bpd, (layer + 1) * count)
    depth, total = tower.tower.config.num_layers, layers * count
    return tower.run(layers, depth, h_bpd, total), total

  def _with_prefix(self, tower: Prompted, prompts_lbkd) -> tuple[jax.Array, int]:
    """Runs a tower whose first layers read keys and values, the first and second half of a set."""
    layers, half = self.prompts.num_layers, self.prompts.num_tokens // 2
    heads = key_heads(tower.tower.config)
    prefix = []
    for part in (prompts_lbkd[:, :, :half], prompts_lbkd[:, :, half:]):
      prefix.append(part.reshape(*part.shape[:3], *heads).astype(tower.h_btd.dtype))
    h_btd = tower.run(0, layers, tower.h_btd, 0, additions={'prefix': tuple(prefix)})
    return tower.run(layers, tower.tower.config.num_layers, h_btd, 0), 0


def key_heads(architecture: Any) -> tuple[int, int]:
  """Returns (heads of keys and values, width of a head) of a tower."""
  heads = getattr(architecture, 'num_kv_heads', architecture.num_heads)
  size = architecture.hidden_size // architecture.num_heads
  return heads, getattr(architecture, 'head_dim', size)


def build(config, towers, *, num_classes, class_names=()) -> MAP:
  """See `base.make_method`.

  Raises:
    UserError: more layers than a tower has, or an odd number of prompts to be halved.
  """
  del class_names
  c = config.map
  num_layers = cases.layers_with_prompts('map.num_layers', c.num_layers, towers)
  in_attention = c.placement == 'attention'
  if in_attention and c.num_tokens % 2:
    raise UserError(
      f"config.map.num_tokens: {c.num_tokens} beside config.map.placement='attention', where half "
      'of them are keys and half are values; give an even number'
    )
  reads = cases.reads_of(towers)
  widths = {modality: tower.config.hidden_size for modality, tower in towers.items()}
  of_keys = {modality: _product(key_heads(tower.config)) for modality, tower in towers.items()}
  prompts = Prompts(
    num_layers=num_layers,
    num_tokens=c.num_tokens,
    widths=of_keys if in_attention else widths,
    towers=widths,
    hidden=config.classifier.hidden,
    num_classes=num_classes,
  )
  modules = base.tower_modules(config, towers, reads)
  return MAP(prompts, modules, reads, entering.beginnings(towers), in_attention)


def _product(pair: tuple[int, int]) -> int:
  return pair[0] * pair[1]
