"""MMRL and MMRL++: representation tokens that are inserted in the upper layers of both towers (Guo
and Gu, CVPR 2025, "MMRL: Multi-Modal Representation Learning for Vision-Language Models", and its
successor of the same year).

Learned tokens R, shared by both towers, are mapped into each upper layer of each tower, where they
take the place of what the layer below made of them. The class token's feature f_c keeps what the
tower knows, the mean of the representation tokens, f_r, learns the task; each is compared with the
classes by its cosine times 100, and the two are trained side by side:

  L = alpha CE(f_c) + (1 - alpha) CE(f_r) + regularizer (1 - cos(f_c, f_c of the untouched tower))

MMRL++ has one map for all layers of a tower plus a product of low rank for each, starts f_r from
the tower's own projection, and mixes tokens with what the layer below made of them.

Beyond the paper, whose input is an image: an example's own text is a second input. In a causal
tower its tokens stand behind the text, since in front of it they would not see it; in one where
every token reads all others they stand behind the first, as in images. Logits are the mean over the
modalities that are there. With the classes' names, the text tower makes the classes'
vectors as in the paper, tokens after the first one; without a pair of towers that share a space,
they are learned.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.config import resolved
from molt_jax.data.modalities import COLUMN, MODALITIES
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import names, prompts, readout
from molt_jax.methods.parts.interface import Output, available_mean, unit
from molt_jax.runtime import compiling
from molt_jax.towers import stack
from molt_jax.towers.loading import TowerSpec

SCALE = 100.0  # Of cosines, as the authors have it.
CLASS_STATES, CLASS_UNTOUCHED = 'class_states', 'class_untouched'  # Among the statistics.


class Representation(nn.Module):
  """What is trained: the tokens, their maps into the layers, the maps of their features, and the
  classes where these are learned.

  Attributes:
    num_tokens: K.
    width: of the tokens R.
    num_layers: modality -> layers that tokens are inserted in.
    widths: modality -> width of its tower.
    spaces: modality -> width of the space that its features are compared in.
    inputs: the modalities whose features are read.
    num_classes: learned class vectors of each modality; 0: none.
    aligner_rank: of what a layer's map adds to that of all layers; 0: every layer has its own.
    projection_rank: of what the map of features adds to the tower's own; 0: it is all of it.
  """

  num_tokens: int
  width: int
  num_layers: Mapping[str, int]
  widths: Mapping[str, int]
  spaces: Mapping[str, int]
  inputs: tuple[str, ...]
  num_classes: int
  aligner_rank: int = 0
  projection_rank: int = 0

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    """Returns modality -> {'inserts_lkd'} and, of an input, {'projection_dc', 'classes_kc' where
    they are learned}.
    """
    tokens_kr = self.param('tokens', prompts.SMALL, (self.num_tokens, self.width), jnp.float32)
    found = {}
    for m, layers in self.num_layers.items():
      width, space = self.widths[m], self.spaces[m]
      kernel_lrd = self._aligner(m, layers, width)
      bias_ld = self.param(f'{m}_bias', nn.initializers.zeros, (layers, width), jnp.float32)
      inserts_lkd = jnp.einsum('kr,lrd->lkd', tokens_kr, kernel_lrd) + bias_ld[:, None]
      found[m] = {'inserts_lkd': inserts_lkd}
      if m not in self.inputs:
        continue
      found[m]['projection_dc'] = self._projection(m, width, space)
      if self.num_classes:
        shape = (self.num_classes, space)
        found[m]['classes_kc'] = self.param(f'{m}_classes', prompts.SMALL, shape, jnp.float32)
    return found

  def _aligner(self, m: str, layers: int, width: int) -> jax.Array:
    """The maps of R into the layers of a tower, [L, R, D]."""
    if not self.aligner_rank:
      shape = (layers, self.width, width)
      return self.param(f'{m}_kernel', prompts.alike, shape, jnp.float32)
    shared_rd = self.param(f'{m}_kernel', prompts.linear, (self.width, width), jnp.float32)
    down_shape = (layers, self.width, self.aligner_rank)
    down_lrn = self.param(f'{m}_down_kernel', nn.initializers.zeros, down_shape, jnp.float32)
    up_shape = (layers, self.aligner_rank, width)
    up_lnd = self.param(f'{m}_up_kernel', prompts.linear, up_shape, jnp.float32)
    return shared_rd[None] + jnp.einsum('lrn,lnd->lrd', down_lrn, up_lnd)

  def _projection(self, m: str, width: int, space: int) -> jax.Array:
    """The map of features, or what is added to the tower's own, [D, C]."""
    if not self.projection_rank:
      init = nn.initializers.normal(width**-0.5)
      return self.param(f'{m}_projection_kernel', init, (width, space), jnp.float32)
    down_shape, up_shape = (width, self.projection_rank), (self.projection_rank, space)
    down_dn = self.param(f'{m}_projection_down_kernel', prompts.linear, down_shape, jnp.float32)
    zeros = nn.initializers.zeros
    up_nc = self.param(f'{m}_projection_up_kernel', zeros, up_shape, jnp.float32)
    return down_dn @ up_nc


