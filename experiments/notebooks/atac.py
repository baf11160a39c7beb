# %% [markdown]
# # ATAC's game
#
# An agent that learns from a data set should be no worse than the policy that
# made it, whatever the hyper-parameters. ATAC (Cheng et al. 2022) guarantees
# that by a game between an actor and a critic,
#
# $$\hat\pi = \arg\max_\pi L(\pi, f_\pi), \qquad
# f_\pi = \arg\min_f L(\pi, f) + \beta\, E(\pi, f),$$
#
# where $L(\pi, f) = E_\mu[f(s, \pi) - f(s, a)]$ is what the critic says that
# the actor gains over the data's behaviour $\mu$, and $E$ is the Bellman error.
# First the game is played exactly, in tables; then with networks, on a data
# set.

# %%
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from agents import atac
from experiments import build
from experiments.build.dataset import rows_of, spec_of, summary
from experiments.data import layout
from experiments.report import style
from experiments.runtime import evaluate, loop, sources, transitions
from experiments.studies import atac_game_selection
from experiments.training import collector
from search.exact import bellman, offline_game

# %% tags=["parameters"]
TINY = False
NUM_MDPS = 2 if TINY else 6
NUM_STATES = 2 if TINY else 5
ITERATIONS = 3 if TINY else 300  # K, rounds of a game in tables
DECISIONS = 520 if TINY else 3500  # of the agent that makes the data
TRANSITIONS = 400 if TINY else 20_000
NUM_SEEDS = 1 if TINY else 5
WARM_START = 2 if TINY else 1000  # updates
POINTS = 2 if TINY else 10  # evaluations of the game
UPDATES = 2 if TINY else 400  # between two of them
EVALUATIONS = 2 if TINY else 16  # episodes of each
HIDDEN = 8 if TINY else 32
BATCH_SIZE = 8 if TINY else 64

# %% [markdown]
# ## In tables
#
# `search.exact.offline_game` plays Algorithm 1 in a finite MDP: a no-regret
# actor against critics that are solved for. Here it is played in random MDPs,
# for each beta. The behaviour never takes one of the actions of each state, so
# the critics must judge actions that the data do not contain.
#
# `offline_game.assess` measures every term of the guarantee for a play of K
# rounds,
#
# $$J(\text{mixture}) \ge J(\mu) - \frac{\mathrm{Reg}}{K (1 - \gamma)},$$
#
# and calls the left side minus the right side the slack. For comparison ATAC_0
# is played, whose critics are pessimistic about the initial state's value
# instead of the gain over $\mu$. It is known to lack the guarantee.

# %%
VALUE_MAX = 10.0  # 1 / (1 - gamma); rewards are within [0, 1]
ACTIONS = 3
BETAS = jnp.asarray(atac_game_selection.BETAS)
oracle = offline_game.exponentiated_weights(ACTIONS, VALUE_MAX, ITERATIONS)


def one(mdp, mu, beta, pessimism):
  of_mu = offline_game.population(mdp, mu, VALUE_MAX)
  played = offline_game.play(of_mu, oracle, beta, ITERATIONS, pessimism)
  outcome = offline_game.assess(of_mu, played)
  best = bellman.optimal(mdp)[1] @ mdp.initial
  gain = (outcome.mixture - outcome.behaviour) / (best - outcome.behaviour)
  # How far the mean policy is from the behaviour, in the states of the data.
  tv = jnp.abs(played.policy.mean(0) - mu).sum(-1) / 2
  return gain, outcome.slack, tv @ of_mu.weight.sum(-1)


over_betas = jax.vmap(one, (None, None, 0, None))
over_mdps = jax.jit(jax.vmap(over_betas, (0, 0, None, None)), static_argnums=3)
with jax.enable_x64(True):
  mdps, behaviours = atac_game_selection.draw_mdps(
    jax.random.key(0), NUM_MDPS, NUM_STATES, ACTIONS, VALUE_MAX
  )
  partial = behaviours[:, 1]
  tables = {
    kind: [np.asarray(x) for x in over_mdps(mdps, partial, BETAS, kind)]
    for kind in offline_game.PESSIMISM
  }
for kind, (_, slack, _) in tables.items():
  print(f'{kind} pessimism: least slack {slack.min():.2g}')

