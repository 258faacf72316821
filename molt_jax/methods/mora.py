"""LoRA on the last layers of both towers (Hu et al. 2022), and MoRA, whose updates share factors
between the towers (Zhao et al. 2025, "MoRA: Missing Modality Low-Rank Adaptation for Visual
Recognition").

Both towers are run from a stored hidden state on, with new weights W' of their queries, keys or
values; a linear classifier reads both. With c(W) the matrix whose rows have length one, |W| their
lengths, and o the product of a row with a number:

  LoRA  W' = W + s D U
  MoRA  W' = |W| f_1 o c(W + s (S - S_0)) + |W| f_2 o c(W + s D U)
        S_t = A_t (A_i' A_i) A_t',  S_i = A_i (A_t' A_t) A_i'

D U are of one matrix, A of one layer and tower. At the beginning U = 0, S = S_0 and f_1 = f_2 =
1/2, so that W' = W: training starts from the pretrained towers. `docs/methods/mora.md` says what
differs from the published code, which does not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from molt_jax.data.modalities import COLUMN, MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts.cases import OTHER, check_depth
from molt_jax.methods.parts.interface import Output

PROJECTIONS = {'q': 'q_proj', 'k': 'k_proj', 'v': 'v_proj'}
LEAST = 1e-12  # Of the length of a row.


class Adapters(nn.Module):
  """What is trained: factors of the updates, and the classifier.

  Attributes:
    num_layers: M, last layers with new weights.
    rank: r.
    targets: letters of PROJECTIONS.
    widths: modality -> width of its tower.
    outputs: modality -> letter -> width of what the projection returns.
    shared: whether factors are shared between towers (MoRA).
    share: what f_1 and f_2 begin as.
    num_classes: C.
  """

  num_layers: int
  rank: int
  targets: str
  widths: Mapping[str, int]
  outputs: Mapping[str, Mapping[str, int]]
  shared: bool
  share: float
  num_classes: int

  @nn.compact
  def __call__(self, read_bd: jax.Array) -> jax.Array:
    """Logits of what is read of both towers, float32[B, C]."""
    small, layers = nn.initializers.normal(self.rank**-0.5), self.num_layers

    def param(name, init, *shape):
      return self.param(name, init, (layers, *shape), jnp.float32)

    for m, width in self.widths.items():
      if self.shared:
        param(f'{m}_shared', small, width, self.rank)
      for letter in self.targets:
        param(f'{m}_{letter}_down', small, width, self.rank)
        param(f'{m}_{letter}_up', nn.initializers.zeros, self.rank, self.outputs[m][letter])
        for part in ('shared', 'own') if self.shared else ():
          init = nn.initializers.constant(self.share)
          param(f'{m}_{letter}_{part}_share', init, width)
    return nn.Dense(self.num_classes, name='head')(read_bd)


@dataclasses.dataclass(frozen=True)
class MoRA(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    adapters: what is trained.
    scale: s.
    from_pretrained: whether S_0 is subtracted (MoRA).
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: the state that enters the first layer with new weights.
    over_patterns: see `base.Method`; what is missing decides only what is read.
  """

  adapters: Adapters
  scale: float
  from_pretrained: bool
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  over_patterns: Any = jax.vmap

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`; 'statistics' are the shared factors that training begins with."""
    width = sum(self.adapters.widths.values())
    params = self.adapters.init(key, jnp.zeros((1, width)))['params']
    statistics = {}
    if self.adapters.shared and self.from_pretrained:
      statistics = {f'{m}_shared': params[f'{m}_shared'] for m in self.adapters.widths}
    return {'params': params, 'statistics': statistics}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    content_bm = batch['present'] if training else present_bm & batch['present']
    there_bm = present_bm & batch['present']
    read = []
    for modality in MODALITIES:
      if features.of(modality) is not None and frozen.get(modality) is not None:
        column = COLUMN[modality]
        params = self.merged(variables, frozen[modality], modality)
        pooled_bd = self._run(modality, params, features, content_bm[:, column])
        read.append(jnp.where(there_bm[:, column, None], pooled_bd, 0.0))
      elif modality in self.adapters.widths:
        read.append(jnp.zeros((len(there_bm), self.adapters.widths[modality])))
    variables = {'params': variables['params']}
    return Output(logits_bk=self.adapters.apply(variables, jnp.concatenate(read, axis=-1)))

  def merged(self, variables: Mapping[str, Any], frozen: Any, modality: str) -> Any:
    """Returns a tower's parameters with the new weights in place.

    Args:
      variables: of the method.
      frozen: the tower's parameters, of its last layers at least.
      modality: its.
    """
    flat = dict(traverse_util.flatten_dict(frozen, sep='/'))
    for letter in self.adapters.targets:
      name = f'layers/{PROJECTIONS[letter]}/kernel'
      old = flat[name]
      upper_mdnh = old[-self.adapters.num_layers :]
      width = upper_mdnh.shape[1]
      weights_mdo = upper_mdnh.reshape(len(upper_mdnh), width, -1).astype(jnp.float32)
      new_mdo = self._weights(variables, weights_mdo, modality, letter)
      new = new_mdo.reshape(upper_mdnh.shape).astype(old.dtype)
      flat[name] = new if new.shape == old.shape else old.at[-len(new) :].set(new)
    return traverse_util.unflatten_dict(flat, sep='/')

  def _weights(self, variables, weights_mdo, modality, letter):
    """W' of one projection, float32[M, D, O]."""
    p, exact = variables['params'], {'precision': 'highest'}
    down_mdr, up_mro = p[f'{modality}_{letter}_down'], p[f'{modality}_{letter}_up']
    own_mdo = weights_mdo + self.scale * jnp.einsum('mdr,mro->mdo', down_mdr, up_mro, **exact)
    if not self.adapters.shared:
      return own_mdo
    update_mdo = self._shared(p, modality, weights_mdo.shape[-1])
    if self.from_pretrained:
      start = jax.lax.stop_gradient(variables['statistics'])
      update_mdo -= self._shared(start, modality, weights_mdo.shape[-1])
    shared_mdo = weights_mdo + self.scale * update_mdo
    length_md1, total_mdo = _length(weights_mdo), 0.0
    for part, matrix_mdo in (('shared', shared_mdo), ('own', own_mdo)):
      share_md = p[f'{modality}_{letter}_{part}_share']
      total_mdo += share_md[..., None] * (length_md1 / _length(matrix_mdo)) * matrix_mdo
    return total_mdo

  def _shared(self, factors, modality, outputs: int):
    """S of a tower, [M, D, outputs]: where its projection is narrower, its first columns."""
    own_mdr, other_mer = factors[f'{modality}_shared'], factors[f'{OTHER[modality]}_shared']
    inner_mrs = jnp.einsum('mer,mes->mrs', other_mer, other_mer, precision='highest')
    narrow_mos = own_mdr[:, :outputs]
    return jnp.einsum('mdr,mrs,mos->mdo', own_mdr, inner_mrs, narrow_mos, precision='highest')

  def _run(self, modality, params, features, content_b):
    """What is read of a tower, float32[B, D]."""
    tower = self.modules[modality].bind({'params': params})
    entering_btd = features.of(modality)[-1]
    entering_btd = jnp.where(content_b[:, None, None], entering_btd, 0).astype(tower.dtype)
    mask_bt = None
    if modality == 'text':
      mask_bt = features.text_mask_bt & content_b[:, None]
    how = {'start': self.reads[modality].run_from, 'stop': tower.config.num_layers}
    h_btd, _ = tower.run(entering_btd, mask_bt, **how)
    return tower.pool(tower.finish(h_btd), None, mask_bt).astype(jnp.float32)


def _length(matrix_mdo):
  square_md1 = jnp.sum(jnp.square(matrix_mdo), axis=-1, keepdims=True)
  return jnp.sqrt(jnp.maximum(square_md1, LEAST**2))


def build(config, towers, *, num_classes, class_names=()) -> MoRA:
  """See `base.make_method`.

  Raises:
    UserError: more layers than a tower has, towers with codes for weights, or, of MoRA, one tower
      or one whose projections are wider than it is.
  """
  del class_names
  c = config.mora
  check_depth('mora.num_layers', c.num_layers, towers)
  if config.backbones.quantization != 'none':
    raise UserError(
      f'config.backbones.quantization: {config.backbones.quantization!r} beside '
      "config.method='mora', which makes new weights of the towers' own; give none"
    )
  reads, outputs = {}, {}
  for modality, tower in towers.items():
    first = tower.config.num_layers - c.num_layers
    heads = tuple(head for head in tower.heads if head == 'pool')
    reads[modality] = Reads((first,), run_from=first, heads=heads)
    outputs[modality] = _outputs(tower.config)
  shared = c.kind == 'mora'
  if shared:
    _check_shared(config, towers, outputs)
  adapters = Adapters(
    num_layers=c.num_layers,
    rank=c.rank,
    targets=c.targets,
    widths={modality: tower.config.hidden_size for modality, tower in towers.items()},
    outputs=outputs,
    shared=shared,
    share=0.5 if c.start == 'pretrained' else 1.0,
    num_classes=num_classes,
  )
  modules = base.tower_modules(config, towers, reads)
  return MoRA(adapters, c.scale, c.start == 'pretrained', modules, reads)


def _outputs(architecture: Any) -> dict[str, int]:
  """Letter of PROJECTIONS -> width of what it returns."""
  heads = architecture.num_heads
  size = getattr(architecture, 'head_dim', architecture.hidden_size // heads)
  keys = getattr(architecture, 'num_kv_heads', heads)
  return {'q': heads * size, 'k': keys * size, 'v': keys * size}


def _check_shared(config, towers, outputs) -> None:
  if len(towers) < 2:
    raise UserError(
      f"config.mora.kind: 'mora' beside config.dataset.modalities={config.dataset.modalities!r}, "
      'but it shares factors between two towers; give lora'
    )
  for modality, tower in towers.items():
    width = tower.config.hidden_size
    wide = [x for x in config.mora.targets if outputs[modality][x] > width]
    if wide:
      raise UserError(
        f"config.mora.kind: 'mora' needs projections no wider than their tower, but {wide[0]} of "
        f'the {modality} tower returns {outputs[modality][wide[0]]} numbers of {width}; give lora, '
        'or other targets'
      )
