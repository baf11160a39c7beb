"""Programs compiled for 2 and for 8 devices of a CPU, 8 rows a device.

`python scaling.py NAME...` prints as JSON what the compiler counts for one
device: operations, and kinds, numbers and bytes of what devices exchange. It
is a process of its own, because that of the tests has two devices.
"""

import collections
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import conftest  # noqa: F401 (how tests compile)
import jax
import jax.numpy as jnp
import numpy as np
import offline_cases
import test_mesh

from agents import (
  atac,
  bc,
  combo,
  cql,
  efficientzero,
  efficientzero_v2,
  iql,
  language,
  muzero,
  sac,
  sampled_muzero,
  td3_bc,
)
from agents.core import latent, planning, unroll
from agents.core.types import ArraySpec, Discrete, Mixed, Spec, Text
from experiments import build
from experiments.runtime import loop
from experiments.runtime import mesh as meshes
from networks import language as networks_language
from networks import moe
from networks.routers import NoisyTopK

ROWS = 8
_EXCHANGE = re.compile(
  r'= (.*?) '
  r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)
_ARRAY = re.compile(r'[a-z]+(\d+)\[([\d,]*)\]')
_SMALL = {'hidden_sizes': (8, 8)}


def count(compiled: Any) -> dict[str, Any]:
  """What a device does in a compiled program."""
  kinds, size = collections.Counter(), 0
  for shapes, kind in _EXCHANGE.findall(compiled.as_text()):
    kinds[kind] += 1
    for bits, axes in _ARRAY.findall(shapes):
      numbers = math.prod(int(n) for n in axes.split(',') if n)
      size += int(bits) * numbers // 8
  flops = compiled.cost_analysis()['flops']
  return {'flops': flops, 'exchanges': dict(kinds), 'bytes': size}


def _learned(module, spec, **changes):
  """A small agent with a learned model, and a batch for so many devices."""
  search = planning.SearchConfig(num_simulations=2, num_samples=3)
  own = {'search': search, 'reanalyze_fraction': 0.5, **changes}
  config = module.Config(**{**test_mesh.SHARED, **own})
  networks = module.make_networks(config, spec)
  agent = module.make(config, networks, module.make_losses(), spec)

  def batch(mesh):
    size = ROWS * mesh.size
    made = test_mesh.make_batch(size)
    first = jax.tree.map(lambda x: x[:, 0], made.experience.timestep)
    key = jax.random.key(0)
    params = jax.eval_shape(agent.init, key).params
    made_up = jax.eval_shape(agent.act, params, key, first)
    action, extras = jax.tree.map(
      lambda x: jnp.zeros((size, 5, *x.shape[1:]), x.dtype), made_up
    )
    experience = made.experience._replace(action=action, extras=extras)
    return made._replace(experience=experience)

  return agent, batch


def _on_data(module, **changes):
  """A small agent that learns from a data set, and its batches."""
  config = module.Config(**_SMALL, **changes)
  agent = offline_cases.make_agent(module, config)

  def batch(mesh):
    return offline_cases.make_batch(size=ROWS * mesh.size)

  return agent, batch


def _of_text():
  """A small language model with experts, whole on every device."""
  length, vocabulary = 4, 256
  mixture = moe.Config(4, NoisyTopK(k=2), hidden=8)
  config = language.Config(
    network=networks_language.Config(size=8, moe=mixture),
    text=language.TextConfig(vocabulary, length),
  )
  spec = Spec(ArraySpec((length,), np.int32), Discrete(vocabulary))
  agent = language.make(
    config,
    language.make_networks(config, spec),
    language.make_losses(),
    spec,
  )

  def batch(mesh):
    return Text(jnp.zeros((ROWS * mesh.size, length + 1), jnp.int32))

  return agent, batch


def _update(agent, batch) -> Callable:
  def compiled(mesh):
    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key)
    update = meshes.jit_update(agent, mesh)
    return update.lower(state, batch(mesh), key).compile()

  return compiled


