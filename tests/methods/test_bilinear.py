"""Factorised bilinear pooling, against the bilinear form that it factorises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.methods.parts.fusion import BilinearPooling

LAYERS, BATCH, WIDTH, FACTORS = 2, 6, 4, 3


def test_each_channel_is_a_bilinear_form_and_a_missing_factor_is_one():
  rng = np.random.default_rng(0)
  image_lbc, text_lbc = rng.normal(size=(2, LAYERS, BATCH, WIDTH)).astype(np.float32)
  available_bm = np.array([[1, 1], [1, 1], [1, 0], [0, 1], [0, 0], [1, 1]], bool)
  module = BilinearPooling(WIDTH, FACTORS, jnp.float32)
  params = nn.unbox(module.init(jax.random.key(0), image_lbc, text_lbc, available_bm))['params']
  draw = np.random.default_rng(1)
  params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)
  # Nothing of what is missing is read.
  image_lbc[:, 3:5], text_lbc[:, [2, 4]] = np.nan, np.inf
  found = module.apply({'params': params}, image_lbc, text_lbc, available_bm)
  for layer in range(LAYERS):
    for b in range(BATCH):
      expected_c = np.zeros(WIDTH)
      for j in range(FACTORS):
        product_c = np.ones(WIDTH)
        for m, (name, x) in enumerate((('image', image_lbc), ('text', text_lbc))):
          if available_bm[b, m]:
            kernel = params[name]['kernel'][layer].reshape(WIDTH, WIDTH, FACTORS)[:, :, j]
            bias = params[name]['bias'][layer].reshape(WIDTH, FACTORS)[:, j]
            product_c *= x[layer, b].astype(np.float64) @ kernel + bias
        expected_c += product_c if available_bm[b].any() else 0
      np.testing.assert_allclose(found[layer, b], expected_c, rtol=1e-4, atol=1e-4)
