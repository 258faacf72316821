"""DCP: prompts that are correlated over layers and towers, common to them, and dynamic (Hu et al.,
NeurIPS 2024, "Deep Correlated Prompting for Visual Recognition with Missing Modalities").

Three thirds of prompts stand in front of both frozen towers, and depend on the missing pattern:
correlated ones, those of a layer made of those of the layer below in both towers; common ones, the
same vectors mapped into both towers; dynamic ones, which look at the input first. A linear
classifier reads both towers; `docs/methods/dcp.md` has the equations and what differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import cases, entering
from molt_jax.methods.parts.cases import Prompted
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.prompts import SMALL, Front

NARROWER = 16  # Hidden layers of the maps are so many times narrower than what they read.


class Prompts(nn.Module):
  """What is trained: prompts, their maps, and the classifier.

  Attributes:
    num_layers: L, layers with correlated prompts.
    num_tokens: n, prompts of each of the three kinds.
    widths: modality -> width of its tower.
    train_dynamic: whether the queries of dynamic prompts are trained.
    num_classes: C.
  """

  num_layers: int
  num_tokens: int
  widths: Mapping[str, int]
  train_dynamic: bool
  num_classes: int

  def setup(self):
    common = min(self.widths.values())

    def prompts(name, count, width):
      return self.param(name, SMALL, (count, self.num_tokens, width), jnp.float32)

    self.correlated = {
      m: prompts(f'{m}_prompts', cases.NUM_CASES, d) for m, d in self.widths.items()
    }
    self.common = prompts('common_prompts', cases.NUM_CASES, common)
    self.dynamic = {
      m: prompts(f'{m}_dynamic_prompts', cases.NUM_OF_TOWER, d) for m, d in self.widths.items()
    }
    both = sum(self.widths.values())
    self.norms = {m: [nn.LayerNorm() for _ in range(self.num_layers)] for m in self.widths}
    self.maps = {
      m: [_narrow(both, width) for _ in range(self.num_layers)] for m, width in self.widths.items()
    }
    self.common_maps = {m: _narrow(common, width) for m, width in self.widths.items()}
    self.looks = {m: [nn.Dense(width) for _ in range(4)] for m, width in self.widths.items()}
    self.head = nn.Dense(self.num_classes)

  def __call__(self):
    """Makes every parameter; used for initialisation alone."""
    self.correlated_prompts()
    for m, width in self.widths.items():
      self.common_prompts(m)
      self.dynamic_prompts(m, jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, width)), None)
    self.classify(jnp.zeros((1, sum(self.widths.values()))))

  def correlated_prompts(self) -> dict[str, jax.Array]:
    """Returns modality -> float32[L, cases, n, D]: those of a layer are made of those of the layer
    below, of both towers.
    """
    below, found = self.correlated, {m: [] for m in self.widths}
    for layer in range(self.num_layers):
      both = jnp.concatenate([below[m] for m in self.widths], axis=-1)
      below = {m: _apply(self.maps[m][layer], self.norms[m][layer](both)) for m in self.widths}
      for m, made in below.items():
        found[m].append(made)
    return {m: jnp.stack(made) for m, made in found.items()}

  def common_prompts(self, modality: str) -> jax.Array:
    """Returns float32[cases, n, D]."""
    return _apply(self.common_maps[modality], self.common)

  def dynamic_prompts(self, modality, case_b, h_btd, mask_bt) -> jax.Array:
    """Returns what the queries of each example's case read of what enters the tower,
    float32[B, n, D], by attention of one head.
    """
    to_query, to_key, to_value, out = self.looks[modality]
    queries = self.dynamic[modality]
    if not self.train_dynamic:
      queries = jax.lax.stop_gradient(queries)
    x_btd = h_btd.astype(jnp.float32)
    q_bnd, k_btd, v_btd = to_query(queries)[case_b], to_key(x_btd), to_value(x_btd)
    logits_bnt = jnp.einsum('bnd,btd->bnt', q_bnd, k_btd) * q_bnd.shape[-1] ** -0.5
    if mask_bt is not None:
      logits_bnt = jnp.where(mask_bt[:, None], logits_bnt, jnp.finfo(jnp.float32).min)
    return out(jnp.einsum('bnt,btd->bnd', nn.softmax(logits_bnt), v_btd))

  def classify(self, read_bd: jax.Array) -> jax.Array:
    """Logits of what is read of both towers, float32[B, C]."""
    return self.head(read_bd)


def _narrow(width_in: int, width_out: int) -> tuple[nn.Module, nn.Module]:
  return nn.Dense(max(width_in // NARROWER, 1)), nn.Dense(width_out)


def _apply(maps, x):
  first, second = maps
  return second(nn.gelu(first(x), approximate=False))


@dataclasses.dataclass(frozen=True)
class DCP(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    prompts: what is trained.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: nothing, it is run from its input on.
    begin: modality -> tokens that stay first.
    over_patterns: see `base.Method`; what a tower computes depends on what is missing.
  """

  prompts: Prompts
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  begin: Mapping[str, int]
  over_patterns: Any = jax.lax.map

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    return {'params': self.prompts.init(key)['params'], 'statistics': {}}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    del features, training
    trained = self.prompts.bind({'params': variables['params']})
    there_bm = present_bm & batch['present']
    run = cases.there(self.modules, frozen, there_bm)
    correlated = trained.correlated_prompts()
    case_b, read = cases.of_examples(there_bm), []
    for modality in MODALITIES:
      if modality in run:
        how = (modality, self.modules[modality], frozen[modality], batch, run[modality])
        tower = Prompted.enter(*how, self.begin[modality])
        dynamic_bnd = trained.dynamic_prompts(
          modality, cases.of_tower(modality, there_bm), tower.h_btd, tower.mask_bt
        )
        flowing_bnd = [trained.common_prompts(modality)[case_b], dynamic_bnd]
        h_bpd = self._run(tower, correlated[modality][:, case_b], flowing_bnd)
        read.append(tower.read(h_bpd, 3 * self.prompts.num_tokens, run[modality]))
      elif modality in self.prompts.widths:
        read.append(jnp.zeros((len(there_bm), self.prompts.widths[modality])))
    return Output(logits_bk=trained.classify(jnp.concatenate(read, axis=-1)))

  def _run(self, tower: Prompted, correlated_lbnd, flowing_bnd) -> jax.Array:
    """Runs a tower with prompts in front; before each of the first layers the correlated ones are
    replaced, the others flow on.
    """
    layers, count = self.prompts.num_layers, 3 * self.prompts.num_tokens
    place = Front(count, tower.begin)
    new_bkd = jnp.concatenate([correlated_lbnd[0], *flowing_bnd], axis=1)
    h_bpd = place.insert(tower.h_btd, new_bkd)
    how = {'before': place.replace, 'inserts': correlated_lbnd.astype(h_bpd.dtype)}
    h_bpd = tower.run(0, layers, h_bpd, count, **how)
    return tower.run(layers, tower.tower.config.num_layers, h_bpd, count)


def build(config, towers, *, num_classes, class_names=()) -> DCP:
  """See `base.make_method`.

  Raises:
    UserError: more layers than a tower has.
  """
  del class_names
  c = config.dcp
  reads = cases.reads_of(towers)
  prompts = Prompts(
    num_layers=cases.layers_with_prompts('dcp.num_layers', c.num_layers, towers),
    num_tokens=c.num_tokens,
    widths={modality: tower.config.hidden_size for modality, tower in towers.items()},
    train_dynamic=c.train_dynamic,
    num_classes=num_classes,
  )
  modules = base.tower_modules(config, towers, reads)
  return DCP(prompts, modules, reads, entering.beginnings(towers))
