"""Heads by name: what `config.method` may say."""

from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.methods.late_fusion import LateFusionHead
from molt_jax.methods.molt import MoLTHead
from molt_jax.methods.parts.fusion import CLASSIFIERS
from molt_jax.methods.parts.imputation import Translator
from molt_jax.methods.parts.inputs import STRATEGIES, InputPair
from molt_jax.methods.parts.interface import MODALITIES


def _inputs(config, num_layers, image_width, text_width):
  return InputPair(
    num_layers=num_layers,
    image_width=image_width,
    text_width=text_width,
    norm=config.molt.input_norm,
    strategy=config.missing.strategy,
    dtype=jnp.dtype(config.compute_dtype),
  )


def _classifier(config, num_classes, axis):
  return CLASSIFIERS[config.classifier.kind](
    num_classes=num_classes,
    hidden=config.classifier.hidden,
    dropout=config.classifier.dropout,
    axis=axis,
    dtype=jnp.dtype(config.compute_dtype),
  )


def _alone(config, num_classes):
  """Classifiers of lone modalities; none where training shows no such rows, as one that has learned
  nothing would answer them.
  """
  shown = config.missing.views or config.missing.train_dropout > 0
  return (
    {m: _classifier(config, num_classes, 'common') for m in MODALITIES}
    if config.classifier.per_pattern and shown
    else None
  )


def _molt(config, num_classes, image_width, text_width):
  return MoLTHead(
    inputs=_inputs(config, config.molt.num_layers, image_width, text_width),
    classifier=_classifier(config, num_classes, 'common'),
    alone=_alone(config, num_classes),
    translator=Translator(config.molt.num_layers, config.molt.width)
    if STRATEGIES[config.missing.strategy].translates
    else None,
    width=config.molt.width,
    num_layers=config.molt.num_layers,
    num_heads=config.molt.num_heads,
    cross_attention=config.molt.cross_attention,
    layer_weights=config.molt.layer_weights,
    fusion_attention=config.fusion.attention,
    fusion_residual=config.fusion.residual,
    dtype=jnp.dtype(config.compute_dtype),
  )


def _late_fusion(config, num_classes, image_width, text_width):
  return LateFusionHead(
    inputs=_inputs(config, 1, image_width, text_width),
    classifier=_classifier(config, num_classes, 'embed'),
  )


METHODS: dict[str, Callable[..., nn.Module]] = {'molt': _molt, 'late_fusion': _late_fusion}


def make_head(
  config: ml_collections.ConfigDict, *, num_classes: int, image_width: int, text_width: int
) -> nn.Module:
  """The trainable head that `config.method` names.

  Call it as `head.apply({'params': p, 'statistics': s}, taps, present_bm, train=...,
  content_bm=..., row_weight_b=..., rngs={'dropout': key})`, with `mutable=['statistics']` in
  training; it returns a `HeadOutput`. `s` is empty unless `config.molt.input_norm` is `standardize`
  or `config.missing.strategy` is `translate`.

  Args:
    config: reads method, compute_dtype, molt, fusion, classifier and missing.strategy.
    num_classes: K.
    image_width: D_i, the width of the image tower.
    text_width: D_t, the width of the text tower. Both are given here so that the parameters never
      depend on which modality is present.

  Returns:
    A Linen module; `taps` is described by `interface.Taps`, `present_bm` is bool[B, 2] (image,
    text), `row_weight_b` [B] marks padding rows by zero. `content_bm` bool[B, 2] (default:
    present_bm) says whose taps may be read at all: training maps the head over several `present_bm`
    of one batch, and what depends on the taps alone is then computed once. Without it nothing of an
    absent modality is read.
  """
  return METHODS[config.method](config, num_classes, image_width, text_width)
