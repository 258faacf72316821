"""HUSE: one space and one classifier for the embeddings of both modalities (Narayana et al. 2019,
arXiv 1911.05978), on pooled hidden states of two frozen towers.

Embeddings of one example lie close together, and those of two examples as far from each other as
the names of their classes do in the text tower. See `docs/methods/huse.md`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods import head as heads
from molt_jax.methods.parts import names
from molt_jax.methods.parts.attention import dense
from molt_jax.methods.parts.interface import Output, available_mean, pool, unit
from molt_jax.runtime import compiling
from molt_jax.towers.loading import TowerSpec

NAMES = 'class_names'  # Their embeddings, among the statistics.
_LEAST = 1e-6  # Of a probability whose logarithm is taken.


class Embedding(nn.Module):
  """Hidden layers with ReLU and dropout, [B, D] -> float32[B, C] of length one.

  Attributes:
    num_layers: hidden layers.
    width: C.
    dropout: rate.
    dtype: type of the products.
  """

  num_layers: int
  width: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_bd: jax.Array, *, train: bool) -> jax.Array:
    for n in range(self.num_layers):
      axes = ('embed' if n == 0 else 'common', 'common')
      x_bd = nn.relu(dense(self.width, axes, self.dtype, name=f'layer_{n}')(x_bd))
      x_bd = nn.Dropout(self.dropout, deterministic=not train)(x_bd)
    return unit(x_bd)


class HuseHead(nn.Module):
  """An embedding of each modality, and a linear classifier that reads either.

  Attributes:
    inputs: hidden states -> (image, text) sequences, an `InputPair` of one layer.
    embeddings: modality -> `Embedding`.
    classifier: a `fusion.Linear`, shared.
    multi_label: whether an example can have several labels.
  """

  inputs: nn.Module
  embeddings: Mapping[str, nn.Module]
  classifier: nn.Module
  multi_label: bool

  @nn.compact
  def __call__(
    self,
    states: HiddenStates,
    present_bm: jax.Array,
    *,
    train: bool,
    content_bm: jax.Array | None = None,
    weight_b: jax.Array | None = None,
  ) -> Output:
    """See `head.make_head`. `Output.embeddings` is modality -> (float32[B, C], bool[B]), of all
    that may be read, and the examples that have it.
    """
    sequences = self.inputs(
      states, present_bm, train=train, content_bm=content_bm, weight_b=weight_b
    )
    logits, found = [], {}
    for modality, sequence in zip(MODALITIES, sequences, strict=True):
      pooled_bd = pool(sequence.tokens, sequence.mask_bt)[-1]
      embedded_bc = self.embeddings[modality](pooled_bd, train=train)
      found[modality] = embedded_bc, jnp.any(sequence.mask_bt, axis=-1)
      logits.append(self.classifier(embedded_bc, train=False))
    image_b, text_b = (sequence.present_b for sequence in sequences)
    # An example with one modality is classified by that one in both branches.
    image_bk = jnp.where(image_b[:, None], logits[0], logits[1])
    text_bk = jnp.where(text_b[:, None], logits[1], logits[0])
    there_bm = jnp.stack([image_b, text_b], axis=-1)
    return Output(
      logits_bk=self._mean(logits, there_bm),
      branches_bk={'image': image_bk, 'text': text_bk} if train else {},
      embeddings=found if train else None,
    )

  def _mean(self, logits, there_bm) -> jax.Array:
    """The logarithm of the mean probability; of several labels its logit."""
    to_probability = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
    mean_bk = available_mean([to_probability(logits_bk) for logits_bk in logits], there_bm)
    mean_bk = jnp.clip(mean_bk, _LEAST, 1 - _LEAST)
    return jnp.log(mean_bk) - (jnp.log1p(-mean_bk) if self.multi_label else 0.0)


@dataclasses.dataclass(frozen=True)
class Huse(heads.HeadMethod):
  """See the module and `head.HeadMethod`.

  Attributes:
    config: of the classifier.
    towers: modality -> description.
    class_names: K of them.
  """

  config: ml_collections.FrozenConfigDict = None
  towers: Mapping[str, TowerSpec] = dataclasses.field(default_factory=dict)
  class_names: tuple[str, ...] = ()

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return {'gap': self.config.huse.gap, 'semantic': self.config.huse.semantic}

  @property
  def branch_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return dict.fromkeys(MODALITIES, 0.5)

  @property
  def names_classes(self) -> bool:
    """Whether there is a text tower to read the classes' names."""
    return 'text' in self.towers and bool(self.class_names)

  @property
  def of_names(self) -> tuple[str, ...]:
    """See `base.Method`."""
    return (NAMES,)

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`; 'statistics' hold the embeddings of the classes' names."""
    variables = super().init(key)
    if not self.names_classes:
      return variables
    names_kd = jnp.zeros((self.num_classes, self.towers['text'].config.hidden_size))
    return {**variables, 'statistics': {**variables.get('statistics', {}), NAMES: names_kd}}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`; the text tower reads the classes' names."""
    variables = super().start(variables, frozen)
    if not self.names_classes:
      return variables
    statistics = variables['statistics']
    place, params = statistics[NAMES].sharding, frozen.get('text')
    if params is None:  # Features come from a store.
      reads = {'text': Reads(self.states['text'])}
      params = frozen_towers.load_frozen(self.config, place.mesh, reads, ['text'])['text']
    placed = jax.device_put(self._embed_names(params), place)
    return {**variables, 'statistics': {**statistics, NAMES: placed}}

  def _embed_names(self, params) -> np.ndarray:
    """The mean of each name's tokens less that of all names, of length one."""
    found = names.sentences(self.towers['text'], self.class_names, '{}')
    run = compiling.jit(lambda p, *x: self.modules['text'].apply(p, *x, states=self.states['text']))
    last_lktd = run({'params': params}, found.tokens_kt, found.mask_kt)
    last_ktd = np.asarray(last_lktd[-1], np.float32)
    count_k1 = np.maximum(found.mask_kt.sum(axis=1, keepdims=True), 1)
    mean_kd = np.where(found.mask_kt[..., None], last_ktd, 0).sum(axis=1) / count_k1
    return np.asarray(unit(mean_kd - mean_kd.mean(axis=0)))

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    statistics = dict(variables.get('statistics', {}))
    names_kd = statistics.pop(NAMES, None)
    own = {**variables, 'statistics': statistics}
    out = super().__call__(own, frozen, features, batch, present_bm, training)
    if not training:
      return out
    losses_b = self._losses(out.embeddings, names_kd, batch)
    changed = out.statistics
    if changed is not None and names_kd is not None:
      changed = {**changed, NAMES: names_kd}
    return out.replace(embeddings=None, losses_b=losses_b, statistics=changed)

  def _losses(self, embeddings, names_kd, batch) -> dict[str, jax.Array]:
    """Of all that may be read, whatever the missing pattern: float32[B] each."""
    (image_bc, image_b), (text_bc, text_b) = (embeddings[modality] for modality in MODALITIES)
    distance_b = 1 - jnp.sum(image_bc * text_bc, axis=-1)
    losses_b = {'gap': jnp.where(image_b & text_b, distance_b, 0.0)}
    if names_kd is None:
      return losses_b
    label = batch['label']
    labels_bk = jax.nn.one_hot(label, self.num_classes) if label.ndim == 1 else label
    names_bd = unit(jnp.maximum(labels_bk, 0).astype(jnp.float32) @ names_kd)
    known_b = jnp.any(labels_bk > 0, axis=1) & (batch['weight'] > 0)
    parts = []
    for z_bc, there_b in embeddings.values():
      parts.append(semantic(z_bc, names_bd, known_b & there_b, margin=self.config.huse.margin))
    return losses_b | {'semantic': jnp.broadcast_to(sum(parts) / len(parts), distance_b.shape)}