def _refresh(agent, batch) -> Callable:
  def compiled(mesh):
    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key)
    refresh = meshes.compile_refresh(agent, mesh)
    return refresh.lower(state, batch(mesh), 0, key).compile()

  return compiled


def _act(agent, batch) -> Callable:
  def compiled(mesh):
    key = jax.random.key(0)
    first = jax.tree.map(lambda x: x[:, 0], batch(mesh).experience.timestep)
    params = jax.eval_shape(agent.init, key).params
    act = jax.jit(meshes.by_rows(agent.act, mesh, (2,)))
    return act.lower(params, key, first).compile()

  return compiled


def _interval(preset, *settings) -> Callable:
  """An environment in JAX, replay, reanalysis and updates as one program."""

  def compiled(mesh):
    size = ROWS * mesh.size
    own = (
      f'batch_size={size}',
      f'env.num_envs={size}',
      f'warmup_decisions={16 * size}',
      f'replay_capacity={64 * size}',
    )
    experiment = build.describe(
      preset, env='jax:catch', steps=64 * size, settings=(*settings, *own)
    )
    env = build.make_env(experiment, training=True)
    agent = build.make_agent(experiment, env.spec)
    layout = build.Layout(mesh, (), mesh.size)
    source = build.make_source(experiment, env, agent, layout)
    key = jax.random.key(0)
    carry = jax.eval_shape(lambda: loop.init(agent, source, key))
    interval = meshes.compile_interval(agent, source, mesh)
    return interval.lower(carry, key, jnp.int32(0)).compile()

  return compiled


def _mixed(mesh):
  half = offline_cases.make_batch(size=ROWS // 2 * mesh.size)
  return Mixed(half, half)


def _flattened(networks, similarity, params, statistics, states, real, train):
  """`unroll.consistency` with a row's steps apart, as once it was."""
  real = unroll.flatten_steps(jnp.swapaxes(real, 0, 1))[:, None]
  found, statistics = unroll.consistency(
    networks,
    similarity,
    params,
    statistics,
    unroll.flatten_steps(states)[None],
    real,
    train,
  )
  loss = found.loss.reshape(states.shape[:2])
  return found._replace(loss=loss), statistics


def _planted(mesh):
  right = latent.consistency
  latent.consistency = _flattened
  try:
    return _update(*_learned(efficientzero, test_mesh.SPEC))(mesh)
  finally:
    latent.consistency = right


def programs() -> dict[str, Callable]:
  """`(mesh) -> compiled` by name."""
  learned = {
    'muzero': lambda: _learned(muzero, test_mesh.SPEC),
    'efficientzero': lambda: _learned(efficientzero, test_mesh.SPEC),
    'efficientzero_v2': lambda: _learned(
      efficientzero_v2, test_mesh.CONTINUOUS
    ),
    'sampled_muzero': lambda: _learned(
      sampled_muzero, test_mesh.CONTINUOUS, consistency=True
    ),
  }
  found = {'planted': _planted}
  for name, make in learned.items():
    for what in (_update, _refresh, _act):
      found[f'{name}{what.__name__}'] = _later(what, make)
  for module in (atac, bc, cql, iql, sac, td3_bc):
    name = module.__name__.split('.')[-1]
    found[f'{name}_update'] = _later(_update, lambda m=module: _on_data(m))
  found['combo_update'] = _later(_update, lambda: (_on_data(combo)[0], _mixed))
  found['language_update'] = _later(_update, _of_text)
  found['muzero_interval'] = _interval('muzero_catch', 'num_simulations=2')
  return found


def _later(what, make) -> Callable:
  return lambda mesh: what(*make())(mesh)


def main(names: list[str]) -> Iterator[tuple[str, Any]]:
  """What is counted of programs, on 2 and on 8 devices."""
  known = programs()
  for name in names:
    yield (
      name,
      [
        count(known[name](meshes.make_mesh(jax.devices()[:size])))
        for size in (2, 8)
      ],
    )


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps(dict(main(sys.argv[1:]))))
