# %% [markdown]
# # Routing while it trains
#
# A mixture of experts (Shazeer 2017) is one layer, `networks.moe.MoE`: a gate
# picks k of E experts for each input, and only these work,
#
# $$y = \sum_i G(x)_i\, E_i(x).$$
#
# Nothing tells the gate how to divide the work. Here one can watch it do so on
# a problem small enough to draw: with the two losses that keep experts
# balanced, without them, and with unused experts pruned.

# %%
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from agents.core import optim
from experiments.report import style
from networks import balance, mlp, moe, routers

# %% tags=["parameters"]
TINY = False
NUM_SEEDS = 2 if TINY else 16
POINTS = 3 if TINY else 100  # looks at the layer
EVERY = 2 if TINY else 30  # updates between them
SHOWN = (0, 1, 2) if TINY else (0, 2, 9, 32, 99)  # looks that are drawn
BATCH_SIZE = 8 if TINY else 128
NUM_EXPERTS = 8
K = 2
HIDDEN = 4  # of each expert

# %% [markdown]
# ## A problem in six pieces
#
# Inputs lie in six clusters of the plane, and each cluster has its own linear
# target, so that one small expert can do one cluster well but not all of them.
# A constant 1 as third input replaces biases, which neither the gate nor the
# paper's experts have.

# %%
NUM_CLUSTERS = 6
angles = 2 * np.pi * np.arange(NUM_CLUSTERS) / NUM_CLUSTERS
centres = 2 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)
slopes = 2 * jax.random.normal(jax.random.key(1), (NUM_CLUSTERS, 2))
offsets = jnp.asarray([1.0, -1.0, 0.5, -0.5, 1.5, -1.5])


def draw(key, size):
  """Inputs `[size, 3]`, targets `[size]`."""
  which_key, key = jax.random.split(key)
  which = jax.random.randint(which_key, (size,), 0, NUM_CLUSTERS)
  away = 0.4 * jax.random.normal(key, (size, 2))
  y = jnp.sum(slopes[which] * away, -1) + offsets[which]
  ones = jnp.ones((size, 1))
  return jnp.concatenate([centres[which] + away, ones], -1), y


test_x, test_y = draw(jax.random.key(2), 400)

# %% [markdown]
# ## Training, watched
#
# `layer.apply` returns the output and an `Aux`: the loss to add, and how much
# each expert got. The gate's noise comes from the random stream `gate`. Which
# expert took which input (the plan) is returned with `mutable=['plans']`. The
# running load that decides about pruning is in `stats`, next to the parameters.
#
# The balance losses' weight and the pruning's threshold are ordinary arguments,
# so that all variants and all seeds are one program.


# %%
def make_layer(weight, prune_below):
  config = moe.Config(
    num_experts=NUM_EXPERTS,
    router=routers.NoisyTopK(k=K, prune_below=prune_below, load_momentum=0.95),
    importance_weight=weight,
    load_weight=weight,
  )
  return moe.MoE(config, moe.FeedForward(HIDDEN, 1))


def train(key, weight, prune_below):
  layer = make_layer(weight, prune_below)
  adam = optim.adam(3e-3)

  def loss(params, stats, x, y, key):
    (out, aux), changed = layer.apply(
      {'params': params, 'stats': stats},
      x,
      True,
      rngs={'gate': key},
      mutable=['stats'],
    )
    error = jnp.mean(jnp.square(out[:, 0] - y))
    return error + aux.loss, (changed['stats'], aux)

  step = optim.minimise(loss, adam)

  def update(carry, key):
    params, stats, opt_state = carry
    draw_key, key = jax.random.split(key)
    x, y = draw(draw_key, BATCH_SIZE)
    params, opt_state, (stats, aux), _ = step(
      params, opt_state, stats, x, y, key
    )
    return (params, stats, opt_state), (aux.count, moe.metrics(aux))

  def look(params, stats):
    """Test error, and the first expert of each test input."""
    (out, _), told = layer.apply(
      {'params': params, 'stats': stats}, test_x, mutable=['plans']
    )
    error = jnp.mean(jnp.square(out[:, 0] - test_y))
    plan: Any = told['plans']['plan'][0]
    return error, plan.expert[:, 0]

  def between(carry, key):
    carry, seen = jax.lax.scan(update, carry, jax.random.split(key, EVERY))
    return carry, (look(*carry[:2]), seen)

  init_key, random_key, key = jax.random.split(key, 3)
  variables = layer.init(init_key, test_x[:1])
  params = mlp.randomise(variables['params'], random_key)
  carry = params, variables['stats'], adam.init(params)
  carry, seen = jax.lax.scan(between, carry, jax.random.split(key, POINTS))
  return carry[:2], seen


VARIANTS = ('balanced', 'no balance', 'no balance, pruned')
weights = jnp.asarray([0.1, 0.0, 0.0])
floors = jnp.asarray([0.0, 0.0, 0.3])
over_seeds = jax.vmap(train, (0, None, None))
over_variants = jax.jit(jax.vmap(over_seeds, (None, 0, 0)))
keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
states, ((errors, experts), (counts, metrics)) = over_variants(
  keys, weights, floors
)
# Axes: variants, seeds, looks, updates between two looks.
counts = np.asarray(counts)
updates = EVERY * np.arange(1, POINTS + 1)

