"""Builds a model for planners from an actor, a critic and dynamics.

Networks that were trained offline become the parts of model predictive control
(Bertsekas 2022, "Lessons from AlphaZero", chapter 5): the actor proposes
candidate actions and is the base policy of rollouts, the critic is the terminal
cost, and the dynamics, the exact simulator's or learned from the same data,
step from one to the other:

  planner = lookahead.lookahead(1)
  inner = planning_model(agent, q, exact(env), spec, gamma=0.99)
  model = rollout.truncated(inner, base_policy(agent), steps=8)
  planner(model, Params(agent_params, None), key, timestep).action

Embeddings are observations, so the exact dynamics must recover the simulator's
state from them; `STATES` lists the simulators where that is possible.

Axes: `B` batch, `K` candidates, `D` components of an action.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Params(NamedTuple):
  """The parameters of a planner's model.

  `agent` is an agent's `state.params`; `dynamics` is None for exact ones.
  """

  agent: Any
  dynamics: Any


class Change(NamedTuple):
  """The result of an action.

  Attributes:
    observation: pytree `[B, ...]`, float32.
    reward: float32 `[B]`, in the simulator's or the data set's units.
    discount: float32 `[B]`, 0 at termination, or the probability that the
      episode continues.
  """

  observation: Any
  reward: Any
  discount: Any


# `(params, observation [B, ...], action [B, D]) -> Change`.
Dynamics = Callable[[Any, Any, Any], Change]


def _pendulum(observation):
  import jax.numpy as jnp

  from experiments.envs.pendulum import PendulumState

  cosine, sine, speed = observation
  return PendulumState(jnp.arctan2(sine, cosine), speed, jnp.int32(0))


def _swingup(observation):
  import jax.numpy as jnp

  from experiments.envs.swingup import SwingupState

  x, cosine, sine, v, spin = observation
  angle = jnp.arctan2(sine, cosine)
  return SwingupState(jnp.stack([x, angle, v, spin]), jnp.int32(0))


# By the simulator's name: `(observation) -> state`, unbatched. The time step is
# 0, because no observation contains the time.
STATES = {'Pendulum': _pendulum, 'Swingup': _swingup}
# Environments, and our simulator with the same dynamics (for the control
# suite's cart-pole, up to the tolerances of MuJoCo's solver).
EXACT = {
  'jax:pendulum': 'jax:pendulum',
  'Pendulum-v1': 'jax:pendulum',
  'gymnasium:Pendulum-v1': 'jax:pendulum',
  'jax:swingup': 'jax:swingup',
  'CartpoleSwingup-v1': 'jax:swingup',
}


def exact(env: Any) -> Dynamics:
  """The dynamics of a simulator, with its state recovered from observations.

  Time limits are left out: nothing is ever truncated. The environment is
  unbatched and without chance.

  Raises:
    ValueError: its state cannot be recovered from its observation.
  """
  import jax

  if env.spec.name not in STATES:
    raise ValueError(
      f'env={env.spec.name}: its state cannot be recovered from an '
      f'observation; must be one of {", ".join(STATES)}'
    )
  restore = STATES[env.spec.name]

  def one(observation, action):
    # Its step draws no random numbers, so any key will do.
    state = restore(observation)
    _, timestep = env.step(state, action, jax.random.key(0))
    return Change(timestep.observation, timestep.reward, timestep.discount)

  def dynamics(params, observation, action):
    del params
    return jax.vmap(one)(observation, action)

  return dynamics


def learned(ensemble: Any, reward_factor: float = 1.0) -> Dynamics:
  """The mean prediction of an ensemble's elites, as dynamics.

  The parameters are `agents.core.rollout.ModelParams`. Rewards are divided by
  `reward_factor`, that of the training data.
  """
  from agents.core import rollout

  def dynamics(params, observation, action):
    out = rollout.expect(ensemble, params, observation, action)
    return Change(out.o_t, out.r_t / reward_factor, out.discount_t)

  return dynamics


def critic_value(networks: Any, value: str = 'min') -> Callable[..., Any]:
  """Reduces an agent's critics to one: `(agent_params, o, a [B, D]) -> [B]`.

  The value is the `'min'` of E critics, as in the agents' own targets, or the
  `'mean'`, of `networks.critic.apply(params.critic, o, a) -> [E, B]`.

  Raises:
    ValueError: `value` is neither, or the networks have no critic.
  """
  import jax.numpy as jnp

  reductions = {'min': jnp.min, 'mean': jnp.mean}
  if value not in reductions:
    raise ValueError(f"value={value!r}: must be 'min' or 'mean'")
  if not hasattr(networks, 'critic'):
    raise ValueError('networks: have no critic; must have one to value states')

  def q(params, observation, action):
    each = networks.critic.apply(params.critic, observation, action)
    return reductions[value](each, axis=0)

  return q


def planning_model(
  agent: Any,
  q: Callable[..., Any],
  dynamics: Dynamics,
  spec: Any,
  *,
  gamma: float,
  reward_factor: float = 1.0,
  num: int = 8,
  proposal: str = 'actor',
) -> Any:
  """The `search.model.Model` of a planner, with `actions`, over `Params`.

  The value of a state is the critic's value of the actor's mode there, in the
  critic's units: rewards are multiplied by `reward_factor`. Prior logits are 0.

  Args:
    agent: its `act` and `exploit` read only observations.
    gamma: discount per decision.
    reward_factor: of the rewards in the critic's training data.
    num: K, number of candidates per state: the actor's mode and K - 1 more.
    proposal: where these come from: drawn from the exploring `'actor'`, or
      uniformly from the `'box'` of all actions.

  Raises:
    ValueError: an argument is out of range.
  """
  import jax
  import jax.numpy as jnp
  import mctx

  from search.model import Model

  if num < 1:
    raise ValueError(f'candidates={num}: must be 1 or more')
  if proposal not in ('actor', 'box'):
    raise ValueError(f"proposal={proposal!r}: must be 'actor' or 'box'")
  mode = _chosen(agent.exploit)
  explored = _chosen(agent.act)
  low, high = jnp.asarray(spec.action.low), jnp.asarray(spec.action.high)

  def opinion(params, observation):
    rows = jax.tree.leaves(observation)[0].shape[0]
    action = mode(params.agent, jax.random.key(0), observation)
    value = q(params.agent, observation, action)
    return {'prior_logits': jnp.zeros((rows, num)), 'value': value}

  def root(params, timestep, key):
    del key
    observation = jax.tree.map(
      lambda x: x.astype(jnp.float32), timestep.observation
    )
    return mctx.RootFnOutput(
      embedding=observation, **opinion(params, observation)
    )

  def step(params, key, action, embedding):
    del key
    change = dynamics(params.dynamics, embedding, action)
    output = mctx.RecurrentFnOutput(
      reward=reward_factor * change.reward,
      discount=gamma * change.discount,
      **opinion(params, change.observation),
    )
    return output, change.observation

  def actions(params, key, embedding):
    first = mode(params.agent, key, embedding)[:, None]
    if num == 1:
      return first
    if proposal == 'box':
      shape = (first.shape[0], num - 1, *first.shape[2:])
      unit = jax.random.uniform(key, shape)
      fit = lambda x: jnp.broadcast_to(x, shape)
      return jnp.concatenate([first, fit(low) + fit(high - low) * unit], 1)
    keys = jax.random.split(key, num - 1)
    draw = lambda key: explored(params.agent, key, embedding)
    return jnp.concatenate([first, jax.vmap(draw, out_axes=1)(keys)], 1)

  return Model(root, step, actions=actions)


def base_policy(agent: Any) -> Callable[..., Any]:
  """The actor's mode as a policy for `rollout.truncated`."""
  mode = _chosen(agent.exploit)

  def policy(params, key, prior_logits, embedding):
    del prior_logits
    return mode(params.agent, key, embedding)

  return policy


