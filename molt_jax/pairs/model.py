"""A pair of towers, put together from a pretraining config: architectures, weights, the frozen
part, embeddings of images and texts.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax import errors
from molt_jax.data import examples, transforms
from molt_jax.errors import UserError
from molt_jax.objectives import contrastive
from molt_jax.pairs.encoder import TOWERS, DualEncoder
from molt_jax.runtime import atomic, cli, npz, sharding
from molt_jax.towers import loading
from molt_jax.towers.clip import ClipVision, ClipVisionConfig
from molt_jax.towers.preprocessing import ImageSpec

SCRATCH = 'from scratch'
KINDS = {'llama': 'text', 'clip': 'clip_text'}  # config.backbones.text.kind -> kind of tower.
# A batch of texts is padded to a multiple of this many tokens, so that few programs are compiled.
TEXT_STEP = 8


@dataclasses.dataclass(frozen=True)
class DualModel:
  """A `DualEncoder` as a config wants it; holds no arrays.

  Attributes:
    encoder: the module that computes.
    trained: the same in float32, whose parameters are the trained ones.
    frozen: names of the towers whose parameters are an argument of the step.
    initial_scale: 1 / tau at the start.
    dtype: of computation in the towers.
  """

  encoder: DualEncoder
  trained: DualEncoder
  frozen: tuple[str, ...]
  initial_scale: float
  dtype: Any

  def init(self, key: jax.Array, text_statistics: Mapping[str, np.ndarray]) -> Any:
    """Returns boxed variables without the frozen towers: 'params', and 'statistics' by which pooled
    texts are standardised ({}: they are not).
    """
    size = self.trained.image_tower.config.image_size
    example = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    params = self.trained.init(key, *example)['params']
    return {
      'params': {
        **{name: p for name, p in params.items() if name.removesuffix('_tower') not in self.frozen},
        'log_scale': jnp.log(jnp.float32(self.initial_scale)),
      },
      'statistics': {name: jnp.asarray(x_d) for name, x_d in text_statistics.items()},
    }

  def __call__(self, variables: Mapping[str, Any], method: str, *args: jax.Array) -> Any:
    """Runs a method of the encoder; `variables` has 'params' of everything and 'statistics'."""
    params = variables['params']
    cast = {
      f'{t}_tower': jax.tree.map(lambda p: p.astype(self.dtype), params[f'{t}_tower'])
      for t in TOWERS
      if f'{t}_tower' in params
    }
    params = {name: p for name, p in {**params, **cast}.items() if name != 'log_scale'}
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
    pooled_bd, error_b = self(variables, 'pool_image', image_bhwc, key)
    return *self(variables, 'project_image', pooled_bd), error_b

  def embed_pooled_texts(
    self, variables: Mapping[str, Any], pooled_bd: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns (embeddings float32[B, C] of length one, independent features or None) of what
    `pool_text` returned.
    """
    if statistics := variables['statistics']:
      pooled_bd = (pooled_bd - statistics['mean'][None]) / statistics['deviation'][None]
    return self(variables, 'project_text', pooled_bd)

  def embed_texts(
    self, variables: Mapping[str, Any], tokens_bt: jax.Array, mask_bt: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """As `embed_pooled_texts`, of token ids."""
    return self.embed_pooled_texts(variables, self(variables, 'pool_text', tokens_bt, mask_bt))

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


def text_kind(config: ml_collections.ConfigDict) -> str:
  """Returns the kind of the text tower, as `backbones.weights` names it."""
  return KINDS[config.backbones.text.kind]


def describe_towers(config: ml_collections.ConfigDict) -> dict[str, loading.TowerSpec]:
  """Returns both towers without their weights; one without a path is what the config's numbers
  say.
  """
  c = config.backbones
  image = (
    loading.describe_tower(c.image.path, kind='image') if c.image.path else _scratch_tower(c.image)
  )
  return {'image': image, 'text': loading.describe_tower(c.text.path, kind=text_kind(config))}


def _scratch_tower(c: ml_collections.ConfigDict) -> loading.TowerSpec:
  architecture = ClipVisionConfig(
    hidden_size=c.width,
    intermediate_size=4 * c.width,
    num_layers=c.layers,
    num_heads=c.heads,
    image_size=c.size,
    patch_size=c.patch,
    hidden_act='quick_gelu',
    layer_norm_eps=1e-5,
  )
  sha256 = hashlib.sha256(
    json.dumps(dataclasses.asdict(architecture), sort_keys=True).encode()
  ).hexdigest()
  return loading.TowerSpec(
    architecture, {'path': SCRATCH, 'sha256': sha256}, None, ImageSpec(c.size)
  )


def make_model(
  config: ml_collections.ConfigDict, towers: Mapping[str, loading.TowerSpec]
) -> DualModel:
  """Puts the towers under projection heads."""

  def encoder(dtype):
    attention = config.backbones.attention
    return DualEncoder(
      image_tower=ClipVision(towers['image'].config, dtype, attention, with_pool=True),
      text_tower=loading.MODULES[text_kind(config)](towers['text'].config, dtype, attention),
      width=config.projection.width,
      dtype=jnp.dtype(config.compute_dtype),
      independent=any(
        'independent' in field for name in objectives(config) for field in contrastive.NEEDS[name]
      ),
      reconstruct='reconstruction' in objectives(config),
      kept=config.augment.image.kept,
    )

  frozen = tuple(t for t in TOWERS if config.backbones[t].freeze)
  dtype = jnp.dtype(config.compute_dtype)
  return DualModel(
    encoder=encoder(dtype),
    trained=encoder(jnp.dtype('float32')),
    frozen=frozen,
    initial_scale=1 / config.temperature.init,
    dtype=dtype,
  )


def objectives(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Returns the objectives that count, name -> weight."""
  return {name: weight for name, weight in config.objective.items() if weight}


def load_weights(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, tower: str, dtype: Any
) -> Any:
  """Loads the parameters of the named tower from its path."""
  kind = 'image' if tower == 'image' else text_kind(config)
  c = config.backbones
  return loading.load_tower(
    c[tower].path,
    kind=kind,
    dtype=dtype,
    attention=c.attention,
    shardings=sharding.param_shardings(mesh),
    with_pool=kind == 'image',
  ).params


# ---- Texts that a frozen tower reads -------------------------------------------------------------


def pool_texts(
  model: DualModel,
  variables: Mapping[str, Any],
  preprocess: examples.Preprocess,
  texts: Sequence[str],
  *,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """Runs the text tower once for each different text; returns float32[N, D], what the text head
  reads.
  """
  unique = sorted(set(texts))
  encoded = {
    text: np.asarray(preprocess.encode(text, preprocess.max_tokens), np.int32) for text in unique
  }
  unique.sort(key=lambda text: len(encoded[text]))
  pool = jax.jit(
    lambda variables, tokens_bt, mask_bt: model(variables, 'pool_text', tokens_bt, mask_bt)
  )
  pooled = {}
  with cli.progress('reading texts', len(unique), 'texts') as bar:
    for start in range(0, len(unique), batch_size):
      part = unique[start : start + batch_size]
      length = min(-(-len(encoded[part[-1]]) // TEXT_STEP) * TEXT_STEP, preprocess.max_tokens)
      rows = [
        transforms.pad_tokens(encoded[text], max_tokens=length, pad_id=preprocess.pad_id)
        for text in part
      ]
      rows += [transforms.pad_tokens([], max_tokens=length, pad_id=preprocess.pad_id)] * (
        batch_size - len(part)
      )
      batch = sharding.put_batch(
        dict(zip(('tokens', 'mask'), map(np.stack, zip(*rows, strict=True)), strict=True)), mesh
      )
      pooled |= dict(
        zip(part, np.asarray(pool(variables, batch['tokens'], batch['mask'])), strict=False)
      )
      bar.advance(len(part))
  return np.stack([pooled[text] for text in texts]).astype(np.float32)


def stored_texts(
  config: ml_collections.ConfigDict, tower: loading.TowerSpec, texts: Sequence[str], compute: Any
) -> np.ndarray:
  """Returns `compute()`, the pooled states of these texts by the frozen tower, from
  `input.text_store` if they are there; else puts them there.
  """
  if not config.input.text_store:
    return compute()
  tokens_of = tower.identity.get('input_sha256')
  named = [
    tower.identity['sha256'],
    tokens_of,
    config.compute_dtype,
    config.text.max_tokens,
    list(texts),
  ]
  digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
  path = pathlib.Path(config.input.text_store).expanduser() / f'{digest}.npz'
  failed = f'config.input.text_store: {str(path.parent)!r} cannot be written'
  with errors.explained(failed):
    if path.exists():
      return _read_pooled(path, len(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
  atomic.try_out(path.parent, tried=failed)
  pooled_nd = compute()
  with atomic.writing(path, tried=failed) as file:
    np.savez(file, pooled_nd=pooled_nd)
  return pooled_nd


def _read_pooled(path: pathlib.Path, count: int) -> np.ndarray:
  try:
    pooled_nd = npz.read_arrays(path)['pooled_nd']
    if pooled_nd.ndim != 2 or len(pooled_nd) != count:
      raise ValueError('another shape')
  except Exception as error:  # Of any type: a damaged file leads anywhere.
    raise UserError(f'{path} is cut or damaged; delete it, and it is computed again') from error
  return pooled_nd


def check_finite(x_nc: np.ndarray, what: str) -> None:
  """Raises UserError unless embeddings are finite, before anything is scored by them."""
  broken_n = ~np.isfinite(x_nc).all(axis=tuple(range(1, x_nc.ndim)))
  if broken_n.any():
    raise UserError(
      f'the embeddings of {broken_n.sum()} of {len(x_nc)} {what} are not finite, and no score is '
      'made of them; check the towers (config.backbones)'
    )


def statistics(pooled_nd: np.ndarray) -> dict[str, np.ndarray]:
  """Mean and deviation of each channel: a few channels of a LLaMA are thousands of times as large
  as the others.
  """
  deviation_d = pooled_nd.std(axis=0, dtype=np.float64)
  return {
    'mean': pooled_nd.mean(axis=0, dtype=np.float64).astype(np.float32),
    'deviation': np.where(deviation_d > 0, deviation_d, 1.0).astype(np.float32),
  }


# ---- In use --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TowerPair:
  """A trained pair, numpy in and out.

  Attributes:
    model: the modules.
    variables: 'params' of everything and 'statistics'.
    preprocess: how images and texts become arrays.
    batch_size: of a call to the devices.
    mesh: where to compute.
  """

  model: DualModel
  variables: Mapping[str, Any]
  preprocess: examples.Preprocess
  batch_size: int
  mesh: jax.sharding.Mesh

  def embed_images(self, images: Sequence[Any]) -> np.ndarray:
    """Embeds images: paths, PIL images, uint8 arrays [H, W, 3], or file contents (bytes). Returns
    float32[N, C], rows of length one.
    """
    return self._images(
      images,
      jax.jit(lambda variables, image_bhwc: self.model.embed_images(variables, image_bhwc)[0]),
    )

  def image_features(self, images: Sequence[Any], *, num_layers: int = 4) -> np.ndarray:
    """What a linear probe reads: class token and mean patch token of each of the tower's last
    layers, side by side.

    Returns:
      float32[N, num_layers * 2 * D].
    """
    return self._images(
      images,
      jax.jit(
        lambda variables, image_bhwc: self.model(
          variables, 'image_features', image_bhwc, num_layers
        )
      ),
    )

  def image_tokens(self, images: Sequence[Any]) -> np.ndarray:
    """Every token of the tower's last layer, laid flat: what it knows of places, which the means of
    `image_features` lose.

    Returns:
      float32[N, I * D], I = 1 + number of patches.
    """
    return self._images(
      images,
      jax.jit(lambda variables, image_bhwc: self.model(variables, 'image_tokens', image_bhwc)),
    )

  def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts. Returns float32[N, C], rows of length one."""
    pooled_nd = pool_texts(
      self.model, self.variables, self.preprocess, texts, batch_size=self.batch_size, mesh=self.mesh
    )
    embedded_nc = self.embed_pooled_texts(pooled_nd)
    check_finite(embedded_nc, 'texts')
    return embedded_nc

  def embed_pooled_texts(self, pooled_nd: np.ndarray) -> np.ndarray:
    """As `embed_texts`, of what `pool_texts` returned."""
    return self._batches(
      pooled_nd,
      jax.jit(lambda variables, pooled_bd: self.model.embed_pooled_texts(variables, pooled_bd)[0]),
    )

  def _images(self, images, function):
    parts = []
    for start in range(
      0, len(images), self.batch_size
    ):  # Decoded a batch at a time: all at once could be gigabytes.
      image_bhwc = np.stack(
        [self._pixels(image) for image in images[start : start + self.batch_size]]
      )
      parts.append(self._batches(image_bhwc, function))
    embedded_n = np.concatenate(parts)
    check_finite(embedded_n, 'images')
    return embedded_n

  def _pixels(self, image):
    image = transforms.decode(image) if isinstance(image, bytes) else image
    return examples.single_example(self.preprocess, image=image)['image']

  def _batches(self, x_n: np.ndarray, function) -> np.ndarray:
    """Maps over rows in batches of one size, the last one filled up with zeros."""
    parts = []
    for start in range(0, len(x_n), self.batch_size):
      part = x_n[start : start + self.batch_size]
      full = np.concatenate(
        [part, np.zeros((self.batch_size - len(part), *part.shape[1:]), part.dtype)]
      )
      parts.append(
        np.asarray(function(self.variables, sharding.put_batch({'x': full}, self.mesh)['x']))[
          : len(part)
        ]
      )
    return np.concatenate(parts)
