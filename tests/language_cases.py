"""A small language model, and windows of tokens for it."""

import jax.numpy as jnp
import numpy as np

from agents import language as agent_module
from agents.core.types import ArraySpec, Discrete, Spec, Text
from networks import language, moe, routers

V, D, B, L, E, K = 64, 8, 4, 8, 4, 2
SPEC = Spec(ArraySpec((), np.int32), Discrete(V), name='numbers')
MIXTURE = moe.Config(E, routers.NoisyTopK(k=K), hidden=8)
NETWORK = language.Config(size=D, dropout=0.1, moe=MIXTURE)
CONFIG = agent_module.Config(
  network=NETWORK, learning_rate=0.02, warmup_updates=5, log_experts=True
)


def make_tokens(seed=0, size=B):
  """Windows of 0, 3, 6, ... modulo V."""
  start = np.random.default_rng(seed).integers(V, size=(size, 1))
  return jnp.asarray((start + 3 * np.arange(L + 1)[None]) % V, jnp.int32)


def make_batch(config, spec, seed=0):
  del config, spec
  return Text(make_tokens(seed))
