# %% [markdown]
# # Ask a run questions
#
# A run's folder holds all that is needed to ask questions that came up only
# after the training. This notebook loads one and asks: how did it learn, what
# does the network think of a position, what is a search worth at which budget,
# what in the picture matters, what if it were different, how do visits move
# during a search, and how long does the model's imagination agree with what
# comes. It makes a small run first; to ask the same about a run of your own:
#
#     python -m experiments.notebook runs --set=WORKDIR=runs/NAME
#
# Any agent of the MuZero family will do (they have a learned model), on any
# environment.

# %% tags=["parameters"]
TINY = False
WORKDIR = ''  # a finished run's folder; '' makes one
PRESET = 'muzero_catch' if TINY else 'efficientzero_catch'
DECISIONS = 420 if TINY else 8_000
BUDGETS = (0, 2) if TINY else (0, 2, 4, 8, 16)
EPISODES = 4 if TINY else 200
SIMULATIONS = 8 if TINY else 64
UNROLL = 3 if TINY else 8
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
import contextlib
import dataclasses
import io
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

from agents.core import planning
from experiments import build
from experiments.build import evaluation, saved
from experiments.files import tables
from experiments.report import runs
from experiments.report.style import BLUE, CHECKPOINT_COLOURS, GREY, ORANGE
from experiments.runtime import sources
from experiments.training import run
from search.model import Environment

plt.rcParams['axes.spines.top'] = plt.rcParams['axes.spines.right'] = False
plt.rcParams['legend.frameon'] = False

# %% [markdown]
# ## A run
#
# `training.run.run` is what `experiments.train` calls. `early_update` keeps a
# copy of the parameters at that update, to compare with.

# %%
if not WORKDIR:
  WORKDIR = f'{tempfile.mkdtemp()}/catch'
  made = build.describe(
    PRESET,
    env='jax:catch',
    steps=DECISIONS,
    settings=(
      f'early_update={2 if TINY else 600}',
      f'evaluate_every={0 if TINY else 200}',
      f'evaluate_episodes={4 if TINY else 64}',
      'final_episodes=0',
      *SETTINGS,
    ),
  )
  with contextlib.redirect_stdout(io.StringIO()):  # what it tells a terminal
    run.run(made, pathlib.Path(WORKDIR))
print(sorted(path.name for path in pathlib.Path(WORKDIR).iterdir()))

# %% [markdown]
# ## Loading it
#
# `config.json` makes the experiment again, the experiment its environment and
# agent, and the agent's state says how to read a checkpoint.

# %%
experiment = saved.load_experiment(WORKDIR)
env = build.make_env(experiment, training=False, num_envs=8)
agent = build.make_agent(experiment, saved.load_spec(WORKDIR, env.spec))
checkpoints = saved.load_params(WORKDIR, agent, saved.available(WORKDIR))
assert hasattr(experiment.config, 'unroll_steps'), 'no learned model in it'
final = checkpoints['final']
earlier = checkpoints.get('early', final)
print(experiment.agent_name, 'on', experiment.env_name, list(checkpoints))
print(env.spec.observation, env.spec.action)

# %% [markdown]
# ## How did it learn?
#
# `metrics.csv` has a row wherever the run logged or evaluated. `eval_return` is
# with search, `network_return` the same network without.

# %% alt="Return against decisions"
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout='constrained')
columns, _ = tables.read_csv(f'{WORKDIR}/metrics.csv')
for name, colour in (
  ('episode_return', GREY),
  ('network_return', ORANGE),
  ('eval_return', BLUE),
):
  if name in columns:
    axes.plot(
      *runs.read_column(WORKDIR, 'decisions', name), color=colour, label=name
    )
axes.set_xlabel('decisions')
axes.set_ylabel('return')
axes.legend()
plt.show()

# %% [markdown]
# ## Positions
#
# Questions about positions need some positions. The early checkpoint plays them
# by sampling from its policy without a search, so that there are mistakes to
# look at. An environment in JAX does not reset by itself; one of the host does.

# %%
alone = dataclasses.replace(experiment.config.search, num_simulations=0)
draw = planning.make_planner(alone, evaluate=False)
act = jax.jit(lambda *args: draw(agent.model, *args).action)
STEPS = 20 if TINY else 60