# %% [markdown]
# Thin lines are MDPs, thick ones their mean. No play with relative pessimism
# has a negative slack, whatever beta is. A small beta imitates, a large one
# gains; the mean at beta = 0 is slightly below zero because a finite play has
# some regret.

# %% alt="Gain, slack and distance from the behaviour against beta, random MDPs"
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout='constrained')
titles = ('gain over μ, of the possible', 'slack', 'distance from μ')
colours = {'relative': style.BLUE, 'initial': style.ORANGE}
for i, (axes, title) in enumerate(zip(panels, titles)):
  for kind, colour in colours.items():
    values = tables[kind][i]
    axes.plot(values.T, color=colour, lw=0.7, alpha=0.5)
    axes.plot(
      values.mean(0), color=colour, lw=2.2, marker='o', ms=4, label=kind
    )
  texts = [
    f'1/{1 / b:.0f}' if 0 < b < 1 else f'{b:.0f}' for b in BETAS.tolist()
  ]
  axes.set_xticks(range(len(BETAS)), texts)
  axes.axhline(0, color='black', lw=0.8)
  axes.set_xlabel('β')
  axes.set_title(title, fontsize=11)
  axes.spines[['top', 'right']].set_visible(False)
panels[1].set_yscale('symlog', linthresh=0.01)
panels[2].legend(frameon=False, fontsize=9, title='pessimism')

# %% [markdown]
# ## The imitation limit
#
# At $\beta = 0$ nothing ties the critic to rewards. It is then Vmax where $\mu$
# acts more often than the actor, else 0, and the game's value is $-V_{max}
# E_\mu[TV(\pi, \mu)]$: the actor can do no better than to become $\mu$. How
# near it comes depends on K.

# %%
gain, _, tv = tables['relative']
for i in range(NUM_MDPS):
  print(
    f'MDP {i}: E TV {tv[i, 0]:.3f} at beta 0, {tv[i, -1]:.3f} at the largest'
  )

# %% [markdown]
# ## A data set
#
# SAC learns to swing up the pendulum for a while, in one compiled program, and
# its policy from half way is kept. From the shell, `python -m
# experiments.collect` makes data sets of five qualities; a D4RL or Minari file
# would do as well.

# %%
experiment = build.describe(
  'sac_pendulum',
  env='jax:pendulum',
  steps=DECISIONS,
  settings=(
    'env.options=action_repeat=4',
    'gamma=0.95',
    f'hidden_sizes={HIDDEN},{HIDDEN}',
    f'batch_size={BATCH_SIZE}',
    'policy_rate=1e-3',
    'critic_rate=1e-3',
    'temperature_rate=1e-3',
  ),
)
env: Any = build.make_env(experiment, training=True)
sac = build.make_agent(experiment, env.spec)
source = build.make_source(experiment, env, sac)
key = jax.random.key(0)
carry = loop.init(sac, source, key)
carry, _, _ = jax.jit(loop.compile_interval(sac, source))(
  carry, key, experiment.updates
)

# %% [markdown]
# A recording is `sources.from_env` again, without a learner.

# %%
NUM_ENVS = 8
stream = sources.from_env(env, sac, NUM_ENVS)


def record(state, key):
  state, row, _ = stream.next(state, carry.agent, 0, key)
  return state, row


