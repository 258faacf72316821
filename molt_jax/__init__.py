"""molt_jax: one robust image+text classifier on two frozen foundation models, that still answers
when the image or the text is absent.
"""

import os

# Before SciPy, whose LAPACK JAX calls, is loaded: on a CPU its threads fight with XLA's (an eigh of
# 64 x 64 took 60 times as long).
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

__version__ = '0.1.0'


def load(workdir, class_names=None):
  """Opens a trained classifier, the folder of a run or a file of `molt export`:
  `molt_jax.load(DIR).predict(image=..., text=...)`; see `molt_jax.predict.Predictor`.
  """
  from molt_jax import predict  # Importing the package alone must stay quick: no JAX.

  return predict.load(workdir, class_names)


def __getattr__(name):
  if name == 'fit':  # The module of this name, which can be called as its function `fit`.
    import importlib

    return importlib.import_module('molt_jax.fit')
  if name == 'MoltClassifier':
    from molt_jax import estimator  # It needs scikit-learn, which nothing else does.

    return estimator.MoltClassifier
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
