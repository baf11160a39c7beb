"""Experts divided over 8 devices of a CPU, next to one device.

`python moe_divided.py` prints as JSON, for each case, how far the numbers are
from those of one device, what was dropped and the rounds that it took; and for
2, 4 and 8 devices with as many tokens each, what a device sends. It is a
process of its own, because that of the tests has two devices.
"""

import functools
import json
from typing import Any

import conftest  # noqa: F401 (how tests compile)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from experiments.runtime import compiled
from experiments.runtime import mesh as meshes
from networks import dispatch, expert_parallel, moe, routers
from networks.routing import ByToken

EXPERTS, FEATURES, OUTPUTS = 16, 5, 3
EXPERT = dispatch.Expert(
  lambda params, x: jnp.tanh(x @ params['kernel']) + params['bias'][None]
)


def _inputs(expert: Any) -> Any:
  """Gates, tokens and parameters, then experts and targets."""
  rng = np.random.default_rng(0)
  float32 = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tokens = expert.shape[0]
  gate = np.where(expert < EXPERTS, float32(*expert.shape), 0)
  params = {
    'kernel': float32(EXPERTS, FEATURES, OUTPUTS),
    'bias': float32(EXPERTS, OUTPUTS),
  }
  x, target = float32(tokens, FEATURES), float32(tokens, OUTPUTS)
  return np.float32(gate), x, params, np.int32(expert), target


def cases() -> dict[str, Any]:
  """Experts of tokens `[T, 2]`, by name."""
  rng = np.random.default_rng(1)
  some = lambda tokens, experts: np.stack(
    [rng.permutation(experts)[:2] for _ in range(tokens)]
  )
  odd = some(37, EXPERTS)
  odd[[0, 5, 6], 1] = odd[6, 0] = EXPERTS
  return {
    # Does not divide; places are empty, and so is a token.
    'odd': odd,
    # More devices than tokens.
    'few': some(5, EXPERTS),
    # Experts from 6 on have no tokens, nor have devices from 3 on.
    'idle': some(48, 6),
    # All tokens to both experts of device 1.
    'one': np.tile([3, 2], (48, 1)),
    'one_expert': np.tile([3, EXPERTS], (48, 1)),
  }


def _gradients(layer, gate, x, params, expert, target):
  def loss(gate, x, params):
    y, *told = layer(ByToken(expert, gate), x, params, EXPERT)
    return jnp.sum((y - target) ** 2), (y, told)

  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(gate, x, params)


def _under(mesh, function):
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args)

  return traced


def compare(expert: Any, mesh: Any, **options: Any) -> dict[str, float]:
  """The largest distance from one device, what was dropped, and rounds."""
  args = _inputs(expert)
  dense = functools.partial(dispatch.apply, backend='dense')
  layer = functools.partial(expert_parallel.apply, axis=meshes.AXIS, **options)
  (_, (want, _)), want_bars = jax.jit(functools.partial(_gradients, dense))(
    *args
  )
  divided = jax.jit(
    _under(mesh, functools.partial(_gradients, layer)),
    in_shardings=meshes.replicated(mesh),
  )
  (_, (y, (dropped, rounds))), bars = divided(*args)
  far = lambda a, b: float(np.max(np.abs(a - b)))
  apart = jax.tree.map(far, (y, bars), (want, want_bars))
  return {
    'apart': max(jax.tree.leaves(apart)),
    'dropped': float(dropped),
    'rounds': float(rounds),
  }


def sent(size: int) -> dict[str, Any]:
  """What a device does of a layer with 64 tokens and 2 experts a device."""
  mesh = meshes.make_mesh(jax.devices()[:size])
  # So that there are further rounds on two devices, too.
  config = moe.Config(2 * size, routers.NoisyTopK(k=2), room_factor=1.0)
  layer = moe.MoE(config, moe.FeedForward(16, 8))
  x = jax.ShapeDtypeStruct((64 * size, 8), jnp.float32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)['params']

  def loss(params, x):
    y, aux = layer.apply({'params': params}, x)
    return jnp.sum(y**2) + aux.loss

  rows = meshes.split(mesh)
  where = meshes.state_sharding(params, mesh)
  assert where['experts']['in']['kernel'].spec == PartitionSpec(meshes.AXIS)
  program = jax.jit(
    _under(mesh, jax.grad(loss)),
    in_shardings=(where, rows),
    out_shardings=where,
  )
  code = compiled.read(program.lower(params, x).compile().as_text())
  kinds = {i.opcode for i in code} & set(compiled.COLLECTIVES)
  return {
    'kinds': sorted(kinds),
    'exchanged': [i.size for i in code if i.opcode == 'all-to-all'],
  }


def main() -> dict[str, Any]:
  """All of it by name."""
  eight = meshes.make_mesh()
  found: dict[str, Any] = {}
  for name, expert in cases().items():
    found[name] = compare(expert, eight)
  found['dropping'] = compare(
    cases()['one'], eight, backend='capacity', capacity_factor=4.0
  )
  found['sent'] = [sent(size) for size in (2, 4, 8)]
  return found


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps(main()))