def record(params, seed=0):
  """Time steps and actions of play, leaves `[T, 8, ...]`."""
  key = jax.random.key(seed)
  rows = []
  if isinstance(env, Environment):
    pure = env
    reset = jax.jit(lambda key: jax.vmap(pure.reset)(jax.random.split(key, 8)))
    step = jax.jit(
      lambda state, action, key: jax.vmap(pure.step)(
        state, action, jax.random.split(key, 8)
      )
    )
    state, timestep = reset(key)
  else:
    simulator = env.start(seed)
    timestep = simulator.reset()
  for number in range(STEPS):
    keys = jax.random.split(jax.random.fold_in(key, number), 3)
    action = act(params, keys[0], timestep)
    rows.append(jax.tree.map(np.asarray, (timestep, action)))
    if isinstance(env, Environment):
      fresh, after = reset(keys[1]), step(state, action, keys[2])
      state, timestep = sources.select(timestep.is_last(), fresh, after)
    else:
      timestep, _ = simulator.step(np.asarray(action))
  return jax.tree.map(lambda *x: np.stack(x), *rows)


steps, actions = record(earlier)
last = (steps.discount == 0) | steps.truncated
print(f'{steps.reward.size} positions, {int(last.sum())} episodes ended')

# %% [markdown]
# ## What does the network think?
#
# `agent.model.root` is what a search begins with: the prior over actions and
# the value. Along one episode: what both checkpoints expect, next to the
# discounted return that was really collected from there on.

# %%
opinion = jax.jit(
  lambda params, timestep: agent.model.root(params, timestep, jax.random.key(0))
)
gamma = experiment.config.gamma
ends = np.flatnonzero(last[:, 0])
begin = 0 if len(ends) < 2 else ends[0] + 1
end = ends[min(1, len(ends) - 1)] if len(ends) else STEPS - 1
episode = jax.tree.map(lambda x: x[begin : end + 1, 0], steps)
togo = np.zeros(end - begin + 1)
for t in range(len(togo) - 2, -1, -1):
  togo[t] = episode.reward[t + 1] + gamma * togo[t + 1]

# %% alt="Values along an episode, and its frames"
figure, axes = plt.subplots(figsize=(6.8, 2.8), layout='constrained')
for name, params in checkpoints.items():
  values = np.asarray(opinion(params, episode).value)
  axes.plot(values[:-1], 'o-', ms=4, color=CHECKPOINT_COLOURS[name], label=name)
axes.plot(togo[:-1], color=GREY, ls='--', label='what came')
axes.set_xlabel('decision of the episode')
axes.set_ylabel('value')
axes.legend()
plt.show()

# %% alt="Frames of the episode with the final policy"
frames = episode.observation
is_image = getattr(frames, 'ndim', 0) == 4
if is_image:
  policy = jax.nn.softmax(opinion(final, episode).prior_logits)
  count = min(len(frames) - 1, 9)
  figure, panels = plt.subplots(
    2, count, figsize=(1.1 * count, 3.2), height_ratios=(2, 1), squeeze=False
  )
  for t in range(count):
    panels[0, t].imshow(frames[t, ..., -1], cmap='gray_r')
    panels[0, t].set_title(t, fontsize=8)
    panels[1, t].bar(range(policy.shape[1]), policy[t], color=BLUE)
    panels[1, t].set_ylim(0, 1)
    for axes in panels[:, t]:
      axes.set_xticks([])
      axes.set_yticks([])
  panels[1, 0].set_ylabel('policy', fontsize=8)
  plt.show()

# %% [markdown]
# Catch: the ball falls from the top, the paddle is in the bottom row; actions
# are left, stay, right. Where the value follows what came, the network has seen
# the mistake that the early checkpoint made; where it does not, it expects its
# own play from there on.
#
# ## What is search worth, at which budget?
#
# `evaluation.evaluate` is what `experiments.play` runs; 0 simulations is the
# network alone. All rows meet the same simulator seeds. `best` is the
# checkpoint with the highest `eval_return`, the first of equals.

# %%
rows = evaluation.evaluate(
  experiment,
  env,
  agent,
  checkpoints,
  simulations=BUDGETS,
  episodes=EPISODES,
)
for row in rows:
  print(
    f'{row.checkpoint:6} {row.simulations:3} simulations: '
    f'{row.return_mean:.3f} ± {row.return_se:.3f}'
  )

# %% alt="Return by simulations a decision, for each checkpoint"
figure, axes = plt.subplots(figsize=(5.6, 3), layout='constrained')
for name in checkpoints:
  own = [row for row in rows if row.checkpoint == name]
  axes.errorbar(
    range(len(own)),
    [row.return_mean for row in own],
    [1.96 * row.return_se for row in own],
    fmt='o-',
    capsize=3,
    color=CHECKPOINT_COLOURS[name],
    label=name,
  )
