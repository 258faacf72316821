"""A fusion-based model with latent structures, on hidden states of two frozen towers: align, then
fuse (ALBEF: Li et al., NeurIPS 2021), with the regularisers of Jiang et al. (CVPR 2023).

Fusion blocks over the text's tokens and a learned query read the image's tokens, and a classifier
reads the query. Beside its cross-entropy: contrast of pooled states with a queue (ITC), matching
of pairs against hard negatives (ITM), distillation from a moving average of what is trained, and
the latent structures on the contrasted embeddings. See `docs/methods/albef.md`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods import head as heads
from molt_jax.methods.parts import alignment
from molt_jax.methods.parts.alignment import Pair
from molt_jax.methods.parts.fusion_stack import FusionStack
from molt_jax.methods.parts.interface import Output, pool, unit
from molt_jax.objectives import contrastive

TEMPERATURE = 0.07, 0.001, 0.5  # At the start, least, greatest.
_KEPT = 0.5  # Share of an image's tokens that its augmented view keeps.


class AlbefHead(nn.Module):
  """What is trained, and what its moving average computes.

  Attributes:
    inputs: hidden states -> (image, text) sequences, an `InputPair` of one layer.
    stack: a `FusionStack`.
    classifier: a module of `fusion.CLASSIFIERS`.
    space: width of the contrasted embeddings; 0: nothing is aligned.
    matches: whether pairs are matched.
    separates: whether there are independent features.
  """

  inputs: nn.Module
  stack: nn.Module
  classifier: nn.Module
  space: int
  matches: bool
  separates: bool

  def setup(self):
    if self.space:
      self.embed = {m: nn.Dense(self.space, use_bias=False) for m in MODALITIES}
      start = nn.initializers.constant(TEMPERATURE[0])
      self.temperature = self.param('temperature', start, (), jnp.float32)
    if self.matches:
      self.match = nn.Dense(2)
    if self.separates:
      self.separate = {m: nn.Dense(self.space, use_bias=False) for m in MODALITIES}

  def __call__(self, states: HiddenStates, present_bm: jax.Array) -> None:
    """Makes every parameter; used for initialisation alone."""
    sequences = self.sequences(states, present_bm, None, None, train=False)
    fused_bc = self.fuse(sequences, train=False)
    self.classifier(fused_bc, train=False)
    if self.space:
      self.embeddings(self.pooled(sequences))
    if self.matches:
      self.match(fused_bc)
    if self.separates:
      self.embeddings(self.pooled(sequences), independent=True)

  def sequences(self, states, present_bm, content_bm, weight_b, *, train):
    """See `inputs.InputPair`."""
    return self.inputs(states, present_bm, train=train, content_bm=content_bm, weight_b=weight_b)

  def logits(self, states, present_bm, content_bm, weight_b, *, train, update):
    """Returns logits of what is present, float32[B, K]."""
    sequences = self.sequences(states, present_bm, content_bm, weight_b, train=update)
    return self.classifier(self.fuse(sequences, train=train), train=train)

  def fuse(self, sequences, *, train) -> jax.Array:
    """Returns what the query reads of what is present, float32[B, C]."""
    parts = []
    for sequence in reversed(sequences):
      mask_bt = sequence.mask_bt & sequence.present_b[:, None]
      parts += [_last(sequence), mask_bt]
    return self.stack(*parts, train=train)

  def pooled(self, sequences, keep_bi: jax.Array | None = None) -> Pair:
    """Returns the mean tokens of all that may be read, float32[B, D]; of an image of some alone."""
    found = []
    for modality, sequence in zip(MODALITIES, sequences, strict=True):
      mask_bt = sequence.mask_bt
      if modality == 'image' and keep_bi is not None:
        mask_bt &= keep_bi | ~jnp.any(keep_bi & mask_bt, axis=1, keepdims=True)
      found.append(pool(sequence.tokens, mask_bt)[-1])
    return Pair(*found)

  def embeddings(self, pooled: Pair, *, independent: bool = False) -> Pair:
    """Returns embeddings of length one; independent ones have maps of their own."""
    maps = self.separate if independent else self.embed
    return Pair(*(unit(maps[m](getattr(pooled, m))) for m in MODALITIES))

  def matching(self, sequences, chosen: Pair) -> tuple[jax.Array, ...]:
    """Returns logits [B, 2] of pairs, of texts with other images, of images with other texts."""
    image, text = sequences
    whole = [_last(text), text.mask_bt], [_last(image), image.mask_bt]
    other_images = [jnp.take(x, chosen.image, axis=0) for x in whole[1]]
    other_texts = [jnp.take(x, chosen.text, axis=0) for x in whole[0]]
    pairs = [(*whole[0], *whole[1]), (*whole[0], *other_images), (*other_texts, *whole[1])]
    joined = [jnp.concatenate(parts) for parts in zip(*pairs, strict=True)]
    logits_nk = self.match(self.stack(*joined, train=False))
    return jnp.split(logits_nk.astype(jnp.float32), 3)

  def encode(self, states, present_bm) -> 'Encoded':
    """Returns what `judge` and a comparison of embeddings read."""
    image, text = self.sequences(states, present_bm, None, None, train=False)
    embeddings = self.embeddings(self.pooled((image, text)))
    return Encoded(embeddings, _last(image), image.mask_bt, _last(text), text.mask_bt)

  def judge(self, image_bid, image_mask_bi, text_btd, text_mask_bt) -> jax.Array:
    """Returns the probability that image and text belong together, float32[B]."""
    fused_bc = self.stack(text_btd, text_mask_bt, image_bid, image_mask_bi, train=False)
    return jax.nn.softmax(self.match(fused_bc).astype(jnp.float32))[:, 1]


class Encoded(NamedTuple):
  """Examples as retrieval reads them: embeddings to choose by, tokens to rank the best again.

  Attributes:
    embeddings: float32[B, C] of each modality, of length one.
    image_bid, image_mask_bi, text_btd, text_mask_bt: tokens, and which of them are there.
  """

  embeddings: Pair
  image_bid: jax.Array
  image_mask_bi: jax.Array
  text_btd: jax.Array
  text_mask_bt: jax.Array


def _last(sequence) -> jax.Array:
  """The tokens of the last hidden state, [B, T, D]."""
  return sequence.tokens.padded(len(sequence.mask_bt))[-1]


@dataclasses.dataclass(frozen=True)
class Albef(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    reads, modules, over_patterns: see `base.Method`.
    head: what is trained.
    widths: modality -> width of its tower.
  """

  config: ml_collections.FrozenConfigDict
  reads: Mapping[str, Reads]
  modules: Mapping[str, nn.Module | None]
  head: AlbefHead
  widths: Mapping[str, int]
  over_patterns: Any = jax.vmap

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    c = self.config.albef
    return {'itc': c.itc, 'itm': c.itm, 'momentum': c.alpha, **structure_weights(self.config)}

  @property
  def queue_size(self) -> int:
    """Pairs that are remembered, those of the batch among them: whole batches."""
    batch_size = self.config.train.batch_size
    return max(round(self.config.albef.queue / batch_size), 1) * batch_size

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`; 'statistics' are those of the inputs, the moving average and the queue."""
    states = {m: jnp.zeros((1, 1, 1, width)) for m, width in self.widths.items()}
    example = HiddenStates(states['image'], states['text'], jnp.ones((1, 1), bool))
    variables = self.head.init(key, example, jnp.ones((1, 2), bool))
    params = variables['params']
    queue: dict[str, Any] = {'valid_n': jnp.zeros((self.queue_size,), bool)}
    for modality, width in self.widths.items():
      queue[modality] = jnp.zeros((self.queue_size, width))
    inputs = variables.get('statistics', {})
    moving = jax.tree.map(jnp.copy, nn.unbox(params))
    return {'params': params, 'statistics': {'inputs': inputs, 'moving': moving, 'queue': queue}}

  def constrain(self, params: Any) -> Any:
    """See `base.Method`: the temperature within its range."""
    if not self.head.space:
      return params
    return {**params, 'temperature': jnp.clip(params['temperature'], *TEMPERATURE[1:])}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    del frozen
    statistics = variables['statistics']
    own = self._own(variables)
    if not training:
      how = {'train': False, 'update': False, 'method': 'logits'}
      return Output(self.head.apply(own, features, present_bm, None, None, **how))
    read = features, present_bm, batch['present'], batch['weight']
    how = {'train': True, 'update': training.update, 'method': 'logits'}
    how |= {'rngs': {'dropout': training.rngs['dropout']}}
    logits_bk, changed = self.head.apply(own, *read, mutable=['statistics'], **how)
    if training.update:
      statistics = self._moved(variables['params'], statistics, changed.get('statistics', {}))
      own['statistics'] = statistics['inputs']
    moving = {'params': statistics['moving'], 'statistics': statistics['inputs']}
    how = {'train': False, 'update': False, 'method': 'logits'}
    soft_bk = jax.lax.stop_gradient(self.head.apply(moving, *read, **how))
    losses_b = {'momentum': self._soft_cross_entropy(logits_bk, soft_bk)}
    if self.head.space:
      found, queue = self._aligned(own, moving, statistics['queue'], features, batch, training)
      losses_b |= found
      statistics = {**statistics, 'queue': queue}
    return Output(logits_bk, losses_b=losses_b, statistics=statistics if training.update else None)

  def encode(self, variables, features, present_bm) -> Encoded:
    """Returns a batch as retrieval reads it.

    Args:
      variables: as in `__call__`.
      features: hidden states.
      present_bm: bool[B, 2].
    """
    return self.head.apply(self._own(variables), features, present_bm, method='encode')

  def judge(self, variables, image_bid, image_mask_bi, text_btd, text_mask_bt) -> jax.Array:
    """Returns the probability that images and texts belong together, float32[B]; both as `encode`
    returned them.
    """
    tokens = image_bid, image_mask_bi, text_btd, text_mask_bt
    return self.head.apply(self._own(variables), *tokens, method='judge')

  def _own(self, variables):
    return {'params': variables['params'], 'statistics': variables['statistics']['inputs']}

  def _moved(self, params, statistics, inputs):
    """Statistics with those of the inputs and the moving average after this step."""
    rate = self.config.albef.momentum

    def move(old, new):
      return rate * old + (1 - rate) * jax.lax.stop_gradient(new)

    moving = jax.tree.map(move, statistics['moving'], params)
    return {**statistics, 'inputs': inputs, 'moving': moving}

  def _soft_cross_entropy(self, logits_bk, soft_bk) -> jax.Array:
    """Against what the moving average finds likely, float32[B]."""
    if self.config.dataset.multi_label:
      likely_bk = jax.nn.sigmoid(soft_bk)
      loss_bk = likely_bk * jax.nn.softplus(-logits_bk)
      return jnp.mean(loss_bk + (1 - likely_bk) * jax.nn.softplus(logits_bk), axis=1)
    return -jnp.sum(jax.nn.softmax(soft_bk) * jax.nn.log_softmax(logits_bk), axis=1)

  def _aligned(self, own, moving, queue, features, batch, training):
    """Returns (losses by name, the queue with this batch): of all that may be read, whatever the
    missing pattern.
    """
    content_bm, weight_b = batch['present'], batch['weight']
    online, momentum = self.head.bind(own), self.head.bind(moving)
    read = features, content_bm, content_bm, weight_b
    sequences = online.sequences(*read, train=False)
    pooled = online.pooled(sequences)
    there_b = sequences[0].present_b & sequences[1].present_b & (weight_b > 0)
    queue = self._enqueued(queue, pooled, there_b) if training.update else queue
    past = Pair(queue['image'], queue['text'])
    embeddings = online.embeddings(pooled)
    keys = jax.lax.stop_gradient(momentum.embeddings(pooled))
    temperature = online.temperature
    losses_b = {}
    if self.config.albef.itc:
      loss_b = alignment.contrast(
        embeddings,
        keys,
        jax.lax.stop_gradient(momentum.embeddings(past)),
        queue['valid_n'][None] & ~alignment.same_input(pooled, past),
        temperature=temperature,
        alpha=self.config.albef.alpha,
      )
      losses_b['itc'] = jnp.where(there_b, loss_b, 0.0)
    draws = dict(zip(('match', 'view', 'bridge'), _split(training), strict=True))
    if self.head.matches:
      negative_bb = there_b[None] & ~alignment.same_input(pooled, pooled)
      drawn = alignment.hard_negatives(embeddings, negative_bb, temperature, draws['match'])
      losses_b['itm'] = _matching_loss(online.matching(sequences, drawn[0]), there_b, drawn[1])
    weights = structure_weights(self.config)
    if weights:
      kept_bi = jax.random.bernoulli(draws['view'], _KEPT, sequences[0].mask_bt.shape)
      others = jax.lax.stop_gradient(_views(momentum, momentum.pooled(sequences, kept_bi)))
      found = _views(online, pooled)
      every = contrastive.PairEmbeddings(
        **found,
        **{name.replace('_bc', '_augmented_bc'): x for name, x in others.items()},
        weight_b=weight_b * there_b,
      )
      _, parts = contrastive.pair_loss(every, weights, 1 / temperature, draws['bridge'])
      losses_b |= {name: jnp.broadcast_to(x, weight_b.shape) for name, x in parts.items()}
    return losses_b, queue

  def _enqueued(self, queue, pooled, there_b):
    new = {'image': pooled.image, 'text': pooled.text, 'valid_n': there_b}
    new = jax.lax.stop_gradient(new)
    return {name: jnp.concatenate([x, queue[name]])[: self.queue_size] for name, x in new.items()}


def _split(training) -> jax.Array:
  """Keys that all missing patterns share: what is drawn with them is computed once."""
  return jax.random.split(training.rngs['patches'], 3)


def _views(bound, pooled) -> dict[str, jax.Array]:
  """Fields of `PairEmbeddings`."""
  found = dict(zip(('image_bc', 'text_bc'), bound.embeddings(pooled), strict=True))
  if bound.separates:
    names = 'image_independent_bc', 'text_independent_bc'
    found |= zip(names, bound.embeddings(pooled, independent=True), strict=True)
  return found


def _matching_loss(logits, there_b, has_negative_b) -> jax.Array:
  """The mean cross-entropy of an example's pair and its two negatives, float32[B]."""
  losses, counts = 0.0, 0.0
  counted = (there_b, there_b & has_negative_b, there_b & has_negative_b)
  for logits_bk, label, counted_b in zip(logits, (1, 0, 0), counted, strict=True):
    loss_b = -jax.nn.log_softmax(logits_bk)[:, label]
    losses += jnp.where(counted_b, loss_b, 0.0)
    counts += counted_b.astype(jnp.float32)
  return losses / jnp.maximum(counts, 1)


def structure_weights(config) -> dict[str, float]:
  """Returns objective of `objectives.contrastive` -> weight, of those that are not 0."""
  c = config.albef
  weights = {
    'orthogonality': c.separation,
    'contrastive_separation': 0.5 * c.separation,
    'uniformity': 0.1 * c.separation,
    'brownian_bridge': c.bridge,
    'geometric_original': c.geometry,
    'geometric_augmented': c.geometry,
  }
  return {name: weight for name, weight in weights.items() if weight}


def build(config, towers, *, num_classes, class_names=()) -> Albef:
  """See `base.make_method`.

  Raises:
    UserError: one modality alone, microbatches, or heads that do not divide the width.
  """
  del class_names
  c = config.albef
  if len(towers) < 2:
    raise UserError(
      f"config.dataset.modalities: {config.dataset.modalities!r}, but config.method='albef' fuses "
      'two; give image,text, or another method'
    )
  if config.train.accumulate > 1:
    raise UserError(
      f"config.train.accumulate: {config.train.accumulate} beside config.method='albef', whose "
      'negatives are drawn from all of a batch; give 1'
    )
  if c.width % c.num_heads:
    raise UserError(
      f'config.albef.num_heads: {c.num_heads} does not divide config.albef.width = {c.width}; give '
      'a divisor'
    )
  reads = {modality: Reads((tower.config.num_layers,)) for modality, tower in towers.items()}
  sizes = base.widths(towers)
  dtype = jnp.dtype(config.compute_dtype)
  aligned = c.itc or c.itm or structure_weights(config)
  head = AlbefHead(
    inputs=heads.inputs(config, 1, sizes['image'], sizes['text'], strategy='robust'),
    stack=FusionStack(c.num_layers, c.width, c.num_heads, c.dropout, dtype),
    classifier=heads.classifier(config, num_classes, 'common'),
    space=c.space if aligned else 0,
    matches=bool(c.itm),
    separates=bool(c.separation),
  )
  modules = base.tower_modules(config, towers, reads)
  return Albef(ml_collections.FrozenConfigDict(config), reads, modules, head, sizes)
