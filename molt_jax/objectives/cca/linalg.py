"""Decompositions that come to an end on every finite matrix, alone and under vmap, and their tests.

What LAPACK gives up on is done another way, and a batch of its calls does not hang.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import solve_triangular

EPS = float(jnp.finfo(jnp.float32).eps)
LARGEST = float(jnp.finfo(jnp.float32).max)
# Bound of a condition number up to which Cholesky takes the place of an SVD.
_WELL_CONDITIONED = 200.0
# Width above which a bound of the norm is worth the power method, and its steps.
_WIDE, _POWER = 128, 8


def in_turn(function):
  """`function` of arrays, whose vmap takes one slice after the other on a CPU.

  Elsewhere all at once. On a CPU jaxlib's batched LAPACK calls wait, on a thread of XLA's pool, for
  work that they have put into the same pool: two at once on two cores hang.
  """
  wrapped = custom_vmap(function)

  @wrapped.def_vmap
  def rule(axis_size, is_batched, *arguments):
    arguments = _all_batched(axis_size, is_batched, arguments)
    out = lax.platform_dependent(
      *arguments,
      cpu=lambda *slices: lax.map(lambda one: wrapped(*one), slices),
      default=jax.vmap(function),
    )
    return out, jax.tree.map(lambda _: True, out)

  return wrapped


def either(is_usual, usual, rare, *operands):
  """`usual(*operands)` or `rare(*operands)`, as `lax.cond`.

  Under vmap `rare` is computed only if a slice needs it.
  """
  choose = custom_vmap(lambda is_usual, *operands: lax.cond(is_usual, usual, rare, *operands))

  @choose.def_vmap
  def rule(axis_size, is_batched, *arguments):
    is_usual_v, *operands_v = _all_batched(axis_size, is_batched, arguments)
    usual_v = jax.vmap(lambda _, *operands: usual(*operands))
    rare_v = jax.vmap(lambda is_usual, *operands: lax.cond(is_usual, usual, rare, *operands))
    out = either(jnp.all(is_usual_v), usual_v, rare_v, is_usual_v, *operands_v)
    return out, jax.tree.map(lambda _: True, out)

  return choose(is_usual, *operands)


def or_else(is_good, found, rare, *operands):
  """What was found, or `rare(*operands)` unless it is good.

  A loop of one step or none, since it hands on what it is given where `lax.cond` copies it. Under
  vmap `rare` is computed only if a slice needs it.
  """

  def step(state):
    return jnp.bool_(True), rare(*operands)

  return lax.while_loop(lambda state: ~state[0], step, (is_good, found))[1]


def _all_batched(axis_size, is_batched, arguments):
  """The arguments of a vmap rule, each with the new leading axis."""

  def along_axis(is_batched, array):
    return array if is_batched else jnp.broadcast_to(array, (axis_size, *jnp.shape(array)))

  return jax.tree.map(along_axis, tuple(is_batched), tuple(arguments))


def svd(a_kj):
  """Returns (U [k, m], s [m], V' [m, j]) of one matrix, strongest first, m = min(k, j).

  LAPACK's divide and conquer (gesdd) can fail to converge on a finite matrix, rarely; all it
  returns is then NaN. Its QR iteration takes longer and finds them.
  """
  if a_kj.shape[0] >= 2 * a_kj.shape[1]:
    q_kj, r_jj = jnp.linalg.qr(a_kj)
    u_jm, s_m, v_mj = svd(r_jj)
    return jnp.matmul(q_kj, u_jm, precision='highest'), s_m, v_mj
  if a_kj.shape[1] >= 2 * a_kj.shape[0]:
    v_jm, s_m, u_mk = svd(a_kj.T)
    return u_mk.T, s_m, v_jm.T
  return _or_by_qr_iteration(a_kj, with_vectors=True)


def singular_values(a_kj):
  """`svd` without the vectors, which take most of its time."""
  return _or_by_qr_iteration(a_kj, with_vectors=False)[0]


def _or_by_qr_iteration(a_kj, *, with_vectors):
  def usual(a_kj):
    found = jnp.linalg.svd(a_kj, full_matrices=False, compute_uv=with_vectors)
    return tuple(found) if with_vectors else (found,)

  def by_qr_iteration(a_kj):
    algorithm = lax.linalg.SvdAlgorithm.QR
    found = lax.linalg.svd(a_kj, full_matrices=False, compute_uv=with_vectors, algorithm=algorithm)
    return tuple(found) if with_vectors else (found,)

  def again(a_kj):
    # A TPU has no QR iteration; made of products, its decomposition has no search that could fail.
    return lax.platform_dependent(a_kj, tpu=usual, default=by_qr_iteration)

  found = usual(a_kj)
  # What is not finite has no decomposition: NaN comes out, without a second search.
  is_done = jnp.all(jnp.isfinite(found[with_vectors])) | ~jnp.all(jnp.isfinite(a_kj))
  return or_else(is_done, found, again, a_kj)


def raised_cholesky(a_kk, ridge):
  """Returns (L, r) with L L' = A + r I.

  r is the first of ridge, 16 ridge, 256 ridge, .. for which rounding leaves L real. `a_kk` is
  positive semi-definite but for rounding, with eigenvalues of at most about 1; ridge > 0.
  """

  def attempt(r):
    return jnp.linalg.cholesky(a_kk + r * jnp.eye(a_kk.shape[0])), r

  def has_failed(factor_and_ridge):
    l_kk, r = factor_and_ridge
    # Beyond that it is not rounding: A is not finite.
    return ~jnp.all(jnp.isfinite(l_kk)) & (r < 1)

  return lax.while_loop(has_failed, lambda state: attempt(16 * state[1]), attempt(ridge))


def inverse_cholesky(a_kk):
  """L^(-1) with L L' = A; NaN where A has no Cholesky factor."""
  return solve_triangular(jnp.linalg.cholesky(a_kk), jnp.eye(a_kk.shape[0]), lower=True)


def is_well_conditioned(a_kk, inverse_kk):
  """Whether Cholesky lost no more than a few bits."""
  # Not so for NaN, of a Cholesky factor that is not there.
  return norm_bound(a_kk) * norm_bound(inverse_kk) < _WELL_CONDITIONED


def norm_bound(a_kk):
  """A bound of the norm of a symmetric matrix: the largest sum of magnitudes in a row.

  It can be sqrt(k) times the norm. That of a wide matrix is lowered to at most 1.7 times the norm
  of a positive semi-definite one (k = 1024), by the power method from random vectors: |A^p v| is
  that of the largest direction at least. No bound if they all happen to have half of the usual
  share of it or less; for 16, a chance of 1e-7.
  """
  k = a_kk.shape[0]
  bound = jnp.max(jnp.sum(jnp.abs(a_kk), axis=1))
  if k <= _WIDE:
    return bound
  v_kv = jax.random.normal(jax.random.key(0), (k, 16))
  v_kv /= jnp.linalg.norm(v_kv, axis=0)[None, :]
  a_kk = a_kk / bound
  for _ in range(_POWER):
    v_kv = a_kk @ v_kv
  length = k**0.5 * jnp.max(jnp.linalg.norm(v_kv, axis=0))
  return bound * jnp.minimum(1.0, 1.1 * length ** (1 / _POWER))


def products_suffice(s_kk, r, *matrices):
  """Whether Cholesky and products alone can tell S + r from r, and did.

  That is, whether the matrices they made are finite.
  """
  is_finite = jnp.stack([jnp.all(jnp.isfinite(m)) for m in matrices])
  return (r >= 4 * EPS * jnp.sqrt(jnp.sum(s_kk * s_kk))) & jnp.all(is_finite)
