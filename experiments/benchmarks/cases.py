"""How much each suite of `experiments.benchmark` measures, by machine."""

from collections.abc import Sequence
from typing import NamedTuple


class Case(NamedTuple):
  """How much is measured; every suite reads the fields that it needs.

  Attributes:
    repeats: of every measurement, at most.
    least_seconds: calls are repeated until one measurement takes as long.
    seeds: N of each program that trains, or applies, several seeds.
    batch: roots of a search; rows of an update of large networks.
    matrix: rows of the square matrices whose product is the peak.
    actions: of the table model that is searched.
    deep: simulations of the deep searches.
    embeddings: float32 numbers in an embedding, in addition to the state.
    steps: of a simulator in one measurement.
    more_seeds: N of each program of the presets' networks; () leaves those
      presets out.
    devices: numbers of devices that share an update.
    triad: float32 numbers of each of the triad's three arrays.
    memory_share: of the free memory; a program that needs more is not run.
    width: of the hidden layers of large networks.
    small_width: of those of small ones.
    small_batch: rows of an update of small networks.
    tokens: T.
    features: D.
    hidden: width of an expert.
    k: experts of a token.
    experts: E, one comparison each.
    ragged: E up to which `ragged_dot` is measured, which is dense on a CPU.
    seed_tokens: T of each of several seeds.
    roots: of the searches of the accelerator suite.
    envs: numbers of environments that act at once.
    transfer: bytes sent to the device.
    smaller: settings of the presets that the accelerator suite measures.
    patience: times the accelerator suite's time limits.
  """

  repeats: int = 5
  least_seconds: float = 0.3
  seeds: tuple[int, ...] = ()
  batch: int = 64
  matrix: int = 2048
  updates: int = 100
  # Searches, and the simulator.
  actions: int = 6
  simulations: int = 50
  deep: tuple[int, ...] = (200, 800)
  embeddings: tuple[int, ...] = (0, 3328)
  steps: int = 200
  # Seeds and devices.
  more_seeds: tuple[int, ...] = (64,)
  devices: tuple[int, ...] = (1, 2, 4, 8)
  triad: int = 2**24
  memory_share: float = 0.6
  # Learning from a data set.
  rows: int = 200_000
  width: int = 256
  small_width: int = 64
  small_batch: int = 128
  # Experts.
  tokens: int = 4096
  features: int = 256
  hidden: int = 1024
  k: int = 2
  experts: tuple[int, ...] = (8, 32, 128)
  ragged: int = 8
  seed_tokens: int = 1024
  # A first look at an accelerator.
  roots: tuple[int, ...] = (64, 1024)
  envs: tuple[int, ...] = (1, 4, 16, 64)
  transfer: int = 100_000_000
  smaller: tuple[str, ...] = ()
  patience: float = 1.0


