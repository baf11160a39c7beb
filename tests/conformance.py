"""One table of all agents, small, with what they learn from.

A new agent needs one row here; `test_conformance` then checks it, and the
tests of its family find it by its name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import game_cases
import jax
import jax.numpy as jnp
import language_cases
import offline_cases
import searching_cases
import small_agents
from searching_cases import (
  BATCH_NORM,
  BOX,
  IMAGE,
  JOINT,
  SAMPLES,
  SMALL_IMAGE,
  ez,
  mz,
  sampled,
  v2,
)

from agents import (
  alphazero,
  atac,
  bc,
  combo,
  cql,
  dynamics,
  iql,
  language,
  sac,
  td3_bc,
  td_gammon,
)
from agents.core import planning
from agents.core.types import Agent, Spec


class Row(NamedTuple):
  """An agent and what it learns from.

  Attributes:
    module: the agent's.
    config: of `module.Config`.
    spec: of its environment or data.
    make_batch: `(config, spec, seed=0) -> batch` of an update.
    make: `(module, config, spec, networks=None, terms=None, ...) -> agent`.
  """

  module: Any
  config: Any
  spec: Spec
  make_batch: Callable
  make: Callable = small_agents.make_agent


class Built(NamedTuple):
  """An agent with its compiled functions and an update's inputs.

  `donating` is the update as the loop compiles it, which eats its state;
  `update` is the same program on a copy of the state. `traces` counts.
  """

  module: Any
  config: Any
  spec: Spec
  agent: Agent
  init: Callable
  state: Any
  batch: Any
  donating: Callable
  update: Callable
  evaluate: Callable | None
  refresh: Callable | None
  traces: list[int]


def searching(row):
  return Row(*row, searching_cases.make_batch)


def offline(module, make_batch=None, make=small_agents.make_agent, **fields):
  """A row of an agent that learns from a data set of transitions."""
  if module is not dynamics:
    fields = {'hidden_sizes': (8,)} | fields
  config, spec = module.Config(**fields), offline_cases.SPEC
  make_batch = make_batch or offline_cases.make_batch
  batch = lambda config, spec, seed=0: make_batch(seed)
  return Row(module, config, spec, batch, make)


puct = planning.SearchConfig(rule='puct', num_simulations=4)
gumbel = planning.SearchConfig(rule='gumbel', num_simulations=4)
vector_latent = dataclasses.replace(SMALL_IMAGE, latent='vector', norm='layer')
MODEL = dynamics.Config(
  widths=(8,), outcome_widths=(8,), members=3, elites=2, held_out=0.3
)
# Rates so large that a wrong one would show.
ATAC = {'fast_rate': 1e-2, 'slow_rate': 3e-3, 'target_rate': 0.1, 'gamma': 0.9}
few_samples = dataclasses.replace(game_cases.CONFIG.search, num_samples=4)

AGENTS = {
  'muzero': searching(mz(search=puct, network=BATCH_NORM)),
  'muzero gumbel adam': searching(mz(search=gumbel, optimiser='adam')),
  'muzero -reanalyze': searching(
    mz(reanalyze_fraction=0.0, reanalyze_values=False)
  ),
  'efficientzero': searching(ez(network=BATCH_NORM)),
  'efficientzero -value prefix': searching(ez(value_prefix=False)),
  'efficientzero -consistency': searching(ez(consistency=False)),
  'efficientzero -off-policy correction': searching(
    ez(dynamic_horizon=False, searched_values=False)
  ),
  'efficientzero -reanalyze': searching(ez(reanalyze_fraction=0.0)),
  'efficientzero image': searching(ez(IMAGE, network=SMALL_IMAGE)),
  'efficientzero image -augmentation': searching(
    ez(IMAGE, network=vector_latent, augmentation=False)
  ),
  'sampled_muzero': searching(sampled()),
  'sampled_efficientzero': searching(
    sampled(
      search=SAMPLES,
      policy='factored',
      bins=3,
      network=BATCH_NORM,
      value_prefix=True,
      consistency=True,
      dynamic_horizon=True,
      searched_values=True,
    )
  ),
  'sampled_muzero joint': searching(
    sampled(
      JOINT,
      policy='flat',
      search=dataclasses.replace(SAMPLES, replacement=False),
    )
  ),
  'sampled_muzero image gumbel -reanalyze': searching(
    sampled(
      IMAGE._replace(action=BOX.action),
      network=SMALL_IMAGE,
      search=dataclasses.replace(SAMPLES, rule='gumbel'),
      reanalyze_fraction=0.0,
    )
  ),
  'efficientzero_v2': searching(v2()),
  'efficientzero_v2 image': searching(
    v2(
      IMAGE,
      network=dataclasses.replace(SMALL_IMAGE, action_embedding=3),
      search=gumbel,
      value_prefix=True,
      optimiser='sgd',
    )
  ),
  'alphazero': Row(
    alphazero, game_cases.CONFIG, game_cases.ENV.spec, game_cases.make_batch
  ),
  'alphazero sampled': Row(
    alphazero,
    dataclasses.replace(game_cases.CONFIG, sampled=True, search=few_samples),
    game_cases.ENV.spec,
    game_cases.make_batch,
  ),
  'td_gammon': Row(
    td_gammon, game_cases.RACER, game_cases.RACE.spec, game_cases.make_row
  ),
  'language': Row(
    language,
    language_cases.CONFIG,
    language_cases.SPEC,
    language_cases.make_batch,
  ),
  'sac': offline(sac),
  'sac dqra': offline(
    sac, residual_weight=0.5, layer_norm=True, normalise=True
  ),
  'bc': offline(bc),
  'bc floor': offline(bc, min_entropy=-2.0, normalise=True),
  'bc squared': offline(bc, loss='squared', layer_norm=True),
  'td3_bc': offline(td3_bc),
  'td3': offline(td3_bc, behaviour_cloning=False, normalise=False),
  'td3_bc dqra': offline(td3_bc, residual_weight=0.5, layer_norm=True),
  'cql': offline(cql, num_samples=3, layer_norm=True, normalise=True),
  'cql lagrange': offline(
    cql, num_samples=2, gap_target=1.0, deterministic_backup=False
  ),
  'iql': offline(iql),
  'iql constant rate': offline(
    iql, cosine=False, layer_norm=True, normalise=True
  ),
  'dynamics': offline(dynamics, **dataclasses.asdict(MODEL)),
  'combo': offline(
    combo,
    offline_cases.make_mixed,
    num_samples=2,
    rollout_length=3,
    rollout_batch=4,
    model_capacity=24,
    model_updates=5,
    model=MODEL,
  ),
  'atac': offline(atac, **ATAC),
  'atac initial': offline(
    atac,
    offline_cases.make_batch_with_starts,
    pessimism='initial',
    normalise=True,
    **ATAC,
  ),
  'atac warm start': offline(atac, make=small_agents.make_warm_start, **ATAC),
}
SEARCHING = [
  name
  for name, row in AGENTS.items()
  if row.make_batch is searching_cases.make_batch
]
OFFLINE = [
  name for name, row in AGENTS.items() if row.spec is offline_cases.SPEC
]


def make(name, spec=None, **changes):
  """The agent of a row, with fields of its config changed."""
  row = AGENTS[name]
  config = dataclasses.replace(row.config, **changes)
  return row.make(row.module, config, spec or row.spec)


@functools.cache
def built(name: str) -> Built:
  """A row's agent, compiled at most once in a process of tests."""
  module, config, spec, make_batch, make = AGENTS[name]
  agent, traces = make(module, config, spec), [0]

  def update(state, batch, key):
    traces[0] += 1
    return agent.update(state, batch, key)

  init = jax.jit(agent.init)
  donating = jax.jit(update, donate_argnums=0)
  return Built(
    module=module,
    config=config,
    spec=spec,
    agent=agent,
    init=init,
    state=init(jax.random.key(1)),
    batch=make_batch(config, spec),
    donating=donating,
    update=lambda state, *rest: donating(jax.tree.map(jnp.copy, state), *rest),
    evaluate=agent.evaluate and jax.jit(agent.evaluate),
    refresh=agent.refresh and jax.jit(agent.refresh),
    traces=traces,
  )
