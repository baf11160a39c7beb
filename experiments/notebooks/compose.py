# %% [markdown]
# # Compose an agent
#
# An agent is three pure functions, `Agent(init, act, update)`, and its losses
# are functions of arrays. So a new agent is a few lines: replace one term of an
# agent that exists, or write an `update` from the terms in `agents.core`. Since
# an agent has no hidden state, `jax.vmap` trains 32 seeds of it in one compiled
# program.
#
# TD3+BC imitates the behaviour in its data set. Here it meets a behaviour that
# is worth imitating, and one that is not: torques drawn at random. First one of
# its terms is replaced; then a new agent takes a term of ATAC in its place.

# %%
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from agents import td3_bc
from agents.core import losses as terms
from agents.core import optim
from agents.core.types import Agent, Info, Transition
from experiments.envs import pendulum
from experiments.report import statistics, style
from experiments.runtime import evaluate, loop, transitions
from networks import actor_critic

# %% tags=["parameters"]
TINY = False
NUM_SEEDS = 2 if TINY else 32
NUM_EPISODES = 4 if TINY else 400  # of 50 decisions, in the data set
POINTS = 2 if TINY else 10  # evaluations of a training
UPDATES = 3 if TINY else 400  # between two of them
EVALUATIONS = 2 if TINY else 8  # episodes of each
HIDDEN = (8,) if TINY else (32, 32)
BATCH_SIZE = 8 if TINY else 64
GAMMA = 0.95
REWARD_SCALE = 0.1

# %% [markdown]
# ## Data
#
# The pendulum is written in JAX, so its episodes are one `scan` under `vmap`. A
# row of a data set is a `Transition`: what was seen, what was done, the reward,
# a discount that is 0 at a termination only (this task has none), and what was
# seen next. `transitions.Rows` adds the first observations of episodes.
#
# Two behaviours are recorded: random torques, and a noisy controller that pumps
# energy and holds the pendulum when it is up.

# %%
env = pendulum.make_pendulum(action_repeat=4)
spec = env.spec


def at_random(observation, key):
  del observation
  return jax.random.uniform(key, (1,), minval=-2.0, maxval=2.0)


def controller(observation, key):
  cosine, sine, speed = observation
  angle, energy = jnp.arctan2(sine, cosine), speed**2 / 2 + 15 * cosine
  pump = 0.7 * jnp.clip((15 - energy) * speed, -2, 2)
  torque = jnp.where(jnp.abs(angle) < 0.6, -7 * angle - 2 * speed, pump)
  return jnp.clip(torque + jax.random.normal(key, (1,)), -2, 2)


def record(behaviour):
  def episode(key):
    reset_key, key = jax.random.split(key)
    state, timestep = env.reset(reset_key)

    def step(carry, key):
      state, timestep = carry
      action = behaviour(timestep.observation, key)
      state, following = env.step(state, action, key)
      row = Transition(
        timestep.observation,
        action,
        following.reward,
        following.discount,
        following.observation,
      )
      return (state, following), row

    return jax.lax.scan(step, (state, timestep), jax.random.split(key, 50))[1]

  keys = jax.random.split(jax.random.key(0), NUM_EPISODES)
  episodes = jax.jit(jax.vmap(episode))(keys)
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episodes)
  return transitions.Rows(flat, episodes.o_tm1[:, 0])


data = {'random': record(at_random), 'controller': record(controller)}
data_returns = {
  name: float(rows.transitions.r_t.sum()) / NUM_EPISODES
  for name, rows in data.items()
}
for name, rows in data.items():
  number = len(rows.transitions.r_t)
  print(f'{name}: {number:,} transitions, return {data_returns[name]:.0f}')

# %% [markdown]
# ## A whole training as one function
#
# `loop.compile_interval` makes a number of updates of any agent with any pure
# source. A training is a `scan` of such intervals, each followed by an
# evaluation; `vmap` over its key gives the seeds. The rows are an argument of
# the program (`in_axes=None`): they are in memory once for all seeds, and one
# program serves both data sets.


# %%
def train(agent):
  """Returns of both data sets, all seeds, all evaluations, `[2, seeds, P]`."""
  source = transitions.from_dataset(
    data['random'], BATCH_SIZE, reward_scale=REWARD_SCALE
  )
  interval = loop.compile_interval(agent, source)
  play = lambda *args: agent.exploit(*args)[0]

  def run(key, rows):
    def between(carry, _):
      carry, _, _ = interval(carry, key, UPDATES)
      returns, _ = evaluate.device_episodes(
        env.reset,
        env.step,
        play,
        EVALUATIONS,
        50,
        carry.agent.params,
        jax.random.key(1),
      )
      return carry, returns.mean()

    carry = loop.Carry(agent.init(key), rows, jnp.zeros((), jnp.int32))
    return jax.lax.scan(between, carry, length=POINTS)[1]

  keys = jax.random.split(jax.random.key(2), NUM_SEEDS)
  program = jax.jit(jax.vmap(run, (0, None)))
  start = time.perf_counter()
  returns = np.stack([program(keys, rows) for rows in data.values()])
  seconds = time.perf_counter() - start
  print(f'{2 * NUM_SEEDS} trainings, compilation included: {seconds:.0f} s')
  return returns


# %% [markdown]
# ## The parent, and one term replaced
#
# Every agent's file makes its losses as a NamedTuple of functions that return
# one number per row; `help(td3_bc.Losses)` lists their arguments. The term
# `cloning` is the imitation. Without it the policy follows the critic alone,
# which may lead it to actions that the data never show.