def actor_planner(agent: Any) -> Callable[..., Any]:
  """A planner that does not plan: it takes the actor's mode."""

  def planner(model, params, key, timestep):
    import jax.numpy as jnp

    from search.model import PolicyOutput

    action = agent.exploit(params.agent, key, timestep)[0]
    value = model.root(params, timestep, key).value
    return PolicyOutput(action, jnp.ones((*value.shape, 1)), value)

  return planner


def critic_planner(q: Callable[..., Any]) -> Callable[..., Any]:
  """A planner without a model, l = 0: it takes the candidate of highest Q."""

  def planner(model, params, key, timestep):
    import jax
    import jax.numpy as jnp

    from search import lookahead
    from search.model import PolicyOutput

    observation = model.root(params, timestep, key).embedding
    actions = model.actions(params, key, observation)
    tried, node = lookahead.pairs(actions, observation)
    value = q(params.agent, node, tried).reshape(actions.shape[:2])
    slot = jnp.argmax(value, axis=-1)
    return PolicyOutput(
      lookahead.take(actions, slot),
      jax.nn.one_hot(slot, value.shape[1]),
      jnp.max(value, axis=-1),
      sampled_actions=actions,
      qvalues=value,
    )

  return planner


def _chosen(act):
  """An agent's `act` or `exploit` as `(params, key, observation) -> action`."""

  def choose(params, key, observation):
    from search import rollout

    return rollout.acting(act)(params, key, None, observation)

  return choose
