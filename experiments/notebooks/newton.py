# %% [markdown]
# # Newton's step, and the same step in Connect Four
#
# Looking one step ahead from an approximate value and playing what looks best
# earns the value of Newton's next iterate for Bellman's equation (Bertsekas
# 2022, "Lessons from AlphaZero"). This explains why a planner gains so much
# over the network that it plans with: near the solution, Newton's error is
# proportional to the square of the previous one. First the step is drawn where
# everything is one number; then the same planner, `search.lookahead` over
# `search.rollout`, plays Connect Four with a network that was trained for a
# minute.

# %% tags=["parameters"]
TINY = False
GAME = 'tic_tac_toe' if TINY else 'connect_four'
DECISIONS = 2_400 if TINY else 300_000
OPENINGS = 4 if TINY else 150
PLIES = 1 if TINY else 4

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments import build
from experiments.playing import match, players
from experiments.report.style import BLUE, GREEN, GREY, ORANGE
from experiments.runtime import loop
from search import lookahead, policies, rollout
from search.exact import bellman, riccati
from search.model import TimeStep

plt.rcParams['axes.spines.top'] = plt.rcParams['axes.spines.right'] = False
plt.rcParams['legend.frameon'] = False

# %% [markdown]
# ## One number
#
# A linear system with quadratic costs, `x <- a x + b u` at `q x² + r u²` per
# step: under any linear policy `u = L x` a state costs `K x²`, so a whole value
# function is the number K, and Bellman's operator is a function F of it,
# `riccati.riccati`. The optimal K* is where F crosses the diagonal.
#
# F is the lower envelope of straight lines, one for each policy L: one step of
# L and then K. The policy that look-ahead from K~ chooses is the line that
# touches F at K~, its tangent. Where *its* line crosses the diagonal is the
# cost of playing that policy for ever. Following a tangent to the root is
# Newton's step.

# %%
system = riccati.System(2.0, 2.0, 1.0, 5.0)  # a, b, q, r
best = float(riccati.optimal(system))
start = np.float64(2.0)
gain = riccati.gain(system, start)  # what look-ahead plays: u = gain x
played = float(riccati.policy_cost(system, gain))
print(f'K~ = {start}, plays L = {gain:.3f}, which costs {played:.3f}')
print(f'Newton on F by autodiff: {float(riccati.newton(system, start)):.3f}')
print(f'K* = {best:.3f}')

# %% alt="Bellman's operator, its tangent at K~, and Newton's step"
K = np.linspace(-0.4, 8.2, 200)
figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
axes.plot(K, K, color=GREY, lw=1, label='K')
axes.plot(K, riccati.riccati(system, K), color=BLUE, label='F(K)')
line = riccati.policy_riccati(system, gain, K)
axes.plot(K, line, color=ORANGE, label='the policy of look-ahead: tangent')
at = float(riccati.riccati(system, start))
axes.plot([start, played], [at, played], 'o', color=ORANGE)
axes.plot(best, best, 'o', color=BLUE)
axes.vlines([start, played], 0, [at, played], color=GREY, ls=':')
ticks = {float(start): r'$\tilde K$', best: '$K^*$', played: r'$K_{\tilde L}$'}
axes.set_xticks(list(ticks), list(ticks.values()))
axes.set_ylim(0, 8.2)
axes.legend()
plt.show()

# %% [markdown]
# The figure shows three things.
#
# 1. F is concave (costs are minimised), so the tangent is above it and K_L~ is
#    never below K*: a policy cannot beat the optimal one, however wrong K~ is.
# 2. Left of the place where the tangent has slope 1 it never meets the
#    diagonal: the policy is unstable and its cost infinite. Look-ahead has a
#    *region of stability*.
# 3. Looking l steps ahead is the same step from F(F(...K~)), which is nearer
#    to K*: the region grows with l. A rollout of m steps of a base policy is
#    the same step from where that policy's line leads in m steps.

# %% alt="Error of look-ahead and of rollout by terminal cost"
figure, (left, right) = plt.subplots(
  1, 2, figsize=(10, 3.8), layout='constrained'
)
for depth, colour in zip((1, 2, 3), (BLUE, ORANGE, GREEN)):
  edge = float(riccati.stability_boundary(system, depth))
  K = np.linspace(edge + 1e-3, 10, 400)
  error = np.asarray(riccati.lookahead_cost(system, K, depth)) - best
  left.plot(
    K, error, color=colour, label=f'l = {depth}, stable above {edge:.2f}'
  )
  left.axvline(edge, color=colour, ls=':', lw=1)
