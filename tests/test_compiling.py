"""Options of the compiler: of its backend, and only those that it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.runtime import compiling


@pytest.fixture
def unread(monkeypatch):
  """Options are looked up anew, here and after, and the tests' own XLA_FLAGS are not there."""
  monkeypatch.delenv('XLA_FLAGS')
  lookups = (compiling._usual, compiling._quick)
  for lookup in lookups:
    lookup.cache_clear()
  yield
  for lookup in lookups:
    lookup.cache_clear()


def test_a_program_that_runs_once_is_the_same_function_and_compiled_once():
  traced = []

  @compiling.jit_once
  def log_of_sum(x_n):
    """Says what it does."""
    traced.append(x_n.shape)
    return jnp.log(jnp.sum(jnp.exp(x_n)))

  x_n = np.linspace(-3, 3, 7, dtype=np.float32)
  for _ in range(2):
    np.testing.assert_allclose(log_of_sum(x_n), np.log(np.sum(np.exp(x_n))), rtol=1e-6)
  assert traced == [(7,)]
  assert (log_of_sum.__name__, log_of_sum.__doc__) == ('log_of_sum', 'Says what it does.')


def test_other_backends_and_flags_go_before(unread, monkeypatch):
  assert compiling._usual() and compiling._quick()
  for lookup in (compiling._usual, compiling._quick):
    lookup.cache_clear()
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=2')
  assert compiling._usual() is None
  monkeypatch.delenv('XLA_FLAGS')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert compiling._quick() is None


def test_a_gpu_does_not_try_out_its_kernels(unread, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(compiling, '_has', lambda name, value: True)
  assert compiling._usual() == compiling._quick() == dict.fromkeys(compiling._GPU, False)
  compiling._usual.cache_clear()
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_enable_triton_gemm=true')
  assert compiling._usual() is None


def test_options_that_a_version_does_not_have_are_left_out(unread, monkeypatch):
  known = {'xla_backend_optimization_level': 1}
  options = {'cpu': known | {'no_option_of_a_compiler': True}}
  monkeypatch.setattr(compiling, '_USUAL', options)
  assert compiling._usual() == known
  assert compiling.jit(lambda x: x + 1)(1) == 2
