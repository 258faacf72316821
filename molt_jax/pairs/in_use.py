"""A trained pair of towers in use: NumPy in and out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from molt_jax.data import examples, transforms
from molt_jax.errors import UserError
from molt_jax.features.inputs import InputBatches, text_input
from molt_jax.pairs.method import PairMethod
from molt_jax.runtime import compiling, console, sharding


def check_finite(x_nc: np.ndarray, what: str) -> None:
  """Raises UserError unless embeddings are finite, before anything is scored by them."""
  broken_n = ~np.isfinite(x_nc).all(axis=tuple(range(1, x_nc.ndim)))
  if broken_n.any():
    raise UserError(
      f'the embeddings of {broken_n.sum()} of {len(x_nc)} {what} are not finite, and no score is '
      'made of them; check the towers (config.backbones)'
    )


def statistics(pooled_nd: np.ndarray) -> dict[str, np.ndarray]:
  """Mean and standard deviation of each channel: a few channels of a LLaMA are thousands of times
  as large as the others.
  """
  std_d = pooled_nd.std(axis=0, dtype=np.float64)
  return {
    'mean': pooled_nd.mean(axis=0, dtype=np.float64).astype(np.float32),
    'deviation': np.where(std_d > 0, std_d, 1.0).astype(np.float32),
  }


def pool_texts(
  method: PairMethod,
  variables: Mapping[str, Any],
  preprocess: examples.Preprocess,
  texts: Sequence[str],
  *,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """Runs the text tower once for each different text.

  Args:
    method: the pair.
    variables: whole ones, with the text tower's parameters.
    preprocess: how a text becomes tokens.
    texts: each has tokens.
    batch_size, mesh: of a call to the devices.

  Returns:
    float32[N, D], what the text head reads.

  Raises:
    UserError: a text has no tokens.
  """
  inputs = [text_input(text, preprocess) for text in texts]
  empty = [text for text, x in zip(texts, inputs, strict=True) if x is None]
  if empty:
    raise UserError(f'the text {empty[0]!r} has no tokens: leave it out')
  unique = {x.key: x for x in inputs}
  batching = InputBatches(batch_size, 1, preprocess)

  def pool(variables, tokens_bt, mask_bt):
    return method.run(variables, 'pool_text', tokens_bt, mask_bt)

  pool, pooled = compiling.jit(pool), {}
  with console.progress('reading texts', len(unique), 'texts') as bar:
    for cut in batching.cut(list(unique.values()), 'text'):
      batch = batching.prepare(cut, 'text')
      arrays = {name: batch.arrays[name] for name in ('tokens', 'token_mask')}
      arrays = sharding.put_batch(arrays, mesh)
      pooled_bd = np.asarray(pool(variables, arrays['tokens'], arrays['token_mask']))
      pooled |= dict(zip(batch.keys, pooled_bd, strict=False))
      bar.advance(len(cut))
  return np.stack([pooled[x.key] for x in inputs]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TowerPair:
  """A trained pair, numpy in and out.

  Attributes:
    model: a `PairMethod` or a `PublishedPair`.
    variables: 'params' of everything and 'statistics'.
    preprocess: how images and texts become arrays.
    batch_size: of a call to the devices.
    mesh: where to compute.
  """

  model: PairMethod
  variables: Mapping[str, Any]
  preprocess: examples.Preprocess
  batch_size: int
  mesh: jax.sharding.Mesh

  @property
  def sigmoid(self) -> tuple[float, float] | None:
    """(scale, bias) where the sigmoid of scale * cosine + bias is the probability that an image and
    a text belong together.
    """
    return self.model.sigmoid

  def embed_images(self, images: Sequence[Any]) -> np.ndarray:
    """Embeds images: paths, PIL images, uint8 arrays [H, W, 3], or file contents (bytes). Returns
    float32[N, C], rows of length one.
    """
    return self._images(
      images,
      compiling.jit(
        lambda variables, image_bhwc: self.model.embed_images(variables, image_bhwc)[0]
      ),
    )

  def image_features(self, images: Sequence[Any], *, num_layers: int = 4) -> np.ndarray:
    """What a linear probe reads: class token and mean patch token of each of the tower's last
    layers, side by side.

    Returns:
      float32[N, num_layers * 2 * D].
    """
    return self._images(
      images,
      compiling.jit(
        lambda variables, image_bhwc: self.model.run(
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
      compiling.jit(
        lambda variables, image_bhwc: self.model.run(variables, 'image_tokens', image_bhwc)
      ),
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
      compiling.jit(
        lambda variables, pooled_bd: self.model.embed_pooled_texts(variables, pooled_bd)[0]
      ),
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