def semantic(
  z_bc: jax.Array, names_bd: jax.Array, counted_b: jax.Array, *, margin: float
) -> jax.Array:
  """The mean over pairs of examples of s (d(z_m, z_n) - d(psi_m, psi_n))^2, d the cosine distance,
  s = 1 where one of the two is at most the margin, else 0.

  Args:
    z_bc: embeddings of length one.
    names_bd: psi, what the names of an example's classes are, of length one.
    counted_b: bool[B]; other examples are in no pair.
    margin: beyond it, examples are far enough apart.
  """
  z_bc = jnp.where(counted_b[:, None], z_bc, 0.0)
  own_bb = 1 - jnp.matmul(z_bc, z_bc.T, precision='highest')
  wanted_bb = 1 - jnp.matmul(names_bd, names_bd.T, precision='highest')
  near_bb = jax.lax.stop_gradient(jnp.minimum(own_bb, wanted_bb)) <= margin
  pairs_bb = counted_b[:, None] & counted_b[None]
  total = jnp.sum(jnp.square(own_bb - wanted_bb), where=near_bb & pairs_bb)
  return total / jnp.maximum(jnp.sum(pairs_bb), 1).astype(jnp.float32)


def make_head(config, *, num_layers, num_classes, image_width, text_width) -> HuseHead:
  """See `head.make_head`; of several hidden states the last is read."""
  del num_layers
  c, dtype = config.huse, jnp.dtype(config.compute_dtype)
  depths = {'image': c.image_layers, 'text': c.text_layers}
  return HuseHead(
    inputs=heads.inputs(config, 1, image_width, text_width, strategy='robust'),
    embeddings={m: Embedding(depth, c.width, c.dropout, dtype) for m, depth in depths.items()},
    classifier=heads.classifier(config, num_classes, 'common', kind='linear'),
    multi_label=config.dataset.multi_label,
  )


def build(config, towers, *, num_classes, class_names=()) -> Huse:
  """See `base.make_method`.

  Raises:
    UserError: microbatches, of whose examples the semantic loss would see no pairs.
  """
  if config.huse.semantic and config.train.accumulate > 1:
    raise UserError(
      f"config.train.accumulate: {config.train.accumulate} beside config.method='huse', whose "
      'semantic loss compares all examples of a batch; give 1, or config.huse.semantic=0'
    )
  states = {modality: (tower.config.num_layers,) for modality, tower in towers.items()}
  sizes = {f'{modality}_width': width for modality, width in base.widths(towers).items()}
  head = make_head(config, num_layers=1, num_classes=num_classes, **sizes)
  kind = functools.partial(
    Huse,
    config=ml_collections.FrozenConfigDict(config),
    towers=towers,
    class_names=tuple(class_names),
  )
  return heads.build(config, towers, states, head, num_classes, kind=kind)
