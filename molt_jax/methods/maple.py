"""MaPLe: coupled prompts in the lower layers of both towers (Khattak et al., CVPR 2023,
"MaPLe: Multi-modal Prompt Learning").

Each of the first J layers has a few learned vectors P_l in the text tower, and their image W_l P_l
in the image tower, so that both towers are prompted from one place; they take the place of what the
layer below made of them, and flow on above layer J. In a pair of towers that share a space, an
example is compared with its classes' sentences, whose first words the vectors are:

  logits_k = scale cos(f_i, w_k)

Beyond the paper: an example's own text is prompted and compared with the sentences too, and logits
are the mean over the modalities that are there. Towers without a shared space read no sentences:
then a linear map reads both features, [f_i; f_t], and a learned vector stands for a missing one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.config import resolved
from molt_jax.data.modalities import COLUMN
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates, clean_inputs, text_mask
from molt_jax.methods import base
from molt_jax.methods.parts import names, prompts, readout
from molt_jax.methods.parts.interface import Output, available_mean, unit
from molt_jax.towers.loading import TowerSpec


class Coupled(nn.Module):
  """What is trained: prompts of the text tower, their maps into the image tower and, without
  sentences, the classifier of features.

  Attributes:
    num_layers: J.
    num_tokens: prompts of each layer.
    widths: modality -> width of its tower; of the towers that are prompted.
    rank: of the maps; 0: full.
    features: modality -> width of its feature that the classifier reads; {}: there is none.
    num_classes: K of the classifier.
  """

  num_layers: int
  num_tokens: int
  widths: Mapping[str, int]
  rank: int
  features: Mapping[str, int]
  num_classes: int

  def setup(self):
    first = next(iter(self.widths.values()))
    shape = (self.num_layers, self.num_tokens, self.widths.get('text', first))
    self.prompts = self.param('prompts', prompts.SMALL, shape, jnp.float32)
    if len(self.widths) > 1:
      self.maps = self._make_maps()
    if self.features:
      init = nn.initializers.zeros
      self.nulls = {m: self.param(f'{m}_null', init, (d,)) for m, d in self.features.items()}
      self.head = nn.Dense(self.num_classes)

  def _make_maps(self):
    """The factors of the maps [J, ..., ...] of text prompts into the image tower, and a bias."""
    sizes = [self.widths['text'], self.widths['image']]
    if self.rank:
      sizes.insert(1, self.rank)
    kernels = []
    for n, (inner, outer) in enumerate(zip(sizes, sizes[1:], strict=False)):
      shape = (self.num_layers, inner, outer)
      kernels.append(self.param(f'map_{n}_kernel', prompts.alike, shape, jnp.float32))
    bias_ld = self.param('map_bias', nn.initializers.zeros, (self.num_layers, sizes[-1]))
    return kernels, bias_ld

  def __call__(self):
    """Makes every parameter; used for initialisation alone."""
    self.inserts()
    if self.features:
      self.classify({m: jnp.zeros((1, d)) for m, d in self.features.items()}, {})

  def inserts(self) -> dict[str, jax.Array]:
    """Returns modality -> the prompts of its tower, float32[J, n, D]."""
    if len(self.widths) == 1:
      return dict.fromkeys(self.widths, self.prompts)
    x_lnd, (kernels, bias_ld) = self.prompts, self.maps
    for kernel_lde in kernels:
      x_lnd = jnp.einsum('lnd,lde->lne', x_lnd, kernel_lde)
    return {'text': self.prompts, 'image': x_lnd + bias_ld[:, None]}

  def classify(self, found: Mapping[str, jax.Array], there: Mapping[str, jax.Array]) -> jax.Array:
    """Logits float32[B, K] of features float32[B, D]; where bool[B] `there` says so or one is not
    found, the learned vector stands for it.
    """
    size = len(next(iter(found.values())))
    parts = []
    for m, null_d in self.nulls.items():
      null_bd = jnp.broadcast_to(null_d[None], (size, len(null_d)))
      x_bd = found.get(m, null_bd)
      parts.append(jnp.where(there[m][:, None], x_bd, null_bd) if m in there else x_bd)
    return self.head(jnp.concatenate(parts, axis=-1))


@dataclasses.dataclass(frozen=True)
class MaPLe(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    towers: modality -> description, of those that are run.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: towers are run from their input on.
    coupled: what is trained.
    inputs: the modalities whose features are read.
    sentences: the classes' names; None: a linear map reads the features.
    over_patterns: see `base.Method`; what is missing decides only what is read of the features.
  """

  config: ml_collections.FrozenConfigDict
  towers: Mapping[str, TowerSpec]
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  coupled: Coupled
  inputs: tuple[str, ...]
  sentences: names.Sentences | None
  over_patterns: Any = jax.vmap

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    return {'params': self.coupled.init(key)['params'], 'statistics': {}}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`: prompts of the first layer begin as the words whose place they take."""
    if self.sentences is None or not self.coupled.num_tokens:
      return dict(variables)
    old = variables['params']['prompts']
    words = self.config.maple.template.partition('{}')[0]
    table, count = frozen['text']['token_embedding'], self.coupled.num_tokens
    vectors = names.word_vectors(self.towers['text'], table, words, count)
    new = jax.device_put(old.at[0].set(vectors), old.sharding)
    return {**variables, 'params': {**variables['params'], 'prompts': new}}

  def features(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> HiddenStates:
    """See `base.Method`: there is nothing that the prompts leave as it is."""
    return HiddenStates(None, None, text_mask(batch))

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    del features
    content_bm = batch['present'] if training else present_bm
    trained = self.coupled.bind({'params': variables['params']})
    inserts = trained.inserts()
    found, there = {}, {}
    for modality in self.inputs:
      if frozen.get(modality) is None:
        continue
      tower = self.modules[modality].bind({'params': frozen[modality]})
      inputs = clean_inputs({**batch, 'present': content_bm}, modality)
      run = self._run_image if modality == 'image' else self._run_text
      found[modality] = run(tower, inputs, inserts[modality]).astype(jnp.float32)
      there[modality] = present_bm[:, COLUMN[modality]] & content_bm[:, COLUMN[modality]]
    if self.sentences is None:
      # Of one scale, whatever the towers have.
      scaled = {m: unit(x_bd) * x_bd.shape[-1] ** 0.5 for m, x_bd in found.items()}
      return Output(logits_bk=trained.classify(scaled, there))
    names_kc = variables.get('class_vectors')
    if names_kc is None:
      names_kc = self._run_sentences(frozen, inserts['text'])
    scale = names.scale_of(self.towers)
    logits = [scale * unit(x_bc) @ unit(names_kc).T for x_bc in found.values()]
    return Output(logits_bk=available_mean(logits, jnp.stack(list(there.values()), axis=-1)))

  def _run_image(self, tower, inputs, inserts_lnd):
    """Features of images, [B, C]; where tokens stand makes no difference to the others."""
    inserts_lnd = inserts_lnd.astype(tower.dtype)
    inserts_lnd = inserts_lnd.at[0].set(tower.norm_inputs(inserts_lnd[0]))
    place = prompts.Front(self.coupled.num_tokens)
    h_bpd = place.insert(tower.embed(*inputs), inserts_lnd[0])
    h_bpd = self._run(tower, place, h_bpd, None, inserts_lnd)
    return readout.projected(tower, place.without(h_bpd))

  def _run_text(self, tower, inputs, inserts_lnd):
    """Features of examples' own texts, [B, C], prompts behind the first token."""
    tokens_bt, mask_bt = inputs
    inserts_lnd = self._at_words(tower, inserts_lnd)
    place = prompts.Front(self.coupled.num_tokens)
    h_bpd = place.insert(tower.embed(tokens_bt), inserts_lnd[0])
    positions_bt = place.positions(tokens_bt.shape[1])
    h_bpd = self._run(tower, place, h_bpd, place.mask(mask_bt), inserts_lnd, positions_bt)
    return readout.projected(tower, tower.finish(place.without(h_bpd)), mask_bt)

  def class_vectors(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """See `base.Defaults`: float32[K, C]."""
    if self.sentences is None:
      return None
    trained = self.coupled.bind({'params': variables['params']})
    return self._run_sentences(frozen, trained.inserts()['text'])

  def _run_sentences(self, frozen, inserts_lnd):
    """Vectors of the classes, float32[K, C]; prompts take the place of words there."""
    tower = self.modules['text'].bind({'params': frozen['text']})
    h_ktd = names.embed(tower, self.sentences, inserts_lnd[0])
    place, mask_kt = prompts.Front(self.coupled.num_tokens), self.sentences.mask_kt
    h_ktd = self._run(tower, place, h_ktd, mask_kt, self._at_words(tower, inserts_lnd))
    return readout.projected(tower, h_ktd, mask_kt).astype(jnp.float32)

  def _at_words(self, tower, inserts_lnd):
    """Prompts as the text tower takes them: in a pair the first layer's have places of words."""
    inserts_lnd = inserts_lnd.astype(tower.dtype)
    if self.sentences is None:
      return inserts_lnd
    places_nd = tower.position_embedding[1 : 1 + self.coupled.num_tokens].astype(tower.dtype)
    return inserts_lnd.at[0].add(places_nd)

  def _run(self, tower, place, h_bpd, mask_bp, inserts_lnd, positions_bt=None):
    """Runs all layers, prompts in their place before each of the first J."""
    layers = len(inserts_lnd)
    how = {} if positions_bt is None else {'positions_bt': positions_bt}
    inserted = {'before': place.replace, 'inserts': inserts_lnd}
    h_bpd, _ = tower.run(h_bpd, mask_bp, start=0, stop=layers, **inserted, **how)
    stop = tower.config.num_layers
    return tower.run(h_bpd, mask_bp, start=layers, stop=stop, **how)[0]


def build(config, towers, *, num_classes, class_names=()) -> MaPLe:
  """See `base.make_method`.

  Raises:
    UserError: class names are asked for without a pair of towers that share a space, one is longer
      than the text tower reads, or the template has too few words before it.
  """
  c, used = config.maple, resolved.modalities(config)
  by_name = names.are_read(config, towers)
  towers = {m: tower for m, tower in towers.items() if m in used or by_name}
  reads = {}
  for modality, tower in towers.items():
    reads[modality] = Reads(
      run_from=0 if modality in used else None,
      heads=tuple(head for head in tower.heads if head == 'pool' or by_name),
      names_from=0 if modality == 'text' and by_name else None,
    )
  widths = {modality: tower.config.hidden_size for modality, tower in towers.items()}
  coupled = Coupled(
    num_layers=min(c.num_layers, *(tower.config.num_layers for tower in towers.values())),
    num_tokens=c.num_tokens,
    widths=widths,
    rank=c.rank,
    features={} if by_name else widths,
    num_classes=num_classes,
  )
  found = _sentences(towers['text'], class_names, c) if by_name else None
  modules = base.tower_modules(config, towers, reads)
  frozen_config = ml_collections.FrozenConfigDict(config)
  return MaPLe(frozen_config, towers, modules, reads, coupled, used, found)


def _sentences(tower: TowerSpec, class_names, c) -> names.Sentences:
  """The classes' names in the template, whose first words learned vectors stand for."""
  words = names.count_tokens(tower, c.template.partition('{}')[0])
  if words < c.num_tokens:
    raise UserError(
      f'config.maple.template: {c.template!r} has {words} tokens before the name, and '
      f'config.maple.num_tokens={c.num_tokens} take their place; give more words, or fewer tokens'
    )
  found = names.sentences(tower, class_names, c.template)
  return names.with_slots(found, c.num_tokens)