axes.set_xticks(range(len(BUDGETS)), list(map(str, BUDGETS)))
axes.set_xlabel('simulations a decision')
axes.set_ylabel('return, 95% intervals')
axes.legend()
plt.show()

# %% [markdown]
# ## What in the picture matters?
#
# One position, each of its numbers set to 0 in turn: by how much does the value
# change? No gradients are needed, and the answer is exact. The network of the
# run made here expects more of a picture without the ball than of this one. It
# never saw such a picture: outside its training data a network's answer is a
# guess.

# %% alt="A position and the change of its value where a number is blanked"
middle = jax.tree.map(lambda x: x[len(x) // 2 : len(x) // 2 + 1], episode)
shown = np.asarray(jax.tree.leaves(middle.observation)[0][0], np.float32)


def value_of(params, observations):
  """Values `[P]` of other observations `[P, ...]` in this time step."""
  repeat = lambda x: np.repeat(x, len(observations), axis=0)
  timestep = jax.tree.map(repeat, middle)._replace(observation=observations)
  return np.asarray(opinion(params, timestep).value)


if shown.size <= 4096:
  blanked = np.repeat(shown[None], shown.size, axis=0)
  blanked.reshape(shown.size, -1)[np.diag_indices(shown.size)] = 0
  blanked = blanked.astype(jax.tree.leaves(middle.observation)[0].dtype)
  change = value_of(final, blanked) - value_of(final, middle.observation)
  change = change.reshape(shown.shape)
  if is_image:
    figure, (left, right) = plt.subplots(
      1, 2, figsize=(4.4, 3.4), layout='constrained'
    )
    left.imshow(shown[..., -1], cmap='gray_r')
    left.set_title('position', fontsize=9)
    wide = max(np.abs(change).max(), 1e-6)
    drawn = right.imshow(change[..., -1], cmap='RdBu', vmin=-wide, vmax=wide)
    right.set_title('change of the value', fontsize=9)
    figure.colorbar(drawn, ax=right)
    plt.show()
  else:
    print('change of the value:', change.round(3))

# %% [markdown]
# ## What if?
#
# A counterfactual is a position written by hand. In Catch: the ball five rows
# above the ground, in every column, and the paddle everywhere. Four steps take
# the paddle from one wall to the other, so every position can be won, and a
# value below 1 is a doubt, which grows with the distance that the paddle has to
# cover. Arrows are the policy's likeliest action. It may be right long before
# the value is.

# %% alt="Value and action for each place of ball and paddle"
if experiment.env_name == 'jax:catch':
  height, width, _ = env.spec.observation.shape
  ball, paddle = np.divmod(np.arange(width * width), width)
  positions = np.zeros((width * width, height, width, 1), np.float32)
  positions[np.arange(len(ball)), height - 6, ball] = 1
  positions[np.arange(len(ball)), height - 1, paddle] = 1
  figure, panels = plt.subplots(
    1,
    len(checkpoints),
    figsize=(2.7 * len(checkpoints), 2.8),
    squeeze=False,
    sharey=True,
    layout='constrained',
  )
  repeat = lambda x: np.repeat(x, len(ball), axis=0)
  asked = jax.tree.map(repeat, middle)._replace(observation=positions)
  for axes, (name, params) in zip(panels[0], checkpoints.items()):
    root = opinion(params, asked)
    image = axes.imshow(
      np.asarray(root.value).reshape(width, width), vmin=-1, vmax=1, cmap='RdBu'
    )
    for i, action in enumerate(np.asarray(root.prior_logits).argmax(1)):
      axes.text(paddle[i], ball[i], '←·→'[action], ha='center', va='center')
    axes.set_title(name, fontsize=9)
    axes.set_xlabel('column of the paddle')
  panels[0, 0].set_ylabel('column of the ball')
  figure.colorbar(image, ax=panels[0].tolist(), label='value')
  plt.show()

# %% [markdown]
# ## How do visits move during a search?
#
# Nodes are numbered as they are added. Without noise a search of N simulations
# therefore contains all shorter ones (PUCT and EfficientZero's rule; Gumbel's
# plans its halvings by N): the first n nodes are the tree after n simulations.
# The root's child above node n shows which action simulation n took.

# %%
settings = dataclasses.replace(
  experiment.config.search,
  num_simulations=SIMULATIONS,
  rule='efficientzero'
  if experiment.config.search.rule == 'efficientzero'
  else 'puct',
)
search = planning.make_search(settings, agent.model.distribution)


@jax.jit
def searched(params, timestep):
  """The tree of one position."""
  output = search(
    params,
    jax.random.key(1),
    opinion(params, timestep),
    agent.model.step,
    invalid_actions=timestep.invalid_actions,
    evaluate=True,
  )
  return output.search_tree


def share_of_visits(tree):
  """Shares `[N, A]` of the root's actions after 1, 2, ... N simulations."""
  parents = np.asarray(tree.parents[0])
  action = np.asarray(tree.action_from_parent[0]).copy()
  for node in range(1, len(parents)):
    if parents[node]:
      action[node] = action[parents[node]]
  taken = np.eye(tree.num_actions)[action[1:]]
  return np.cumsum(taken, 0) / np.arange(1, len(taken) + 1)[:, None]


# %% alt="Share of visits of each action against simulations"
figure, panels = plt.subplots(
  1,
  len(checkpoints),
  figsize=(3.8 * len(checkpoints), 3),
  squeeze=False,
  layout='constrained',
  sharey=True,
)
for axes, (name, params) in zip(panels[0], checkpoints.items()):
  shares = share_of_visits(searched(params, middle))
  for action, share in enumerate(shares.T):
    axes.plot(range(1, len(share) + 1), share, label=f'action {action}')
  axes.set_xscale('log', base=2)
  axes.set_xlabel('simulations')
  axes.set_title(name, fontsize=9)
panels[0, 0].set_ylabel('share of visits')
if shares.shape[1] <= 6:
  panels[0, 0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## How far does imagination agree with what comes?
#
# From every recorded position the model is unrolled over the actions that were
# really taken, and each reward that it imagines is compared with the one that
# came k steps later. Windows across an episode's end are left out. The dashed
# line is the error of always predicting the mean: where a curve reaches it, the
# model knows nothing any more.


# %%
@jax.jit
def imagine(params, timestep, actions):
  """Imagined rewards `[K, B]` along actions `[K, B, ...]`."""
  root = agent.model.root(params, timestep, jax.random.key(0))

  def step(embedding, action):
    output, embedding = agent.model.step(
      params, jax.random.key(0), action, embedding
    )
    return embedding, output.reward

  return jax.lax.scan(step, root.embedding, actions)[1]


starts = np.arange(STEPS - UNROLL)
window = starts[None] + np.arange(UNROLL)[:, None]  # [K, T]
flat = lambda x: x.reshape(-1, *x.shape[2:])
along = actions[window].reshape(UNROLL, -1, *actions.shape[2:])
roots = jax.tree.map(lambda x: flat(x[starts]), steps)
real = steps.reward[window + 1].reshape(UNROLL, -1)
scale = getattr(experiment.config, 'reward_scale', 1.0)
# The action on an episode's last time step leads nowhere.
same = np.cumsum(last[window], axis=0).reshape(UNROLL, -1) == 0

# %% alt="Error of imagined rewards by steps ahead"
figure, axes = plt.subplots(figsize=(5.6, 3), layout='constrained')
mean = lambda x, mask: np.array([x[k][mask[k]].mean() for k in range(UNROLL)])
for name, params in checkpoints.items():
  imagined = np.asarray(imagine(params, roots, along)) / scale
  error = np.abs(imagined - real)
  axes.plot(
    range(1, UNROLL + 1),
    mean(error, same),
    'o-',
    color=CHECKPOINT_COLOURS[name],
    label=name,
  )
constant = np.abs(real - mean(real, same)[:, None])
axes.plot(
  range(1, UNROLL + 1),
  mean(constant, same),
  color=GREY,
  ls='--',
  label='always the mean',
)
axes.set_ylim(bottom=0)
axes.set_xlabel('steps ahead')
axes.set_ylabel('mean error of the reward')
axes.legend()
plt.show()

# %% [markdown]
# The model was trained over `unroll_steps` steps; what it knows beyond is
# generalisation. How deep does a search lean on it?

# %%
tree = searched(final, middle)
depth = np.zeros(SIMULATIONS + 1, int)
for node in range(1, SIMULATIONS + 1):
  depth[node] = depth[int(tree.parents[0, node])] + 1
print('trained over', experiment.config.unroll_steps, 'steps')
print('nodes at depth 0, 1, 2, ...:', np.bincount(depth))
