"""Every test runs on four virtual CPU devices, offline, with rank promotion an error."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
