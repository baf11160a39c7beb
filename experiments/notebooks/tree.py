# %% [markdown]
# # Inside a search tree
#
# An agent is trained for a minute, and one of its searches is kept whole and
# drawn: which actions were sampled, how often each was visited, what it is
# worth, and where rewards come from when the model predicts sums of them. The
# second half shows why those sums must be reset node by node: three wrong ways
# of doing it, first in a search small enough to check by hand, then in the
# trained agent, where every imagined reward is compared with the simulator's.

# %% tags=["parameters"]
TINY = False
DECISIONS = 820 if TINY else 8_000
SIMULATIONS = 12 if TINY else 28
ROOTS = 4 if TINY else 256
PLAYED = 2 if TINY else 50  # decisions; 50 are an episode
SETTINGS = [
  # Of a test, that compiles less.
  'batch_size=8',
  'env.num_envs=2',
  'reanalyze_fraction=0',
  'network.blocks=0',
  'network.norm=none',
]
SETTINGS = SETTINGS if TINY else []

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mctx
import numpy as np

from experiments import build
from experiments.report import style
from experiments.report import tree as tree_figure
from experiments.runtime import loop
from search import policies, sampled, value_prefix
from search.model import Environment, Model, TimeStep

# %% [markdown]
# ## An agent that uses everything a tree can hold
#
# Sampled MuZero with EfficientZero's value prefix swings up a pendulum. Actions
# are torques in [-2, 2]: none can be enumerated, so every node draws K = 5 of
# them from its own policy. The prefix is reset every 3 steps, sooner than the
# paper's 5, so that resets are seen in a small tree. A decision is 4 steps of
# the simulator, its reward the sum of theirs.

# %%
HORIZON = 3
experiment = build.describe(
  'sampled_muzero_pendulum',
  steps=DECISIONS,
  settings=(
    'value_prefix=true',
    f'prefix_horizon={HORIZON}',
    'network.reward_bins=41',
    'num_samples=5',
    'num_simulations=16',
    *SETTINGS,
  ),
)
env = build.make_env(experiment, training=True)
assert isinstance(env, Environment)  # pure functions, not of the host
agent = build.make_agent(experiment, env.spec)
source = build.make_source(experiment, env, agent)
print(experiment.updates, 'updates')

# %% [markdown]
# The environment is compiled with the agent: source, search and update are one
# program. This is all it takes without a launcher.

# %%
key = jax.random.key(0)
log = []
carry = loop.run(
  agent,
  source,
  loop.init(agent, source, key),
  key=key,
  steps=experiment.updates,
  intervals=loop.Intervals(log=50),
  hooks=loop.Hooks(log=lambda step, metrics: log.append((step, metrics))),
)
params = carry.agent.params
for step, metrics in log:
  if 'episode_return' in metrics:
    print(f'update {step}: return {metrics["episode_return"]:.0f}')

# %% [markdown]
# ## One search, kept whole
#
# A planner's output has a field `search_tree`. Launchers drop it, because it
# holds the latent state of every node; here it is what we want. Its arrays are
# `[B, N, ...]`: a batch of trees, N = simulations + 1 nodes each.

# %%
planner = policies.make_planner(
  sampled.search,
  distribution=agent.model.distribution,
  num_simulations=SIMULATIONS,
  num_samples=5,
  with_mode=True,
  evaluate=True,
)
search = jax.jit(lambda *args: planner(agent.model, *args))
states, timestep = jax.vmap(env.reset)(
  jax.random.split(jax.random.key(7), ROOTS)
)
output = search(params, jax.random.key(1), timestep)
tree = output.search_tree
print(jax.tree.map(lambda x: x.shape, tree.embeddings))

# %% [markdown]
# The embedding is a stack of layers, each added by one function of the library:
# `sampled.search` keeps the actions of every node, `[B, N, K, 1]`;
# `value_prefix` beneath it keeps the LSTM's carry, the prefix that children
# count from, and the depth; the network's latent is innermost. The tree itself
# sees only the slots 0 ... K - 1.

# %% alt="A search tree of 29 nodes over sampled torques"
row = 0
prefix = tree.embeddings.state
angle = np.degrees(np.arctan2(*timestep.observation[row, 1::-1]))
tree_figure.figure(
  tree,
  row,
  actions=tree.embeddings.actions[row, :, :, 0],
  prefix=prefix.prefix[row],
  horizon=HORIZON,
  into=plt.figure(),
  title=f'{angle:.0f} degrees from upright, {timestep.observation[row, 2]:.1f} '
  f'rad/s: the chosen torque is {output.action[row, 0]:+.2f}',
)
plt.show()

# %% [markdown]
# How to read it: a number in a node is its visit count; the root's is the
# number of simulations plus one, and the counts of its children over their sum
# are the target that the policy is trained towards (`output.action_weights`).
# An edge carries the sampled torque and Q = reward + discount x value. In red,
# Σ is the value prefix that the LSTM predicts *at* a node: the sum of rewards
# since the last square. The reward of an edge is the prefix at its lower end
# minus the one at its upper end, except below a square, where the prefix counts
# from zero again: there, Σ itself is the reward.
#
# One line each checks that the drawing agrees with the planner.

