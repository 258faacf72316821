"""CCA that carries signal: `cca_loss`, estimators that see more than a batch, diagnostics."""

from molt_jax.objectives.cca.loss import SOLVERS, canonical_correlations, cca_loss

__all__ = ['SOLVERS', 'canonical_correlations', 'cca_loss']
