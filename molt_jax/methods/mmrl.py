"""MMRL: representation tokens that are inserted in the upper layers of both towers (Guo and Gu,
CVPR 2025, "MMRL: Multi-Modal Representation Learning for Vision-Language Models").

Learned tokens R, shared by both towers, are mapped into each upper layer of each tower, where they
take the place of what the layer below made of them. The class token's feature f_c keeps what the
tower knows, the mean of the representation tokens, f_r, learns the task; each is compared with the
classes by its cosine times 100, and the two are trained side by side:

  L = alpha CE(f_c) + (1 - alpha) CE(f_r) + regularizer (1 - cos(f_c, f_c of the untouched tower))

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
import numpy as np
from flax import linen as nn

from molt_jax.data.modalities import COLUMN, MODALITIES
from molt_jax.errors import UserError
from molt_jax.features import frozen as frozen_towers
from molt_jax.features.frozen import Reads
from molt_jax.methods import base
from molt_jax.methods.parts import readout
from molt_jax.methods.parts.interface import Output, available_mean
from molt_jax.towers import stack
from molt_jax.towers.loading import TowerSpec

SCALE = 100.0  # Of cosines, as the authors have it.


class Representation(nn.Module):
  """What is trained: the tokens, their maps into the layers, the maps of their features, and the
  classes where these are learned.

  Attributes:
    num_tokens: K.
    width: of the tokens R.
    num_layers: modality -> layers that tokens are inserted in.
    widths: modality -> width of its tower.
    spaces: modality -> width of the space that its features are compared in.
    num_classes: learned class vectors of each modality; 0: none.
  """

  num_tokens: int
  width: int
  num_layers: Mapping[str, int]
  widths: Mapping[str, int]
  spaces: Mapping[str, int]
  num_classes: int

  @nn.compact
  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    """Returns modality -> {'inserts_lkd', 'projection_dc', 'classes_kc' where they are learned}."""
    small = nn.initializers.normal(0.02)
    tokens_kr = self.param('tokens', small, (self.num_tokens, self.width), jnp.float32)
    found = {}
    for m, layers in self.num_layers.items():
      width, space = self.widths[m], self.spaces[m]
      kernel_lrd = self.param(f'{m}_kernel', _alike, (layers, self.width, width), jnp.float32)
      bias_ld = self.param(f'{m}_bias', nn.initializers.zeros, (layers, width), jnp.float32)
      inserts_lkd = jnp.einsum('kr,lrd->lkd', tokens_kr, kernel_lrd) + bias_ld[:, None]
      init = nn.initializers.normal(width**-0.5)
      projection_dc = self.param(f'{m}_projection_kernel', init, (width, space), jnp.float32)
      found[m] = {'inserts_lkd': inserts_lkd, 'projection_dc': projection_dc}
      if self.num_classes:
        shape = (self.num_classes, space)
        found[m]['classes_kc'] = self.param(f'{m}_classes', small, shape, jnp.float32)
    return found


def _alike(key, shape, dtype):
  """The same draw for every layer."""
  limit = shape[1] ** -0.5
  one = jax.random.uniform(key, shape[1:], dtype, -limit, limit)
  return jnp.broadcast_to(one, shape)


@dataclasses.dataclass(frozen=True)
class MMRL(base.Defaults):
  """See the module and `base.Method`.

  Attributes:
    config: of the classifier.
    towers: modality -> description.
    modules: modality -> the tower's module, None for one that is not used.
    reads: modality -> what is read of it: the state that enters the first layer with tokens, and
      the last one, from which come the features of the untouched tower.
    representation: what is trained.
    class_tokens: (ids int32[K, T], mask bool[K, T]) of the classes' names; None: classes are
      learned.
    over_patterns: see `base.Method`; what is missing decides only what is averaged.
  """

  config: ml_collections.FrozenConfigDict
  towers: Mapping[str, TowerSpec]
  modules: Mapping[str, nn.Module | None]
  reads: Mapping[str, Reads]
  representation: Representation
  class_tokens: tuple[np.ndarray, np.ndarray] | None
  over_patterns: Any = jax.vmap

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return {'regularizer': self.config.mmrl.regularizer}

  @property
  def branch_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    alpha = self.config.mmrl.alpha
    return {'class': alpha, 'representation': 1 - alpha}

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`; 'statistics' are constants: what the untouched text tower makes of the
    classes' names.
    """
    params = self.representation.init(key)['params']
    statistics = {}
    if self.class_tokens is not None:
      count, length = self.class_tokens[0].shape
      tower = self.modules['text']
      entering = jnp.zeros((count, length, tower.config.hidden_size), tower.dtype)
      untouched = jnp.zeros((count, self.representation.spaces['text']))
      statistics = {'class_states': entering, 'class_untouched': untouched}
    return {'params': params, 'statistics': statistics}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`: runs the classes' names through the untouched text tower."""
    del frozen
    if self.class_tokens is None:
      return dict(variables)
    place = jax.tree.leaves(variables['params'])[0].sharding
    whole = frozen_towers.load_frozen(self.config, place.mesh, self.reads, ['text'])['text']
    tower = self.modules['text']
    tokens_kt, mask_kt = self.class_tokens

    def run(params):
      bound = tower.bind({'params': params})
      entering, last = bound(tokens_kt, mask_kt, states=self.reads['text'].states)
      return entering, readout.projected(bound, last, mask_kt)

    entering, untouched = jax.jit(run)(whole)
    found = {'class_states': entering, 'class_untouched': untouched.astype(jnp.float32)}
    return {**variables, 'statistics': jax.device_put(found, place)}

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
        logits.setdefault(name, []).append(SCALE * _unit(x_bc) @ _unit(classes[modality]).T)
      regularizers.append(1 - jnp.sum(_unit(class_bc) * _unit(untouched_bc), axis=-1))
      there.append(present_bm[:, COLUMN[modality]] & content_b)
    there_bm = jnp.stack(there, axis=-1)
    regularizer_b = jnp.sum(jnp.stack(regularizers, axis=-1), axis=-1, where=there_bm)
    branches = {name: available_mean(parts, there_bm) for name, parts in logits.items()}
    alpha = self.config.mmrl.alpha
    return Output(
      logits_bk=alpha * branches['class'] + (1 - alpha) * branches['representation'],
      branches_bk=branches,
      losses_b={'regularizer': regularizer_b + apart},
    )

  def _features(self, modality, trained, params, features, content_b):
    """Returns f_c, f_r and the untouched tower's f_c, float32[B, C] each, of one modality."""
    tower = self.modules[modality].bind({'params': params})
    reads = self.reads[modality]
    found_sbtd = features.of(modality)
    found_sbtd = jnp.where(content_b[None, :, None, None], found_sbtd, 0).astype(tower.dtype)
    entering_btd, last_btd = found_sbtd[0], found_sbtd[-1]
    inserts_lkd, count = trained['inserts_lkd'].astype(tower.dtype), self.config.mmrl.num_tokens
    how = {'start': reads.run_from, 'stop': tower.config.num_layers, 'inserts': inserts_lkd}
    mask_bt = features.text_mask_bt & content_b[:, None] if modality == 'text' else None
    untouched_bc = readout.projected(tower, last_btd, mask_bt)
    if modality == 'text' and tower.is_causal:
      # Behind the text: what stands before them, the text's own readout, stays as it was.
      lengths_b = stack.lengths(mask_bt)
      inserted_bkd = _spread(inserts_lkd[0], len(lengths_b))
      h_bpd, new_lengths_b = stack.insert_behind(entering_btd, lengths_b, inserted_bkd)
      mask_bp = jnp.arange(h_bpd.shape[1])[None] < new_lengths_b[:, None]

      def replace(h_bpd, new_kd):
        return stack.replace_behind(h_bpd, lengths_b, _spread(new_kd, len(h_bpd)))

      h_bpd, _ = tower.run(h_bpd, mask_bp, before=replace, **how)
      tokens_bkd = stack.read_behind(h_bpd, lengths_b, count)
      class_bc = untouched_bc
    else:
      h_btd, tokens_bkd = self._run_behind_first(tower, entering_btd, mask_bt, how)
      class_bc = readout.projected(tower, h_btd, mask_bt)
    mean_bd = jnp.sum(tower.norm_tokens(tokens_bkd).astype(jnp.float32), axis=1) / max(count, 1)
    rep_bc = jnp.einsum('bd,dc->bc', mean_bd, trained['projection_dc'], precision='highest')
    return class_bc.astype(jnp.float32), rep_bc, untouched_bc.astype(jnp.float32)

  def _run_behind_first(self, tower, entering_btd, mask_bt, how):
    """Runs the upper layers with tokens behind the first one (class token, or begin of text; in an
    image tower without a class token it makes no difference where they are).

    Returns:
      (what leaves the last layer without them, they themselves).
    """
    count = self.config.mmrl.num_tokens
    first, rest = entering_btd[:, :1], entering_btd[:, 1:]
    inserted = _spread(how['inserts'][0], len(first))
    h_bpd = jnp.concatenate([first, inserted, rest], axis=1)
    if mask_bt is not None:
      own = jnp.ones((len(mask_bt), count), bool)
      mask_bt = jnp.concatenate([mask_bt[:, :1], own, mask_bt[:, 1:]], axis=1)

    def replace(h_bpd, new_kd):
      return h_bpd.at[:, 1 : 1 + count].set(_spread(new_kd, len(h_bpd)))

    h_bpd, _ = tower.run(h_bpd, mask_bt, before=replace, **how)
    own = jnp.concatenate([h_bpd[:, :1], h_bpd[:, 1 + count :]], axis=1)
    return own, h_bpd[:, 1 : 1 + count]

  def _classes(self, trained, variables, frozen):
    """Returns (modality -> class vectors float32[K, C], how far they are from the untouched
    tower's, a scalar).
    """
    if self.class_tokens is None:
      return {m: part['classes_kc'] for m, part in trained.items()}, 0.0
    tower = self.modules['text'].bind({'params': frozen['text']})
    _, mask_kt = self.class_tokens
    statistics = jax.lax.stop_gradient(variables['statistics'])
    inserts_lkd = trained['text']['inserts_lkd'].astype(tower.dtype)
    stop = tower.config.num_layers
    how = {'start': self.reads['text'].run_from, 'stop': stop, 'inserts': inserts_lkd}
    h_ktd, _ = self._run_behind_first(tower, statistics['class_states'], mask_kt, how)
    names_kc = readout.projected(tower, h_ktd, mask_kt).astype(jnp.float32)
    untouched_kc = statistics['class_untouched']
    apart = 1 - jnp.mean(jnp.sum(_unit(names_kc) * _unit(untouched_kc), axis=-1))
    return dict.fromkeys(self.reads, names_kc), apart


def _spread(new_kd: jax.Array, count: int) -> jax.Array:
  return jnp.broadcast_to(new_kd[None], (count, *new_kd.shape))


def _unit(x_bc: jax.Array) -> jax.Array:
  """Rows of length one."""
  return x_bc * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_bc), axis=-1, keepdims=True), 1e-12))


def build(config, towers, *, num_classes, class_names=()) -> MMRL:
  """See `base.make_method`.

  Raises:
    UserError: no layer is left for tokens, or class names are asked for without a pair of towers
      that share a space.
  """
  c = config.mmrl
  shared = readout.share_a_space(towers)
  if c.classes == 'names' and not shared:
    raise UserError(
      "config.mmrl.classes: 'names' needs an image and a text tower with projections into one "
      'space, as a CLIPModel has them; give head, or such towers'
    )
  by_name = shared and c.classes != 'head'
  reads, num_layers, spaces = {}, {}, {}
  for modality, tower in towers.items():
    depth = tower.config.num_layers
    first = min(round(c.first_layer * depth), depth - 1)
    heads = tuple(head for head in tower.heads if head == 'pool' or (shared and by_name))
    reads[modality] = Reads((first, depth), run_from=first, heads=heads)
    num_layers[modality] = depth - first
    projected = 'projection' in heads
    spaces[modality] = tower.config.projection_size if projected else tower.config.hidden_size
  representation = Representation(
    num_tokens=c.num_tokens,
    width=c.width,
    num_layers=num_layers,
    widths={modality: tower.config.hidden_size for modality, tower in towers.items()},
    spaces=spaces,
    num_classes=0 if by_name else num_classes,
  )
  modules = base.tower_modules(config, towers, reads)
  tokens = None
  if by_name:
    most = config.text.max_tokens
    tokens = readout.class_tokens(towers['text'], class_names, c.template, most)
  frozen_config = ml_collections.FrozenConfigDict(config)
  return MMRL(frozen_config, towers, modules, reads, representation, tokens)