# %%
rewards, discounts = tree.children_rewards, tree.children_discounts
print(np.asarray(tree.children_visits[row, 0]), 'visits of the root')
print(np.asarray(output.action_weights[row] * SIMULATIONS), 'policy target')
print(np.asarray(tree.summary().qvalues[row]).round(2), 'Q of the root')
print(np.asarray(prefix.depth[row]), 'depth of each node')

# %% [markdown]
# ## Why the prefix is reset per element: by hand
#
# The LSTM is trained on windows in which it is reset every h steps, so it has
# never counted further than h. In a batch of trees the nodes that one
# simulation adds lie at different depths: whether to reset depends on each
# node's own depth. Three ways of getting it wrong need one line each, which
# changes what `value_prefix` keeps in the embedding:
#
# - **never**: the LSTM runs on, beyond what it was trained on;
# - **together**: the batch is reset when the first tree's node is due;
# - **carry only**: the LSTM is reset, but differences still begin at the
#   parent's prefix, as if it had not been.

# %%
WAYS = ('per element', 'never', 'together', 'carry only')


def with_way(step):
  """A model's step that resets as `params[1]`, a number of WAYS, says."""

  def wrong_step(params, key, action, embedding):
    params, way = params
    depth = embedding.depth
    depth = jnp.where(way == 1, 0, depth)
    depth = jnp.where(way == 2, depth[:1], depth)
    output, after = step(params, key, action, embedding._replace(depth=depth))
    total = embedding.prefix + output.reward
    prefix = jnp.where(way == 3, total, after.prefix)
    return output, after._replace(prefix=prefix, depth=embedding.depth + 1)

  return wrong_step


# %% [markdown]
# A game small enough to check: the first action chooses a road, and after that
# there is nothing to choose. The *quick* road pays 1 at each of its first 3
# steps, the *slow* one pays 5 at its fifth step and nothing else, so the slow
# one is better. The LSTM is perfect within its horizon of 3 and adds nothing
# beyond, because it was never trained to count further. Two trees are searched
# in one batch, and we watch the second one. The first one has another prior at
# its root, and so grows differently.

# %%
ROADS = jnp.array([[1.0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 5, 0, 0, 0]])
WALK = jnp.array([0.0, -jnp.inf])  # logits behind the first step: no choice


def prefix_step(params, key, action, state, carry):
  road, length = state
  road = jnp.where(length == 0, action, road)
  length = length + 1
  age, total = carry
  reward = ROADS[road, jnp.minimum(length, ROADS.shape[1]) - 1]
  total = total + jnp.where(age < HORIZON, reward, 0)
  return value_prefix.PrefixStep(
    prefix=total,
    discount=jnp.full_like(total, 0.99),
    prior_logits=jnp.broadcast_to(WALK, (road.shape[0], 2)),
    value=jnp.zeros_like(total),
    state=(road, length),
    carry=(age + 1, total),
  )


def root(params, timestep, key):
  neighbour = params[0]  # its prior of the quick road
  zeros = jnp.zeros(2, jnp.int32)
  quick = jnp.stack([neighbour, 0.3])
  return mctx.RootFnOutput(
    prior_logits=jnp.log(jnp.stack([quick, 1 - quick], axis=1)),
    value=jnp.zeros(2),
    embedding=value_prefix.root_embedding((zeros, zeros), (zeros, zeros * 0.0)),
  )


roads = Model(root, with_way(value_prefix.recurrent_fn(prefix_step, HORIZON)))
walk = policies.make_planner(
  policies.puct,
  num_simulations=40,
  constants=policies.Puct(init=4.0),
  evaluate=True,
)
nothing = TimeStep(None, None, None, None, None)
choose = jax.jit(
  lambda neighbour, way: walk(
    roads, (neighbour, way), jax.random.key(0), nothing
  )
)

# %% [markdown]
# For each way: the rewards that the second tree reads on both roads, their Qs
# (means over what was backed up), and the choice.

# %%
NAMES = ('quick', 'slow')


def along(tree, action, steps=8):
  """Rewards that the second tree reads on a road, step by step."""
  rewards, node = [], 0
  for _ in range(steps):
    rewards.append(round(float(tree.children_rewards[1, node, action])))
    node, action = int(tree.children_index[1, node, action]), 0
  return rewards


for number, way in enumerate(WAYS):
  chosen = choose(0.5, number)
  q = chosen.search_tree.summary().qvalues[1]
  print(f'{way}: takes the {NAMES[int(chosen.action[1])]} road')
  for road, name in enumerate(NAMES):
    rewards = along(chosen.search_tree, road)
    print(f'  {name:5} Q {float(q[road]):.2f}, rewards {rewards}')