_, rows = jax.jit(lambda state, keys: jax.lax.scan(record, state, keys))(
  stream.init(jax.random.key(1)),
  jax.random.split(jax.random.key(2), TRANSITIONS // NUM_ENVS + 1),
)

# %% [markdown]
# A row is a time step and the action taken on it. A transition needs two rows;
# there is none where the second one begins another episode. `npz.save` would
# write the data set for `python -m experiments.train --preset=atac_small
# --dataset=FOLDER --env=Pendulum-v1`.

# %%
rows = jax.device_get(rows)
following = jax.tree.map(lambda x: x[1:], rows.timestep)
history = collector.Rows(
  observation=rows.timestep.observation[:-1],
  action=rows.action[:-1],
  reward=following.reward,
  next_observation=following.observation,
  terminated=following.discount == 0,
  truncated=following.truncated,
  valid=~following.is_first,
)
about = layout.About(
  'pendulum-medium', '', env.spec.action.low, env.spec.action.high
)
dataset = collector.by_episode(
  [collector.Rows(*row) for row in zip(*history)], about
)
data_return = float(layout.returns(dataset).mean())
print(summary(dataset))

# %% [markdown]
# ## The game with networks
#
# A run has two phases, a warm start and the game (`atac.make_phases`). Between
# them `transfer` resets the policy's optimiser. Beta plays no part in the warm
# start: one per seed serves all games, which `vmap` plays in parallel, seeds
# times betas in one program.

# %%
spec = spec_of(dataset, env.spec)
config = atac.Config(
  hidden_sizes=(HIDDEN, HIDDEN),
  normalise=True,
  gamma=0.95,
  fast_rate=1e-3,
  slow_rate=2e-4,
  target_rate=0.02,
  warm_start_updates=WARM_START,
)
networks = atac.make_networks(config, spec)
losses = atac.make_losses()
source = transitions.from_dataset(
  rows_of(dataset), BATCH_SIZE, reward_scale=0.1
)


def score(agent, params):
  play = lambda *args: agent.exploit(*args)[0]
  returns, _ = evaluate.device_episodes(
    env.reset, env.step, play, EVALUATIONS, 50, params, jax.random.key(1)
  )
  return returns.mean()


def train(key, betas, rows):
  """Returns and metrics through the game, for each beta."""

  def phases(beta):
    of_beta = dataclasses.replace(config, beta=beta)
    return atac.make_phases(of_beta, networks, losses, spec)

  def play_game(beta):
    _, agent, _, transfer, _ = phases(beta)[1]
    assert transfer is not None
    interval = loop.compile_interval(agent, source)

    def between(carry, _):
      carry, metrics, _ = interval(carry, key, UPDATES)
      return carry, (score(agent, carry.agent.params), metrics)

    start = warm._replace(agent=transfer(warm.agent))
    return jax.lax.scan(between, start, length=POINTS)[1]

  first = phases(0.0)[0].agent
  warm = loop.Carry(first.init(key), rows, jnp.zeros((), jnp.int32))
  warm, _, _ = loop.compile_interval(first, source)(warm, key, WARM_START)
  return jax.vmap(play_game)(betas)


betas = jnp.asarray([0.0, 0.1, 1.0, 4.0, 16.0, 256.0])
keys = jax.random.split(jax.random.key(3), NUM_SEEDS)
program = jax.jit(jax.vmap(train, (0, None, None)))
returns, metrics = program(keys, betas, source.init(key))
for i, beta in enumerate(betas.tolist()):
  last = np.asarray(returns[:, i, -1])
  print(
    f'beta {beta:5g}: return {last.mean():6.0f} (seeds from {last.min():.0f} '
    f'to {last.max():.0f})'
  )

# %% alt="Return against updates and beta; the game's two terms against updates"
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout='constrained')
updates = UPDATES * np.arange(1, POINTS + 1)
colours = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(betas)))
curves = {
  'return': returns,
  "critic's gain over the data": metrics['pessimism'],
  'Bellman error': metrics['bellman'],
}
for axes, (title, values) in zip(panels, curves.items()):
  for i, colour in enumerate(colours):
    of_beta = np.asarray(values[:, i])
    axes.plot(updates, of_beta.mean(0), color=colour, label=f'{betas[i]:g}')
    axes.fill_between(
      updates, of_beta.min(0), of_beta.max(0), color=colour, alpha=0.15, lw=0
    )
  axes.set_title(title, fontsize=11)
  axes.set_xlabel('updates')
  axes.spines[['top', 'right']].set_visible(False)
panels[0].axhline(data_return, color='black', ls=':', lw=1)
panels[1].set_yscale('symlog', linthresh=0.1)
panels[2].set_yscale('log')
panels[2].legend(
  frameon=False, title='β', loc='center left', bbox_to_anchor=(1, 0.5)
)

# %% [markdown]
# Lines are means over seeds, bands go from the lowest seed to the highest, the
# dotted line is the data's mean return. Two things can be seen.
#
# A small beta stays near the data's return: it imitates. A medium one is far
# better than the data.
#
# The guarantee is about the solution of the game, though, not about any number
# of updates. With a large beta the critics have not learned enough after so
# few, and until they have, the policy follows their wrong estimates of actions
# that the data do not show. The middle panel shows it: the game's exact critic
# never promises more than $(1 - \gamma)(J(\pi) - J(\mu))$, and here the learned
# one promises a gain to policies that are worse than the data.