@dataclasses.dataclass(frozen=True)
class MMRL(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    towers: modality -> description, of those that are run.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: the state that enters the first layer with tokens, and
      the last one, from which come the features of the untouched tower.
    representation: what is trained.
    sentences: the classes' names; None: classes are learned.
    over_patterns: see `base.Method`; what is missing decides only what is averaged.
  """

  config: ml_collections.FrozenConfigDict
  towers: Mapping[str, TowerSpec]
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  representation: Representation
  sentences: names.Sentences | None
  over_patterns: Any = jax.vmap

  @property
  def fields(self) -> ml_collections.FrozenConfigDict:
    """The method's own section of the config."""
    return self.config[self.config.method]

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return {'regularizer': self.fields.regularizer}

  @property
  def branch_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    alpha = self.fields.alpha
    return {'class': alpha, 'representation': 1 - alpha}

  @property
  def share(self) -> float:
    """Of R in what enters a layer; the rest is what the layer below made of it."""
    return self.fields.get('share', 1.0)

  @property
  def of_names(self) -> tuple[str, ...]:
    """See `base.Method`."""
    return (CLASS_STATES, CLASS_UNTOUCHED)

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`; 'statistics' are constants: what the untouched text tower makes of the
    classes' names.
    """
    params = self.representation.init(key)['params']
    statistics = {}
    if self.sentences is not None:
      count, length = self.sentences.tokens_kt.shape
      tower = self.modules['text']
      entering = jnp.zeros((count, length, tower.config.hidden_size), tower.dtype)
      untouched = jnp.zeros((count, self.representation.spaces['text']))
      statistics = {CLASS_STATES: entering, CLASS_UNTOUCHED: untouched}
    return {'params': params, 'statistics': statistics}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`."""
    del frozen
    return {**variables, 'statistics': self.read_names(variables['params'])}

  def read_names(self, params: Any) -> dict[str, Any]:
    """See `base.Defaults`: runs the classes' names through the untouched text tower."""
    if self.sentences is None:
      return {}
    place = jax.tree.leaves(params)[0].sharding
    whole = frozen_towers.load_frozen(self.config, place.mesh, self.reads, ['text'])['text']
    tower, found = self.modules['text'], self.sentences
    states = (self.reads['text'].names_from, tower.config.num_layers)

    def run(params):
      bound = tower.bind({'params': params})
      entering, last = bound(found.tokens_kt, found.mask_kt, states=states)
      return entering, readout.projected(bound, last, found.mask_kt)

    entering, untouched = compiling.jit(run)(whole)
    made = {CLASS_STATES: entering, CLASS_UNTOUCHED: untouched.astype(jnp.float32)}
    return jax.device_put(made, place)

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    content_bm = batch['present'] if training else present_bm
    trained = self.representation.apply({'params': variables['params']})
    classes, apart = self._classes(trained, variables, frozen)
    logits, regularizers, there = {}, [], []
    for modality in MODALITIES:
      if features.of(modality) is None or frozen.get(modality) is None:
        continue
      content_b = content_bm[:, COLUMN[modality]]
      class_bc, rep_bc, untouched_bc = self._features(
        modality, trained[modality], frozen[modality], features, content_b
      )
      found = {'class': class_bc, 'representation': rep_bc}
      for name, x_bc in found.items():
        logits.setdefault(name, []).append(SCALE * unit(x_bc) @ unit(classes[modality]).T)
      regularizers.append(1 - jnp.sum(unit(class_bc) * unit(untouched_bc), axis=-1))
      there.append(present_bm[:, COLUMN[modality]] & content_b)
    there_bm = jnp.stack(there, axis=-1)
    regularizer_b = jnp.sum(jnp.stack(regularizers, axis=-1), axis=-1, where=there_bm)
    branches = {name: available_mean(parts, there_bm) for name, parts in logits.items()}
    alpha = self.fields.alpha if self.fields.answer == 'both' else 1.0
    return Output(
      logits_bk=alpha * branches['class'] + (1 - alpha) * branches['representation'],
      branches_bk=branches,
      losses_b={'regularizer': regularizer_b + apart},
    )

  def _features(self, modality, trained, params, features, content_b):
    """Returns f_c, f_r and the untouched tower's f_c, float32[B, C] each, of one modality."""
    tower = self.modules[modality].bind({'params': params})
    found_sbtd = features.of(modality)
    found_sbtd = jnp.where(content_b[None, :, None, None], found_sbtd, 0).astype(tower.dtype)
    entering_btd, last_btd = found_sbtd[0], found_sbtd[-1]
    mask_bt = features.text_mask_bt & content_b[:, None] if modality == 'text' else None
    untouched_bc = class_bc = readout.projected(tower, last_btd, mask_bt)
    count, inserts_lkd = self.fields.num_tokens, trained['inserts_lkd']
    if modality == 'text' and tower.is_causal:
      # Behind the text: what stands before them, the text's own readout, stays as it was.
      place = prompts.Behind(count, stack.lengths(mask_bt))
      h_bpd = self._run(tower, place, entering_btd, mask_bt, inserts_lkd)
    else:
      place = prompts.Front(count)
      h_bpd = self._run(tower, place, entering_btd, mask_bt, inserts_lkd)
      class_bc = readout.projected(tower, tower.finish(place.without(h_bpd)), mask_bt)
    tokens_bkd = tower.norm_tokens(place.read(h_bpd)).astype(jnp.float32)
    mean_bd = jnp.sum(tokens_bkd, axis=1) / max(count, 1)
    rep_bc = jnp.einsum('bd,dc->bc', mean_bd, trained['projection_dc'], precision='highest')
    if self.representation.projection_rank:
      rep_bc += self._own_projection(tower, mean_bd)
    return class_bc.astype(jnp.float32), rep_bc, untouched_bc.astype(jnp.float32)

  def _own_projection(self, tower, mean_bd):
    """What the tower's own projection makes of a vector; a tower without one keeps it."""
    if 'projection' not in tower.heads:
      return mean_bd
    return tower.project(mean_bd.astype(tower.dtype)).astype(jnp.float32)

  def _run(self, tower, place, entering_btd, mask_bt, inserts_lkd):
    """Runs the upper layers with tokens in their place, [B, T + K, D]."""
    stop = tower.config.num_layers
    inserts_lkd = inserts_lkd.astype(tower.dtype)

    def before(h_bpd, new_kd):
      if self.share == 1:
        return place.replace(h_bpd, new_kd)
      return prompts.mix(place, h_bpd, new_kd, self.share)

    h_bpd = place.insert(entering_btd, inserts_lkd[0])
    how = {'start': stop - len(inserts_lkd), 'stop': stop, 'inserts': inserts_lkd}
    return tower.run(h_bpd, place.mask(mask_bt), before=before, **how)[0]

  def _classes(self, trained, variables, frozen):
    """Returns (modality -> class vectors float32[K, C], how far they are from the untouched
    tower's, a scalar).
    """
    if self.sentences is None:
      return {m: part['classes_kc'] for m, part in trained.items()}, 0.0
    if 'class_vectors' in variables:  # Of an evaluation, where nobody asks how far they are.
      return dict.fromkeys(self.reads, variables['class_vectors']), 0.0
    names_kc = self._run_sentences(trained, variables, frozen)
    untouched_kc = jax.lax.stop_gradient(variables['statistics'][CLASS_UNTOUCHED])
    apart = 1 - jnp.mean(jnp.sum(unit(names_kc) * unit(untouched_kc), axis=-1))
    return dict.fromkeys(self.reads, names_kc), apart

  def class_vectors(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """See `base.Defaults`: float32[K, C]."""
    if self.sentences is None:
      return None
    trained = self.representation.apply({'params': variables['params']})
    return self._run_sentences(trained, variables, frozen)

  def _run_sentences(self, trained, variables, frozen):
    """Vectors of the classes, float32[K, C]."""
    tower = self.modules['text'].bind({'params': frozen['text']})
    states_ktd = jax.lax.stop_gradient(variables['statistics'][CLASS_STATES])
    place, mask_kt = prompts.Front(self.fields.num_tokens), self.sentences.mask_kt
    h_kpd = self._run(tower, place, states_ktd, mask_kt, trained['text']['inserts_lkd'])
    return readout.projected(tower, place.without(h_kpd), mask_kt).astype(jnp.float32)


def build(config, towers, *, num_classes, class_names=()) -> MMRL:
  """See `base.make_method`.

  Raises:
    UserError: class names are asked for without a pair of towers that share a space, or one is
      longer than the text tower reads.
  """
  c, used = config[config.method], resolved.modalities(config)
  by_name = names.are_read(config, towers)
  towers = {m: tower for m, tower in towers.items() if m in used or by_name}
  reads, num_layers, spaces = {}, {}, {}
  for modality, tower in towers.items():
    depth = tower.config.num_layers
    first = min(round(c.first_layer * depth), depth - 1)
    reads[modality] = Reads(
      (first, depth) if modality in used else (),
      run_from=first if modality in used else None,
      heads=tuple(head for head in tower.heads if head == 'pool' or by_name),
      names_from=first if modality == 'text' and by_name else None,
    )
    num_layers[modality] = depth - first
    spaces[modality] = tower.config.projection_size if by_name else tower.config.hidden_size
  representation = Representation(
    num_tokens=c.num_tokens,
    width=c.width,
    num_layers=num_layers,
    widths={modality: tower.config.hidden_size for modality, tower in towers.items()},
    spaces=spaces,
    inputs=used,
    num_classes=0 if by_name else num_classes,
    aligner_rank=c.get('aligner_rank', 0),
    projection_rank=c.get('projection_rank', 0),
  )
  modules = base.tower_modules(config, towers, reads)
  found = names.sentences(towers['text'], class_names, c.template) if by_name else None
  frozen_config = ml_collections.FrozenConfigDict(config)
  return MMRL(frozen_config, towers, modules, reads, representation, found)
