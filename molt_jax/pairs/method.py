"""A pair of towers under projection heads, as a method: what is trained are the towers that are not
frozen, the heads and the temperature.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.frozen import Reads
from molt_jax.methods.parts.interface import Output
from molt_jax.objectives import contrastive
from molt_jax.pairs.encoder import DualEncoder
from molt_jax.pairs.towers import has_own_projections, heads_of, load_weights, pretrained_scale
from molt_jax.towers.loading import TowerSpec


@dataclasses.dataclass(frozen=True)
class PairMethod:
  """A `DualEncoder` as a config wants it; see `methods.base.Method`.

  Attributes:
    encoder: the module.
    config: of pretraining.
    mesh: where weights of trained towers are loaded to.
    reads: modality -> what is read of its tower. Texts of a frozen tower are pooled once, and
      batches bring them as 'text_pooled'.
    pretrained_scale: what the cosines of a pair are multiplied by that is trained on with its own
      projections; None: `temperature.init` says so.
    over_patterns, loss_weights, branch_weights: see `Method`.
  """

  encoder: DualEncoder
  config: ml_collections.FrozenConfigDict
  mesh: jax.sharding.Mesh
  reads: Mapping[str, Reads]
  pretrained_scale: float | None = None
  over_patterns: Any = jax.vmap
  loss_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  branch_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def is_trained(self) -> bool:
    """See `Method`."""
    return True

  @property
  def sigmoid(self) -> None:
    """It is trained to choose among the texts of a batch, and not to say what belongs together."""
    return None

  @property
  def frozen(self) -> tuple[str, ...]:
    """The modalities whose towers are not trained."""
    return tuple(m for m in MODALITIES if self.config.backbones[m].freeze)

  @property
  def modules(self) -> dict[str, Any]:
    """See `Method`."""
    return {'image': self.encoder.image_tower, 'text': self.encoder.text_tower}

  def init(self, key: jax.Array) -> Any:
    """See `Method`; 'statistics' are those by which pooled texts are standardised, {} where the
    text tower is trained.
    """
    size = self.encoder.image_tower.config.image_size
    example = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    params = self.encoder.init(key, *example)['params']
    kept = {name: p for name, p in params.items() if name.removesuffix('_tower') not in self.frozen}
    width = self.encoder.text_tower.config.hidden_size
    statistics = {}
    if 'text' in self.frozen:
      statistics = {'mean': jnp.zeros(width), 'deviation': jnp.ones(width)}
    scale = jnp.log(jnp.float32(1 / self.config.temperature.init))
    return {'params': {**kept, 'log_scale': scale}, 'statistics': statistics}

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `Method`: trained towers begin with the weights of their files where the config says
    so, and a pair of CLIP with its own temperature.
    """
    del frozen
    params = variables['params']
    started = dict(params)
    for modality in MODALITIES:
      name = f'{modality}_tower'
      if name in params and self.config.backbones[modality].pretrained:
        loaded = load_weights(self.config, self.mesh, modality, 'float32')
        place = lambda new, old: jax.device_put(new, old.sharding)  # noqa: E731
        started[name] = jax.tree.map(place, loaded, params[name])
    if scale := self.pretrained_scale:
      place = params['log_scale'].sharding
      started['log_scale'] = jax.device_put(jnp.log(jnp.float32(scale)), place)
    return {**variables, 'params': started}

  def features(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Any:
    """See `Method`: batches bring what is kept."""
    del frozen, batch
    return {}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `Method`; every example has both modalities."""
    del features, present_bm
    key = training.rngs['patches'] if training else None
    embeddings = self.embed_batch(self.whole(variables, frozen), batch, key)
    scale = jnp.exp(variables['params']['log_scale'])
    return Output(embeddings=(embeddings, scale), statistics=variables['statistics'])

  def constrain(self, params: Any) -> Any:
    """See `Method`: the temperature stays above its least."""
    most = math.log(self.config.temperature.max_scale)
    return {**params, 'log_scale': jnp.minimum(params['log_scale'], most)}

  def whole(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables with the parameters of the frozen towers that are there."""
    towers = {f'{m}_tower': frozen[m] for m in self.frozen if frozen.get(m) is not None}
    return {**variables, 'params': {**variables['params'], **towers}}

  def run(self, variables: Mapping[str, Any], method: str, *args: Any) -> Any:
    """Runs a method of the encoder on whole variables."""
    params = {name: p for name, p in variables['params'].items() if name != 'log_scale'}
    return self.encoder.apply({'params': params}, *args, method=method)

  def embed_images(
    self,
    variables: Mapping[str, Any],
    image_bhwc: jax.Array,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns (embeddings float32[B, C] of length one, independent features or None, errors of
    decoding the images float32[B] or None).

    With a key, patches are left out at random, as `augment.image.kept` says.
    """
    pooled_bd, error_b = self.run(variables, 'pool_image', image_bhwc, key)
    return *self.run(variables, 'project_image', pooled_bd), error_b

  def embed_pooled_texts(
    self, variables: Mapping[str, Any], pooled_bd: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns (embeddings float32[B, C] of length one, independent features or None) of what
    `pool_text` returned.
    """
    if statistics := variables['statistics']:
      pooled_bd = (pooled_bd - statistics['mean'][None]) / statistics['deviation'][None]
    return self.run(variables, 'project_text', pooled_bd)

  def embed_texts(
    self, variables: Mapping[str, Any], tokens_bt: jax.Array, mask_bt: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """As `embed_pooled_texts`, of token ids."""
    return self.embed_pooled_texts(variables, self.run(variables, 'pool_text', tokens_bt, mask_bt))

  def embed_batch(
    self, variables: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array | None = None
  ) -> contrastive.PairEmbeddings:
    """Embeds what a batch of `data.pairs` has; with a key (in training), without the patches that
    `augment.image.kept` leaves out.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    image_bc, image_own_bc, image_error_b = self.embed_images(variables, batch['image'], keys[0])
    if 'text_pooled' in batch:
      text_bc, text_own_bc = self.embed_pooled_texts(variables, batch['text_pooled'])
    else:
      text_bc, text_own_bc = self.embed_texts(variables, batch['tokens'], batch['token_mask'])
    image_augmented_bc = image_own_augmented_bc = text_augmented_bc = text_own_augmented_bc = None
    if 'image_augmented' in batch:
      image_augmented_bc, image_own_augmented_bc, _ = self.embed_images(
        variables, batch['image_augmented'], keys[1]
      )
    if 'tokens_augmented' in batch:
      text_augmented_bc, text_own_augmented_bc = self.embed_texts(
        variables, batch['tokens_augmented'], batch['token_mask_augmented']
      )
    return contrastive.PairEmbeddings(
      image_bc=image_bc,
      text_bc=text_bc,
      image_augmented_bc=image_augmented_bc,
      text_augmented_bc=text_augmented_bc,
      image_independent_bc=image_own_bc,
      text_independent_bc=text_own_bc,
      image_independent_augmented_bc=image_own_augmented_bc,
      text_independent_augmented_bc=text_own_augmented_bc,
      image_error_b=image_error_b,
      weight_b=batch['weight'],
    )


def make_method(
  config: ml_collections.ConfigDict,
  towers: Mapping[str, TowerSpec],
  mesh: jax.sharding.Mesh,
) -> PairMethod:
  """Puts the towers under projection heads."""
  c = config.backbones
  modules, reads = {}, {}
  for modality, tower in towers.items():
    heads = heads_of(config, modality)
    last = tower.config.num_layers
    reads[modality] = Reads(run_from=0, heads=heads)
    if modality == 'text' and c.text.freeze:
      reads[modality] = Reads((last,), pooled=True)
    how = {} if c[modality].freeze else {'param_dtype': jnp.dtype('float32')}
    modules[modality] = tower.make_module(config.compute_dtype, c.attention, heads=heads, **how)
  needs = [field for name in objectives(config) for field in contrastive.NEEDS[name]]
  encoder = DualEncoder(
    image_tower=modules['image'],
    text_tower=modules['text'],
    width=config.projection.width,
    dtype=jnp.dtype(config.compute_dtype),
    own_projections=has_own_projections(config),
    independent=any('independent' in field for field in needs),
    reconstruct='reconstruction' in objectives(config),
    kept=config.augment.image.kept,
  )
  scale = pretrained_scale(config, towers)
  return PairMethod(encoder, ml_collections.FrozenConfigDict(config), mesh, reads, scale)


def objectives(config: Mapping[str, Any]) -> dict[str, float]:
  """Returns the objectives that count, name -> weight."""
  return {name: weight for name, weight in config.objective.items() if weight}


def load_frozen(method: PairMethod) -> dict[str, Any]:
  """Loads the frozen towers in the type of computation; None for one that is trained."""
  frozen = dict.fromkeys(MODALITIES)
  for modality in method.frozen:
    dtype = method.config.compute_dtype
    frozen[modality] = load_weights(method.config, method.mesh, modality, dtype)
  return frozen


@dataclasses.dataclass(frozen=True)
class PairLoss:
  """The objectives of pretraining, as `training.losses` describes an objective.

  Attributes:
    weights: objective -> weight.
  """

  weights: Mapping[str, float]

  def init(self, method: Any) -> Any:
    """Nothing is remembered from step to step."""
    del method
    return ()

  def present(self, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """The one pattern there is: every example has both modalities."""
    del key
    return jnp.ones((1, len(batch['weight']), len(MODALITIES)), bool)

  def __call__(self, out_v: Output, batch, present_vbm, memory, key):
    """Returns (loss, {'loss_NAME', 'scale'}, memory)."""
    del batch, present_vbm
    embeddings, scale = jax.tree.map(lambda x: x[0], out_v.embeddings)
    loss, parts = contrastive.pair_loss(embeddings, self.weights, scale, key)
    named = {f'loss_{name}': value for name, value in parts.items()}
    return loss, {**named, 'scale': scale}, memory