# %%
config = td3_bc.Config(
  hidden_sizes=HIDDEN,
  normalise=False,
  gamma=GAMMA,
  policy_rate=1e-3,
  critic_rate=1e-3,
  target_rate=0.02,
)
networks = td3_bc.make_networks(config, spec)
parent = td3_bc.make_losses()
daring = parent._replace(cloning=lambda action, done: jnp.zeros(len(done)))
results = {
  'TD3+BC': train(td3_bc.make(config, networks, parent, spec)),
  'cloning replaced': train(td3_bc.make(config, networks, daring, spec)),
}

# %% [markdown]
# ## A new agent
#
# ATAC deals differently with actions that are not in the data: the policy
# imitates nothing, and the critics are trained to promise it no more than they
# must,
#
# $$\min_f \; E[f(s, \pi(s)) - f(s, a)] + \beta\, E[(f - T^\pi f)(s, a)^2].$$
#
# With a deterministic policy and twin critics that is a whole agent in some
# forty lines. Only the two losses are new; `optim.minimise` makes an
# optimiser's step from a loss, and `optim.track` updates the slow copy.


# %%
class Params(NamedTuple):
  policy: dict
  critic: dict


class State(NamedTuple):
  params: Params
  targets: Params
  policy_opt: Any
  critic_opt: Any


def make_pessimist(beta=4.0, gamma=GAMMA, rates=(1e-3, 2e-3)):
  policy_net, critic_net, box = networks
  policy_adam, critic_adam = map(optim.adam, rates)

  def choose(policy, observation):
    return box.mode(policy_net.apply(policy, observation))

  def critic_loss(critic, state, batch):
    a_t = choose(state.targets.policy, batch.o_t)
    target_q = critic_net.apply(state.targets.critic, batch.o_t, a_t).min(0)
    q_tm1 = critic_net.apply(critic, batch.o_tm1, batch.a_tm1)
    q_t = critic_net.apply(critic, batch.o_t, a_t)
    one = lambda q_tm1, q_t: terms.double_q_residual(
      q_tm1, batch.r_t, gamma * batch.discount_t, target_q, q_t, 0.5
    )
    a_new = choose(state.params.policy, batch.o_tm1)
    q_new = critic_net.apply(critic, batch.o_tm1, a_new)
    promise = jnp.mean(q_new - q_tm1, -1).sum()
    bellman = jnp.mean(jax.vmap(one)(q_tm1, q_t), -1).sum()
    return promise / beta + bellman, {'promise': promise, 'bellman': bellman}

  def policy_loss(policy, critic, batch):
    first = actor_critic.member(critic, 0)
    q = critic_net.apply(first, batch.o_tm1, choose(policy, batch.o_tm1))
    return -jnp.mean(q), {}

  critic_step = optim.minimise(critic_loss, critic_adam)
  policy_step = optim.minimise(policy_loss, policy_adam)

  def init(key):
    keys = jax.random.split(key)
    params = Params(policy_net.init(keys[0]), critic_net.init(keys[1]))
    opts = policy_adam.init(params.policy), critic_adam.init(params.critic)
    return State(params, params, *opts)

  def update(state, batch, key):
    del key
    critic, critic_opt, metrics, _ = critic_step(
      state.params.critic, state.critic_opt, state, batch
    )
    policy, policy_opt, _, _ = policy_step(
      state.params.policy, state.policy_opt, critic, batch
    )
    params = Params(policy, critic)
    targets = optim.track(params, state.targets, 0.02)
    return State(params, targets, policy_opt, critic_opt), Info(metrics)

  def act(params, key, timestep):
    del key
    return choose(params.policy, timestep.observation), {}

  return Agent(init, act, update, exploit=act)


results['pessimist'] = train(make_pessimist())

# %% [markdown]
# ## With intervals
#
# The curves are interquartile means of 32 seeds, which a few unlucky seeds do
# not move, with 95% bootstrap intervals.

# %% alt="Return against updates, three agents on two data sets"
figure, panels = plt.subplots(
  1, 2, figsize=(9, 3.8), sharey=True, layout='constrained'
)
updates = UPDATES * np.arange(1, POINTS + 1)
colours = (style.GREY, style.ORANGE, style.BLUE)
middle = lambda strata: np.array([statistics.iqm(x) for x in strata[0].T])
for axes, name, of_data in zip(panels, data, zip(*results.values())):
  for agent, returns, colour in zip(results, of_data, colours):
    low, high = statistics.bootstrap_interval([returns], middle, resamples=200)
    axes.plot(updates, middle([returns]), color=colour, label=agent)
    axes.fill_between(updates, low, high, color=colour, alpha=0.25, lw=0)
  axes.axhline(
    data_returns[name], color='black', ls=':', lw=1, label='the data'
  )
  axes.set_title(f'data: {name}', fontsize=11)
  axes.set_xlabel('updates')
  axes.spines[['top', 'right']].set_visible(False)
panels[0].set_ylabel('return, IQM of the seeds')
panels[1].legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))

# %% [markdown]
# The same in numbers, at the last evaluation: the interquartile mean, its
# interval, and the probability that a run beats one of the parent's.

# %%
for i, name in enumerate(data):
  parents = results['TD3+BC'][i, :, -1]
  for agent, returns in results.items():
    last = returns[i, :, -1]
    low, high = statistics.bootstrap_interval([last[:, None]], middle)
    better = statistics.probability_of_improvement({'': last}, {'': parents})
    print(
      f'{name:10} {agent:16} {statistics.iqm(last):6.0f} '
      f'[{low[0]:5.0f}, {high[0]:5.0f}]  beats the parent: {better:.2f}'
    )

# %% [markdown]
# Imitation is a burden on random data, and saves the agent on the controller's
# data: without it the policy moves to torques that the controller never used,
# where the critics are wrong. The pessimist need not choose between the two. It
# is not worse than its parent on either data set; on random data, where every
# torque was tried, pessimism makes it slower than the agent without imitation.