# %% [markdown]
# ## Which expert takes which input
#
# The colour is the expert with the largest gate, of the first seed. Gates are
# linear, so the plane is divided by straight lines. Within a hundred updates a
# few experts have most of the inputs. The balance losses bring the others back,
# until most clusters have an expert of their own; without them a few experts
# keep most of the inputs.

# %% alt="Inputs coloured by their expert, through training, three variants"
figure, panels = plt.subplots(
  len(VARIANTS),
  len(SHOWN),
  figsize=(8, 5),
  sharex=True,
  sharey=True,
  layout='constrained',
)
for row, name, of_variant in zip(panels, VARIANTS, experts[:, 0]):
  for axes, i in zip(row, SHOWN):
    axes.scatter(
      *test_x[:, :2].T, c=of_variant[i], cmap='tab10', vmin=0, vmax=9, s=3
    )
    axes.set(xticks=[], yticks=[], aspect='equal')
  row[0].set_ylabel(name)
for axes, i in zip(panels[0], SHOWN):
  axes.set_title(f'{updates[i]} updates', fontsize=10)

# %% [markdown]
# ## The load of each expert
#
# The same runs over all updates: each expert's share of the places (k = 2 per
# input). An even share is 1/8.

# %% alt="Heat map of the load of eight experts over training, three variants"
figure, panels = plt.subplots(
  len(VARIANTS), 1, figsize=(8, 5.5), sharex=True, layout='constrained'
)
share = counts[:, 0].mean(2) / (K * BATCH_SIZE)  # [variants, looks, experts]
for axes, name, of_variant in zip(panels, VARIANTS, share):
  drawn = axes.imshow(
    of_variant.T,
    aspect='auto',
    extent=(0, updates[-1], NUM_EXPERTS - 0.5, -0.5),
    cmap='viridis',
    vmin=0,
    vmax=0.4,
    interpolation='nearest',
  )
  axes.set_title(name, fontsize=10, loc='left')
  axes.set_ylabel('expert')
panels[-1].set_xlabel('updates')
figure.colorbar(drawn, ax=panels, label='share of the load')

# %% [markdown]
# ## Importance, load and error
#
# The coefficient of variation (CV) is the standard deviation over the mean: 0
# is balance, $\sqrt{E/k - 1} = 1.7$ is two experts with everything. Importance
# is the sum of an expert's gates, load the number of its inputs. Lines are
# medians over seeds, bands reach from the first to the third quartile.

# %% alt="Variation of importance and load, and test error, against updates"
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout='constrained')
titles = {'cv_importance': 'CV of importance', 'cv_count': 'CV of load'}
quarters = (0.25, 0.5, 0.75)
for axes, (field, title) in zip(panels, titles.items()):
  for name, of_variant, colour in zip(VARIANTS, metrics[field], style.COLOURS):
    low, middle, high = np.quantile(of_variant.mean(-1), quarters, axis=0)
    axes.plot(updates, middle, color=colour, label=name)
    axes.fill_between(updates, low, high, color=colour, alpha=0.25, lw=0)
  axes.set_title(title, fontsize=11)
for name, of_variant, colour in zip(VARIANTS, errors, style.COLOURS):
  low, middle, high = np.quantile(of_variant, quarters, axis=0)
  panels[2].plot(updates, middle, color=colour, label=name)
  panels[2].fill_between(updates, low, high, color=colour, alpha=0.25, lw=0)
panels[2].set_yscale('log')
panels[2].set_title('test error', fontsize=11)
panels[2].legend(frameon=False, fontsize=9)
for axes in panels:
  axes.set_xlabel('updates')
  axes.spines[['top', 'right']].set_visible(False)

# %%
last = counts[:, :, -(POINTS // 4 + 1) :].mean((2, 3))
used = (last > 0.05 * last.mean(-1, keepdims=True)).sum(-1)
for i, name in enumerate(VARIANTS):
  print(
    f'{name:19} test error {np.median(errors[i, :, -1]):.4f} '
    f'(worst seed {errors[i, :, -1].max():.4f}), experts in use '
    f'{np.median(used[i]):.0f} (from {used[i].min()} to {used[i].max()})'
  )

# %% [markdown]
# An expert has four hidden units, enough for one cluster but not for several:
# so idle experts cost accuracy, and balance lowers the error. Pruning raises
# the error no further; it makes permanent what the gate has begun.
#
# ## A smaller layer
#
# A pruned expert is never chosen again. So its parameters can be dropped, with
# its columns in the gate: `balance.compact` makes those of a layer with fewer
# experts, whose output is the same.

# %%
params, stats = jax.tree.map(lambda x: x[2, 0], states)
keep = balance.prune(stats['load'], floor=0.3, k=K)
small = {
  name: balance.compact(part, keep, axis=0 if name == 'experts' else -1)
  for name, part in params.items()
}
few = int(keep.sum())
smaller = moe.MoE(
  moe.Config(few, routers.NoisyTopK(k=K)), moe.FeedForward(HIDDEN, 1)
)
whole, _ = make_layer(0.0, 0.3).apply(
  {'params': params, 'stats': stats}, test_x
)
part, _ = smaller.apply({'params': small}, test_x)
sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (params, small)]
print(
  f'{NUM_EXPERTS} experts -> {few}, {sizes[0]} parameters -> {sizes[1]}, '
  f'largest difference of outputs {jnp.abs(whole - part).max():.1e}'
)