left.set(yscale='log', ylim=(1e-5, 1e3), xlim=(-0.5, 10))
left.set(title='l steps of look-ahead', xlabel=r'terminal cost $\tilde K$')
left.set_ylabel(r'cost of the player above $K^*$')
BASE = -0.6  # a stable policy, u = -0.6 x
for steps, colour in zip((0, 2, 8), (BLUE, ORANGE, GREEN)):
  K = np.linspace(-0.5, 10, 300)
  error = riccati.lookahead_cost(system, K, 1, BASE, steps)
  right.plot(K, np.asarray(error) - best, color=colour, label=f'm = {steps}')
base = float(riccati.policy_cost(system, BASE))
right.axhline(base - best, color=GREY, ls='--', label='the base policy')
right.set(yscale='log', ylim=(1e-5, 1e3), xlim=(-0.5, 10))
right.set(
  title='look-ahead of 1 and m steps of rollout',
  xlabel=r'terminal cost $\tilde K$',
)
for axes in (left, right):
  axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# On the left, each further step moves the dotted edge to the left. On the
# right, a rollout takes the terminal cost's influence away: with a stable base
# policy it is stable from all K~ shown, and better than that policy. Where K~
# is good already (near the dip of m = 0), rolling out a mediocre policy makes
# it worse: m = 8 forgets what K~ knew. The same trade-off appears in Connect
# Four.
#
# ## Twenty numbers
#
# Nothing of this is special to one dimension. In a random Markov decision
# process of 20 states the planner that plays games, `lookahead.lookahead`,
# chooses the actions of the Newton step in every state.

# %%
no = jnp.zeros(20, bool)
everywhere = TimeStep(jnp.arange(20), no * 1.0, ~no * 1.0, no, no)


@jax.jit
def compare(mdp, noise):
  """Largest errors: Newton's step against look-ahead's policy, and J~, J_l."""
  _, optimal = bellman.optimal(mdp)
  guess = optimal + noise
  errors = [jnp.max(jnp.abs(noise))]
  for depth in (1, 2, 3):
    plan = lookahead.lookahead(depth)
    output = plan(bellman.model(mdp), guess, jax.random.key(0), everywhere)
    policy = jax.nn.one_hot(output.action, 4, dtype=guess.dtype)
    value = bellman.policy_value(mdp, policy)
    errors.append(jnp.max(optimal - value))
    if depth == 1:
      newton = bellman.newton_step(mdp, guess)  # by autodiff, knows no policies
      gap = jnp.max(jnp.abs(value - newton))
  return gap, jnp.stack(errors)


with jax.enable_x64(True):
  mdp = bellman.random_mdp(jax.random.key(0), 20, 4, discount=0.95)
  bellman.check(mdp)
  for size in (1.0, 0.3, 0.1):
    noise = size * jax.random.normal(jax.random.key(1), (20,))
    gap, errors = map(np.asarray, compare(mdp, noise))
    print(f'error of J~ {errors[0]:.3f}, of l = 1, 2, 3: {errors[1:].round(4)}')
    print(f'  look-ahead 1 and Newton differ by {gap:.0e}')

# %% [markdown]
# ## Connect Four
#
# Now J~ is a network, trained by playing against itself (Gumbel AlphaZero, the
# preset `alphazero_connect_four` cut to a fifth of its length), and T is the
# game: `search.model.exact` makes a model of the rules. Nothing else changes.

# %%
experiment = build.describe(
  f'alphazero_{GAME}',
  steps=DECISIONS,
  settings=('num_simulations=4', 'hidden_sizes=16') if TINY else (),
)
env = build.make_env(experiment, training=True)
agent = build.make_agent(experiment, env.spec)
source = build.make_source(experiment, env, agent)
key = jax.random.key(0)
carry = loop.run(
  agent,
  source,
  loop.init(agent, source, key),
  key=key,
  steps=experiment.updates,
  intervals=loop.Intervals(log=500),
)
params = carry.agent.params
print(f'{experiment.updates} updates')