# %% [markdown]
# Only *per element* reads the rewards that are paid. *Never* is right for three
# steps and blind after them. *Carry only* subtracts what was paid before a
# reset from the first reward after it: there even a perfect LSTM does not help.
# *Together* is worse than merely wrong: what the second tree chooses depends on
# which tree shares its batch:

# %%
for neighbour in (0.1, 0.3, 0.5, 0.7, 0.9):
  one, all_ = (int(choose(neighbour, way).action[1]) for way in (0, 2))
  print(f'{neighbour}: {NAMES[one]} per element, {NAMES[all_]} together')

# %% [markdown]
# ## The same in the trained agent
#
# Its model claims a reward for every edge, and the simulator knows the true
# one: every node's true state is that of its parent after the sampled action.
# So each tree is walked once more in the simulator.

# %%
wrong = agent.model._replace(step=with_way(agent.model.step))


def true_root(params, timestep, key):
  return agent.model.root(params[0], timestep, key)


wrong = wrong._replace(root=true_root)
advance = jax.jit(jax.vmap(env.step, in_axes=(0, 0, None)))


@jax.jit
def searched(way, key, timestep):
  """Searches all roots one way."""
  output = planner(wrong, (params, way), key, timestep)
  return output.action, output.search_tree


@jax.jit
def walked(tree, states):
  """True rewards of arriving at each node `[N, B]`, 0 at the root."""
  rows = jnp.arange(ROOTS)
  every = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (SIMULATIONS + 1, *x.shape)), states
  )

  def arrive(number, carry):
    every, rewards = carry
    parent = tree.parents[:, number]
    slot = tree.action_from_parent[:, number]
    action = tree.embeddings.actions[rows, parent, slot]
    before = jax.tree.map(lambda x: x[parent, rows], every)
    after, arrived = advance(before, action, jax.random.key(0))
    every = jax.tree.map(lambda x, new: x.at[number].set(new), every, after)
    return every, rewards.at[number].set(arrived.reward)

  start = every, jnp.zeros((SIMULATIONS + 1, ROOTS))
  return jax.lax.fori_loop(1, SIMULATIONS + 1, arrive, start)[1]


def claimed(tree):
  """Rewards that the tree holds for arriving at each node, `[N, B]`."""
  rows = np.arange(ROOTS)[:, None]
  edge = rows, np.asarray(tree.parents), np.asarray(tree.action_from_parent)
  return np.asarray(tree.children_rewards)[edge].T


# %% alt="Error of imagined rewards by depth, for four ways of resetting"
figure, axes = plt.subplots(figsize=(7, 3.6), layout='constrained')
actions = {}
for number, way in enumerate(WAYS):
  actions[way], grown = searched(number, jax.random.key(1), timestep)
  error = np.abs(claimed(grown) - np.asarray(walked(grown, states)))
  depth = np.asarray(grown.embeddings.state.depth).T
  levels = [d for d in range(1, 9) if (depth == d).sum() >= min(30, ROOTS)]
  means = [error[depth == d].mean() for d in levels]
  axes.plot(levels, means, 'o-', label=way)
for edge in range(HORIZON, 9, HORIZON):
  axes.axvline(edge + 0.5, color=style.PALE, ls=':', lw=1)
axes.set_xlabel('depth of the node (dotted: the prefix is reset)')
axes.set_ylabel('mean error of its reward')
axes.spines[['top', 'right']].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %%
right = actions[WAYS[0]]
for way in WAYS[1:]:
  changed = np.mean(np.abs(actions[way] - right)[:, 0] > 0)
  print(f'{way}: another action at {changed:.0%} of {ROOTS} roots')

# %% [markdown]
# What each mistake costs in play, from the same starts and with the same keys:
# the mean difference to the return of the right way, and its standard error.

# %%
returns = {}
for number, way in enumerate(WAYS):
  now, seen, returns[way] = states, timestep, np.zeros(ROOTS)
  for step in range(PLAYED):
    action, _ = searched(number, jax.random.key(step), seen)
    now, seen = advance(now, action, jax.random.key(0))
    returns[way] += np.asarray(seen.reward)
print(f'{WAYS[0]}: return {returns[WAYS[0]].mean():.0f}')
for way in WAYS[1:]:
  lost = returns[way] - returns[WAYS[0]]
  print(f'{way}: {lost.mean():+.1f} ± {lost.std() / np.sqrt(ROOTS):.1f}')

# %% [markdown]
# The curves tell the mistakes apart: *never* is as good as the right way up to
# the horizon and worse after it, *carry only* fails exactly after a reset, by
# the sum of the rewards before it. The choices hardly tell them apart, and the
# return does by no more than twice its error: all paths here earn about as much
# up to a reset, so that the mistake shifts them alike and their order stays. On
# the roads above it does not shift them alike, and *never* and *together* take
# the wrong one. A wrong reset is a bug that a learning curve may hide; the
# comparison of rewards finds it in seconds.
