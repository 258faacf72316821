"""Class prototypes: logits are cosines of a feature with one vector of each class, times a scale.

Training makes each example's own classes harder by an angle (ArcFace: Deng et al., CVPR 2019), a
larger one where a modality is missing, and draws together the prototypes that a class has for
different missing patterns and modalities (SupCon: Khosla et al., NeurIPS 2020). Inference reads the
bare cosines.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from molt_jax.methods.parts.interface import unit

# Least square of a sine: at |cos| = 1 the square root has no finite gradient.
_LEAST_SQUARE = 1e-4


class Prototypes(nn.Module):
  """Dropout, then the cosines with one prototype of each class times `scale`.

  Attributes:
    num_classes: K.
    scale: s.
    dropout: rate.
    axis: logical name of C.
  """

  num_classes: int
  scale: float
  dropout: float
  axis: str

  @nn.compact
  def __call__(self, x_bc: jax.Array, *, train: bool) -> jax.Array:
    """[B, C] -> float32[B, K]; zero for a feature of zeros."""
    x_bc = nn.Dropout(self.dropout, deterministic=not train)(x_bc.astype(jnp.float32))
    init = nn.with_logical_partitioning(nn.initializers.glorot_normal(), (self.axis, 'classes'))
    kernel_ck = self.param('kernel', init, (x_bc.shape[-1], self.num_classes), jnp.float32)
    cosine_bk = jnp.matmul(unit(x_bc), unit(kernel_ck, axis=0), precision='highest')
    return self.scale * cosine_bk

  def vectors(self) -> jax.Array:
    """The prototypes, float32[K, C], of a module that was called before."""
    return meta.unbox(self.get_variable('params', 'kernel')).T


@dataclasses.dataclass(frozen=True)
class Margins:
  """How training changes the logits of `Prototypes`.

  Attributes:
    scale: s.
    complete, missing: angles of examples with both modalities, and with one.
  """

  scale: float
  complete: float
  missing: float

  def __call__(self, logits_bk: jax.Array, label: jax.Array, complete_b: jax.Array) -> jax.Array:
    """Returns the logits with those of each example's own classes lowered.

    Args:
      logits_bk: as `Prototypes` returns them.
      label: integers [B], negative where it is not known, or [B, K] of zeros and ones.
      complete_b: bool[B], whether the example has both modalities.
    """
    own_bk = jax.nn.one_hot(label, logits_bk.shape[1]) if label.ndim == 1 else label
    angle_b1 = jnp.where(complete_b, self.complete, self.missing)[:, None]
    cosine_bk = logits_bk / self.scale
    return self.scale * jnp.where(own_bk > 0, shifted(cosine_bk, angle_b1), cosine_bk)


def shifted(cosine: jax.Array, angle: jax.Array) -> jax.Array:
  """cos(theta + m); from theta = pi - m on, where that would rise again, cos(theta) - m sin(m).

  Args:
    cosine: cos(theta), any shape.
    angle: m from 0 to pi, of a shape that broadcasts.
  """
  sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), _LEAST_SQUARE))
  turned = cosine * jnp.cos(angle) - sine * jnp.sin(angle)
  return jnp.where(cosine > -jnp.cos(angle), turned, cosine - angle * jnp.sin(angle))


def supervised_contrast(prototypes_pkc: jax.Array) -> jax.Array:
  """SupCon at temperature 1 over the prototypes of all classes: those of one class are positives.

    L = -1/(PK) sum_a 1/(P-1) sum_p log( exp(<a, p>) / sum_{b not a} exp(<a, b>) )

  Args:
    prototypes_pkc: P > 1 of each of K classes; they are normalised here.

  Returns:
    Scalar, float32.
  """
  count, num_classes, _ = prototypes_pkc.shape
  z_nc = unit(prototypes_pkc).reshape(count * num_classes, -1)
  product_nn = jnp.matmul(z_nc, z_nc.T, precision='highest')
  label_n = jnp.tile(jnp.arange(num_classes), count)
  other_nn = ~jnp.eye(len(z_nc), dtype=bool)
  own_nn = (label_n[:, None] == label_n[None]) & other_nn
  log_sum_n1 = jax.nn.logsumexp(product_nn, axis=1, where=other_nn, keepdims=True)
  return jnp.mean(jnp.sum(log_sum_n1 - product_nn, axis=1, where=own_nn) / (count - 1))


def contrast_of(classifiers: list[nn.Module], num_examples: int) -> dict[str, jax.Array]:
  """Returns `Output.losses_b` of prototypes: {'supcon': float32[B]}, the same for each example; {}
  where there is one of each class.
  """
  if len(classifiers) < 2:
    return {}
  prototypes_pkc = jnp.stack([classifier.vectors() for classifier in classifiers])
  return {'supcon': jnp.broadcast_to(supervised_contrast(prototypes_pkc), (num_examples,))}
