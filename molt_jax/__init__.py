"""molt_jax: one robust image+text classifier on two frozen foundation models, that still answers when the image or the text is absent."""

__version__ = '0.1.0'


def load(workdir):
  """Opens a trained classifier: `molt_jax.load(DIR).predict(image=..., text=...)`; see `molt_jax.predict.Predictor`."""
  from molt_jax import predict  # Importing the package alone must stay quick: no JAX.
  return predict.load(workdir)
