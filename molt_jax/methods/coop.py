"""CoOp and CoCoOp: a learned context in the sentences of the classes (Zhou et al., IJCV 2022,
"Learning to Prompt for Vision-Language Models", and CVPR 2022, "Conditional Prompt Learning for
Vision-Language Models").

M learned vectors v stand in the text tower beside each class's name; what the tower makes of that
sentence, w_k, is compared with the feature of an image by the pair's own scaled cosine:

  logits_k = scale cos(f, w_k(v))

CoCoOp adds to each vector what a small net makes of the feature, v + net(f / |f|), so that the text
tower runs once for each example and class.

Beyond the papers, whose input is an image: an example's own text is a second input, whose feature
is compared with the same w_k. Logits are the mean over the modalities that are there, and so is
what the net reads.
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
from molt_jax.errors import UserError
from molt_jax.features import hidden_states
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods.parts import names, prompts, readout
from molt_jax.methods.parts.interface import Output, available_mean, unit
from molt_jax.towers.loading import TowerSpec

CONDITIONAL = 'cocoop'
# Classes up to which the text tower runs for each example and class.
MOST_CLASSES = 32
# The net's hidden layer is narrower than its input by this factor.
NARROWER = 16


class Context(nn.Module):
  """What is trained.

  Attributes:
    shape: of the vectors, (M, D), or (K, M, D) where each class has its own.
    space: C, width of the features that a net reads; 0: there is no net.
  """

  shape: tuple[int, ...]
  space: int

  @nn.compact
  def __call__(self, read_bc: jax.Array | None = None) -> jax.Array:
    """Returns the vectors [M, D] or [K, M, D]; with a net [B, M, D], those of each example."""
    vectors = self.param('context', prompts.SMALL, self.shape, jnp.float32)
    if not self.space:
      return vectors
    read_bc = jnp.zeros((1, self.space)) if read_bc is None else read_bc
    hidden_bh = nn.relu(nn.Dense(max(1, self.space // NARROWER), name='net_in')(read_bc))
    shift_bd = nn.Dense(self.shape[-1], name='net_out')(hidden_bh)
    return vectors[None] + shift_bd[:, None]


@dataclasses.dataclass(frozen=True)
class CoOp(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    towers: modality -> description, of those that are run.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: what it makes of an input.
    context: what is trained.
    sentences: the classes' names.
    over_patterns: see `base.Method`; with a net, sentences depend on what is there.
  """

  config: ml_collections.FrozenConfigDict
  towers: Mapping[str, TowerSpec]
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  context: Context
  sentences: names.Sentences
  over_patterns: Any = jax.vmap

  @property
  def fields(self) -> ml_collections.FrozenConfigDict:
    """The method's own section of the config."""
    return self.config[self.config.method]

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    return {'params': self.context.init(key)['params'], 'statistics': {}}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`: vectors begin as words where the config names some."""
    if not self.fields.words or not self.fields.num_tokens:
      return dict(variables)
    old = variables['params']['context']
    table, count = frozen['text']['token_embedding'], self.fields.num_tokens
    vectors = names.word_vectors(self.towers['text'], table, self.fields.words, count)
    new = jax.device_put(jnp.broadcast_to(vectors, old.shape), old.sharding)
    return {**variables, 'params': {**variables['params'], 'context': new}}

  def features(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> HiddenStates:
    """See `base.Method`: one vector of each input, [1, B, 1, D]."""
    stored = hidden_states.from_store(batch)
    if stored is not None:
      return stored
    states = {modality: reads.states for modality, reads in self.reads.items()}
    found = hidden_states.extract(self.modules, frozen, batch, states)
    pooled = {}
    for modality in MODALITIES:
      last = found.of(modality)
      if last is not None:
        inputs = hidden_states.clean_inputs(batch, modality)
        params = {'params': frozen[modality]}
        pooled_bd = self.modules[modality].apply(params, last[-1], *inputs, method='pool')
        last = jax.lax.stop_gradient(pooled_bd.astype(jnp.float32))[None, :, None]
      pooled[modality] = last
    return HiddenStates(pooled['image'], pooled['text'], found.text_mask_bt)

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    content_bm = batch['present'] if training else present_bm
    found, there = [], []
    for modality in MODALITIES:
      if features.of(modality) is None or frozen.get(modality) is None:
        continue
      tower = self.modules[modality].bind({'params': frozen[modality]})
      content_b = content_bm[:, COLUMN[modality]]
      pooled_bd = jnp.where(content_b[:, None], features.of(modality)[-1, :, 0], 0)
      found.append(unit(tower.project(pooled_bd.astype(tower.dtype))))
      there.append(present_bm[:, COLUMN[modality]] & content_b)
    there_bm = jnp.stack(there, axis=-1)
    scale = names.scale_of(self.towers)
    if self.context.space:
      params = {'params': variables['params']}
      vectors_bmd = self.context.apply(params, available_mean(found, there_bm))
      names_bkc = self._run_for_each(frozen, vectors_bmd)
      logits = [scale * jnp.einsum('bc,bkc->bk', x_bc, names_bkc) for x_bc in found]
      return Output(logits_bk=available_mean(logits, there_bm))
    names_kc = variables.get('class_vectors')
    if names_kc is None:
      names_kc = self.class_vectors(variables, frozen)
    logits = [scale * x_bc @ names_kc.T for x_bc in found]
    return Output(logits_bk=available_mean(logits, there_bm))

  def class_vectors(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """See `base.Defaults`: of length one, float32[K, C]."""
    if self.context.space:
      return None
    tower = self.modules['text'].bind({'params': frozen['text']})
    vectors = self.context.apply({'params': variables['params']})
    entering_ktd = names.embed(tower, self.sentences, vectors)
    return self._run(tower, entering_ktd, self.sentences.mask_kt)

  def _run_for_each(self, frozen, vectors_bmd):
    """Vectors of the classes for each example, of length one, [B, K, C]."""
    tower = self.modules['text'].bind({'params': frozen['text']})

    def embed(vectors_md):
      return names.embed(tower, self.sentences, vectors_md)

    entering_bktd = jax.vmap(embed)(vectors_bmd)
    b, k, t, d = entering_bktd.shape
    mask_nt = jnp.broadcast_to(self.sentences.mask_kt[None], (b, k, t)).reshape(b * k, t)
    names_nc = self._run(tower, entering_bktd.reshape(b * k, t, d), mask_nt)
    return names_nc.reshape(b, k, -1)

  def _run(self, tower, entering_ktd, mask_kt):
    """What the tower makes of sentences, of length one, [K, C]."""
    stop = tower.config.num_layers
    h_ktd, _ = tower.run(entering_ktd, mask_kt, start=0, stop=stop)
    return unit(readout.projected(tower, h_ktd, mask_kt))


def build(config, towers, *, num_classes, class_names=()) -> CoOp:
  """See `base.make_method`.

  Raises:
    UserError: the towers are no pair that shares a space, an example can have several labels, there
      are too many classes for a net, or a name is too long.
  """
  method, c, used = config.method, config[config.method], resolved.modalities(config)
  names.check_pair(towers, f'config.method: {method!r}', 'another method, or such towers')
  if config.dataset.multi_label:
    raise UserError(
      f'config.method: {method!r} chooses one of the class names, and examples can have several '
      "labels (config.dataset.multi_label); give another method, e.g. method='maple'"
    )
  has_net = method == CONDITIONAL
  if has_net and num_classes > MOST_CLASSES:
    raise UserError(
      f"config.method: 'cocoop' runs the text tower for each example and class, and there are "
      f"{num_classes} classes; give at most {MOST_CLASSES}, or method='coop'"
    )
  reads = {}
  for modality, tower in towers.items():
    depth, own = tower.config.num_layers, modality in used
    reads[modality] = Reads(
      (depth,) if own else (),
      run_from=depth if own else None,
      heads=tuple(tower.heads),
      pooled=True,
      names_from=0 if modality == 'text' else None,
    )
  text = towers['text']
  shape = (c.num_tokens, text.config.hidden_size)
  if c.get('per_class', False):
    shape = (num_classes, *shape)
  space = text.config.projection_size if has_net else 0
  found = names.around(text, class_names, c.num_tokens, c.name_position)
  modules = base.tower_modules(config, towers, reads)
  frozen_config = ml_collections.FrozenConfigDict(config)
  method = CoOp(frozen_config, towers, modules, reads, Context(shape, space), found)
  return dataclasses.replace(method, over_patterns=jax.lax.map) if has_net else method
