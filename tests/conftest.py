"""Shared settings of the tests: strict warnings, two CPU devices, a cache."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of the tests' cost. Without optimisation it takes two thirds
# of the time, and a third of those without the emitters of fused loops, which
# later versions cannot do without. Launchers that tests start inherit it.
_FLAGS = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_FLAGS))

import jax
import pytest

_CACHE = pathlib.Path(__file__).resolve().parent.parent / '.jax_cache'

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compile time is most of the tests' cost.
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def pytest_collection_finish():
  """Looks for garbage more rarely: that was 7% of the time.

  Tracing makes many small objects that live on, and modules live to the end.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 10, 20)


@pytest.fixture
def key():
  """A typed key; fold constants into it where a test needs more than one."""
  return jax.random.key(0)
