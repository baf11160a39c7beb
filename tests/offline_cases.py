"""What the tests of offline agents share: a spec, batches, plain networks.

The plain networks and the optimiser are the tests' own, in float64, so that an
update can be computed a second time from the equations alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import small_agents

from agents.core.types import ArraySpec, Continuous, Mixed, Spec, Transition
from networks import actor_critic
from search.model import TimeStep

B, F, D = 8, 3, 2
LOW, HIGH = np.float32([-2, 0.5]), np.float32([-1, 3])
STATISTICS = (np.float32([1, -2, 0.5]), np.float32([2, 0.5, 3]))
SPEC = Spec(
  {'angle': ArraySpec((2, 1)), 'speed': ArraySpec((1,))},
  Continuous((D,), LOW, HIGH),
  statistics=STATISTICS,
)
UNIT = Continuous((1,), -np.ones(1, np.float32), np.ones(1, np.float32))


def make_agent(module, config, spec=SPEC, networks=None, **keywords):
  return small_agents.make_agent(module, config, spec, networks, **keywords)


def make_observation(rng, size=B):
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {'angle': normal(size, 2, 1), 'speed': normal(size, 1)}


def make_batch(seed=0, size=B):
  rng = np.random.default_rng(seed)
  share = 0.05 + 0.9 * rng.random((size, D))
  discount = np.ones(size, np.float32)
  discount[1::4] = 0
  return Transition(
    o_tm1=make_observation(rng, size),
    a_tm1=jnp.asarray(LOW + (HIGH - LOW) * share, jnp.float32),
    r_t=jnp.asarray(rng.normal(size=size), jnp.float32),
    discount_t=jnp.asarray(discount),
    o_t=make_observation(rng, size),
  )


def make_timestep(observation):
  size = jax.tree.leaves(observation)[0].shape[0]
  zeros, no = jnp.zeros(size), jnp.zeros(size, bool)
  return TimeStep(observation, zeros, zeros + 1, no, no)


def make_batch_with_starts(seed=0):
  """With first observations of episodes."""
  rng = np.random.default_rng(seed + 1000)
  return make_batch(seed)._replace(o_0=make_observation(rng))


def make_mixed(seed=0):
  """Rows of the data and rows of a model."""
  return Mixed(make_batch(seed), make_batch(seed + 1, size=4))


def train(agent, state, draw, updates, seed=2):
  """Many updates in one program; `draw` gives a batch for a key."""

  def one(state, key):
    state, info = agent.update(state, draw(jax.random.fold_in(key, 9)), key)
    return state, info.metrics

  @jax.jit
  def run(state):
    keys = jax.random.split(jax.random.key(seed), updates)
    return jax.lax.scan(one, state, keys)

  return run(state)


# Networks of the tests' own: `tanh(x A + a) C + c`.


def plain_params(rng, inputs, outputs, members=None):
  head = () if members is None else (members,)
  normal = lambda *shape: jnp.asarray(rng.normal(size=head + shape) * 0.5)
  return {
    'A': normal(inputs, 5),
    'a': normal(5),
    'C': normal(5, outputs),
    'c': normal(outputs),
  }


def plain(p, x):
  tile = lambda v: jnp.tile(v, (x.shape[0], 1))
  return jnp.tanh(x @ p['A'] + tile(p['a'])) @ p['C'] + tile(p['c'])


def to_unit(a):
  tile = lambda v: np.tile(v, (a.shape[0], 1))
  return (a - tile((LOW + HIGH) / 2)) / tile((HIGH - LOW) / 2)


def plain_q(p, o, unit, i):
  one = {name: x[i] for name, x in p.items()}
  return plain(one, jnp.concatenate([o, unit], -1))[:, 0]


def plain_gaussian(p, o):
  out = plain(p, o)
  return actor_critic.Gaussian(out[:, :D], jnp.exp(out[:, D:]))


def plain_critic(p, o, a):
  members = range(p['A'].shape[0])
  return jnp.stack([plain_q(p, o, to_unit(a), i) for i in members])


def plain_draw(p, o, noise):
  """Unit actions of a squashed Gaussian and their log-densities."""
  mean, std = plain_gaussian(p, o)
  raw = mean + std * noise
  normal = -jnp.square((raw - mean) / std) / 2 - jnp.log(std)
  normal = normal - math.log(2 * math.pi) / 2
  log_prob = jnp.sum(normal - jnp.log(1 - jnp.tanh(raw) ** 2), -1)
  return jnp.tanh(raw), log_prob


def plain_batch(rng, size=B):
  discount = np.ones(size)
  discount[1::4] = 0
  return Transition(
    o_tm1=jnp.asarray(rng.normal(size=(size, F))),
    a_tm1=jnp.asarray(LOW + (HIGH - LOW) * rng.uniform(0.1, 0.9, (size, D))),
    r_t=jnp.asarray(rng.normal(size=size)),
    discount_t=jnp.asarray(discount),
    o_t=jnp.asarray(rng.normal(size=(size, F))),
  )


class PlainAdam:
  """Kingma and Ba's Algorithm 1, in NumPy."""

  def __init__(self, rate):
    self.rate, self.count, self.m, self.v = rate, 0, None, None

  def step(self, params, gradients, rate=None):
    if self.m is None:
      self.m = self.v = jax.tree.map(np.zeros_like, gradients)
    self.count += 1
    mix = lambda keep, old, new: keep * old + (1 - keep) * new
    self.m = jax.tree.map(lambda m, g: mix(0.9, m, g), self.m, gradients)
    self.v = jax.tree.map(lambda v, g: mix(0.999, v, g * g), self.v, gradients)
    hat = lambda x, beta: np.asarray(x) / (1 - beta**self.count)
    rate = self.rate if rate is None else rate
    return jax.tree.map(
      lambda p, m, v: p - rate * hat(m, 0.9) / (np.sqrt(hat(v, 0.999)) + 1e-8),
      params,
      self.m,
      self.v,
    )
