"""Shared settings of the tests: strict warnings, two CPU devices, a cache."""

import importlib.metadata
import os
import pathlib


def _cheap_compilation() -> str:
  """Flags that halve the time of compiling, most of the tests' cost."""
  flags = '--xla_backend_optimization_level=0'
  # A flag that a version of XLA does not know ends the process.
  version = importlib.metadata.version('jaxlib').split('.')
  if tuple(map(int, version[:2])) < (0, 12):
    flags += ' --xla_cpu_use_fusion_emitters=false'
  return flags


os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Launchers that tests start inherit it.
os.environ.setdefault('XLA_FLAGS', _cheap_compilation())

import jax
import pytest

_CACHE = pathlib.Path(__file__).resolve().parent.parent / '.jax_cache'

jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compile time is most of the tests' cost.
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture
def key():
  """A typed key; fold constants into it where a test needs more than one."""
  return jax.random.key(0)