# %% [markdown]
# A planner decides; a model evaluates leaves. `rollout.truncated` returns a
# model whose values come from 8 moves of the network's own policy, drawn or the
# likeliest ones, and the network's value after them; any planner takes it.

# %%
model = agent.model
drawn = rollout.truncated(model, 'sample', steps=8)
likeliest = rollout.truncated(model, 'mode', steps=8)
network = policies.make_planner(policies.raw, evaluate=True)
PLAYERS = {
  'network': (network, model),
  'look-ahead 1': (lookahead.lookahead(1), model),
  'look-ahead 2': (lookahead.lookahead(2), model),
  'rollout 8, drawn': (lookahead.lookahead(1), drawn),
  'rollout 8, likeliest': (lookahead.lookahead(1), likeliest),
  'look-ahead 2, likeliest': (lookahead.lookahead(2), likeliest),
}


def make_player(name):
  """For `match.play`: who decides, with what parameters."""
  planner, model = PLAYERS[name]
  decide = jax.jit(lambda *args: planner(model, *args))
  return players.Player(name, decide, params, None)


made = {name: make_player(name) for name in PLAYERS}

# %% [markdown]
# A position after a few random moves, and each planner's move and value for the
# player to move.

# %%
game = env.spec.game
starts = match.openings(game, OPENINGS, PLIES, seed=1)
one = jax.tree.map(lambda x: x[:1], starts)
own, other = np.moveaxis(
  np.asarray(game.observe(jax.tree.map(lambda x: x[0], one))), -1, 0
)
for row in range(own.shape[0]):
  print(' '.join('.xo'[int(a + 2 * b)] for a, b in zip(own[row], other[row])))
for name, player in made.items():
  output = player.decide(params, jax.random.key(0), match.time_step(game, one))
  print(f'{name:24} move {int(output.action[0])}, value {output.value[0]:+.2f}')

# %% [markdown]
# Matches: every opening is played twice, with sides changed, and two players
# that play the same moves score exactly one half. Each meets the network alone.


# %%
def score(name, against):
  """Wins and half the draws, and half of the 95% interval over openings."""
  games = match.play(game, made[name], made[against], starts, seed=2)
  result = match.summarise(made[name], made[against], games, None)
  return result.score, 1.96 * result.score_se


scores = {name: score(name, 'network') for name in list(PLAYERS)[1:]}
for name, (mean, half) in scores.items():
  print(f'{name:24} {mean:.3f} ± {half:.3f}')

# %% alt="Score of each planner against the network alone, with 95% intervals"
figure, axes = plt.subplots(figsize=(7, 2.8), layout='constrained')
means, halves = np.array(list(scores.values())).T
axes.barh(
  list(scores), means, xerr=halves, color=BLUE, ecolor=ORANGE, capsize=4
)
axes.axvline(0.5, color=GREY, ls='--', lw=1)
axes.set_xlim(0, 1)
axes.invert_yaxis()
axes.set_xlabel(f'score against the network alone, {2 * OPENINGS} games')
plt.show()

# %% [markdown]
# One bar is too good. A rollout of likeliest moves plays the opponent's own
# moves for it: against the network alone it foresees eight moves exactly, and
# its step is a best reply to this one opponent. So these bars do not measure
# strength alone. Therefore the planners meet each other, where neither knows
# the other's moves: does the second step still pay on top of the first one, and
# does a rollout?

# %%
for name, against in (
  ('look-ahead 2', 'look-ahead 1'),
  ('rollout 8, drawn', 'look-ahead 1'),
  ('rollout 8, likeliest', 'look-ahead 1'),
  ('look-ahead 2, likeliest', 'look-ahead 2'),
):
  mean, half = score(name, against)
  print(f'{name:24} {mean:.3f} ± {half:.3f} against {against}')

# %% [markdown]
# The second stage pays against every opponent here. The rollouts do not, once
# the opponent is not the one that they imagine: the network's value knows more
# about a position than eight moves of a policy that was trained for a minute,
# and the value after them. It is the right panel above: near the dip a rollout
# of a mediocre policy makes J~ worse, and a drawn one adds noise. Far from the
# dip, for a network at the beginning of its training, one stage with a rollout
# should beat one stage without, and it does: `python -m experiments.notebook
# newton --set=DECISIONS=30000` gives the drawn rollout 0.590 ± 0.049 and the
# likeliest one 0.737 ± 0.051 against look-ahead 1.
