"""How tests compile where bits count."""

import os
from typing import Any

import jax

# The flag that `conftest` sets for speed: rounding then depends on what stands
# around an operation, as in users' programs it does not.
_FAST = 'xla_cpu_use_fusion_emitters'


def exact_jit(fn: Any) -> Any:
  """`jax.jit` with the emitters of users' programs."""
  options = {_FAST: True} if _FAST in os.environ['XLA_FLAGS'] else {}
  return jax.jit(fn, compiler_options=options)