_AGENT = Case(repeats=10_000)
_SCALE = Case(seeds=(1, 4, 16, 64, 256), least_seconds=0.5)
_LARGE = _SCALE._replace(matrix=8192, triad=2**26)
_OFFLINE = Case(seeds=(8,), batch=256, updates=50, least_seconds=1.0)
_EXPERTS = Case(seeds=(4,))
_ACCELERATOR = Case(
  repeats=5,
  least_seconds=0.0,
  seeds=(64, 1024),
  more_seeds=(),
  matrix=8192,
  triad=2**26,
  embeddings=(0, 3328),
  width=256,
  tokens=16_384,
  features=512,
  hidden=2048,
  experts=(8, 32),
  ragged=32,
)
# The same rows where there is no accelerator, to see that they run.
_ACCELERATOR_SMALL = _ACCELERATOR._replace(
  repeats=2,
  seeds=(2, 4),
  batch=16,
  matrix=64,
  updates=2,
  simulations=6,
  embeddings=(0, 16),
  triad=2**12,
  rows=500,
  width=8,
  small_width=4,
  small_batch=8,
  tokens=64,
  features=16,
  hidden=32,
  experts=(2, 4),
  roots=(4, 8),
  envs=(1, 2),
  transfer=10_000,
  smaller=(
    'batch_size=4',
    'num_simulations=4',
    'network.channels=8',
    'replay_capacity=2000',
  ),
  patience=6.0,
)
# By suite, machine and amount; a missing machine takes the CPU's.
CASES = {
  ('agent', 'cpu', 'full'): _AGENT,
  ('agent', 'cpu', 'quick'): _AGENT._replace(
    least_seconds=0.0,
    batch=4,
    simulations=8,
    deep=(12,),
    embeddings=(0,),
    matrix=64,
    steps=5,
    updates=4,
  ),
  # Two minutes on two cores.
  ('frames', 'cpu', 'full'): Case(
    repeats=5, least_seconds=0.0, batch=256, rows=3000, updates=10
  ),
  ('frames', 'cpu', 'quick'): Case(
    repeats=2, least_seconds=0.0, batch=4, rows=200, updates=2
  ),
  # Ten minutes on two cores.
  ('scale', 'cpu', 'full'): _SCALE,
  ('scale', 'cpu', 'quick'): Case(
    repeats=2,
    least_seconds=0.0,
    seeds=(2,),
    more_seeds=(),
    devices=(1, 2),
    matrix=64,
    triad=2**12,
  ),
  ('scale', 'accelerator', 'full'): _LARGE._replace(
    seeds=(1, 4, 16, 64, 256, 1024), more_seeds=(1, 16, 64, 256)
  ),
  # Three minutes on a GPU.
  ('scale', 'accelerator', 'quick'): _LARGE._replace(
    seeds=(1, 64, 1024), more_seeds=()
  ),
  # A minute on a core.
  ('offline', 'cpu', 'full'): _OFFLINE,
  ('offline', 'accelerator', 'full'): _OFFLINE._replace(seeds=(8, 64, 256)),
  ('offline', 'cpu', 'quick'): Case(
    repeats=2,
    least_seconds=0.0,
    seeds=(2,),
    batch=16,
    updates=2,
    rows=500,
    width=8,
    small_width=4,
    small_batch=8,
  ),
  ('accelerator', 'accelerator', 'full'): _ACCELERATOR,
  ('accelerator', 'cpu', 'full'): _ACCELERATOR_SMALL,
  ('accelerator', 'cpu', 'quick'): _ACCELERATOR_SMALL,
  # Two minutes on a core.
  ('experts', 'cpu', 'full'): _EXPERTS,
  ('experts', 'accelerator', 'full'): _EXPERTS._replace(
    tokens=16384, ragged=128
  ),
  ('experts', 'cpu', 'quick'): Case(
    repeats=2,
    least_seconds=0.0,
    seeds=(2,),
    tokens=16,
    features=4,
    hidden=8,
    experts=(4,),
    ragged=4,
    seed_tokens=8,
  ),
}


def find(
  suite: str, quick: bool = False, repeats: int = 5, seeds: Sequence[int] = ()
) -> Case:
  """The case of a suite on this machine's devices.

  Suites are `agent` (searches, learner, acting), `frames`, `scale`, `offline`,
  `experts` and `accelerator`. `quick` is fewer or smaller, on a CPU just enough
  to see that it runs; `repeats` are at most the case's; `seeds` replace the
  case's.

  Raises:
    ValueError: a number of seeds below 1.
  """
  import jax

  for number in seeds:
    if number < 1:
      raise ValueError(f'seeds={number}: must be at least 1')
  machine = 'cpu' if jax.default_backend() == 'cpu' else 'accelerator'
  amount = 'quick' if quick else 'full'
  case = CASES.get((suite, machine, amount), CASES[suite, 'cpu', amount])
  case = case._replace(repeats=min(repeats, case.repeats))
  if seeds:
    more = tuple(seeds) if case.more_seeds else ()
    case = case._replace(seeds=tuple(seeds), more_seeds=more)
  return case
