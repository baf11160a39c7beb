"""Makes `experiments.collect`'s data sets, which it describes.

A training that was stopped resumes from its last checkpoint (`behaviour`).
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import pathlib
import secrets
import shutil
from typing import Any, NamedTuple

import numpy as np

from experiments.build import capacity
from experiments.envs import names
from experiments.files import arrays, locking, reading, tables, writing
from experiments.files.errors import Missing, shown
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import metrics, run_config, signals
from experiments.training import behaviour, collector, plan, words

# Each after those that it is made of.
QUALITIES = ('random', 'medium', 'medium-replay', 'expert', 'medium-expert')
# These must not play the same episodes.
_STREAMS = ('train', 'evaluate', 'reference', *QUALITIES)
_GAMES = 16
# Of the best evaluations, so many play again for which is the expert.
_FINAL = 3
# What is written of an evaluation.
_EVALUATED = ('decisions', 'mean_return')


@dataclasses.dataclass(frozen=True)
class Collection:
  """How an agent is trained to collect with.

  Attributes:
    num_envs: simulators that it is trained in.
    warmup: decisions at random, before the first update.
    batch_size: transitions an update.
    updates: updates a decision; times `num_envs` it must be whole.
    evaluate_every: decisions between evaluations.
    evaluate_episodes: of each.
    reference_episodes: for `ref_min` and `ref_max` each.
    medium_share: how far from `ref_min` to `ref_max` medium is.
    options: the environment's own, `name=value` each; saved with the data,
      whose learners are evaluated with them.
  """

  num_envs: int = 8
  warmup: int = 10_000
  batch_size: int = 256
  updates: float = 1.0
  evaluate_every: int = 5_000
  evaluate_episodes: int = 16
  reference_episodes: int = 100
  medium_share: float = 1 / 3
  options: tuple[str, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and value < 1:
        raise ValueError(f'{field.name}={value}: must be at least 1')
    updates = self.updates * self.num_envs
    if not math.isfinite(updates) or updates < 1 or updates != round(updates):
      raise ValueError(
        f'updates={self.updates}: times num_envs={self.num_envs} it must be a '
        'whole number of at least 1'
      )
    if not 0 < self.medium_share < 1:
      raise ValueError(
        f'medium_share={self.medium_share}: must be between 0 and 1'
      )


# Networks and rates that solve the task within a minute on two cores, and
# evaluations that are frequent enough to catch the policy half way.
_SMALL = {'hidden_sizes': (64, 64)} | dict.fromkeys(
  ('policy_rate', 'critic_rate', 'temperature_rate'), 1e-3
)
_QUICK = Collection(
  num_envs=4, warmup=1_000, batch_size=128, evaluate_every=200
)
# Decisions, fields of `sac.Config`, `Collection`.
TASKS: dict[str, tuple[int, dict[str, Any], Collection]] = {
  'Pendulum-v1': (8_000, _SMALL, _QUICK),
  'InvertedDoublePendulum-v4': (
    12_000,
    _SMALL,
    dataclasses.replace(_QUICK, evaluate_episodes=8),
  ),
  'CartpoleSwingup-v1': (
    15_000,
    {**_SMALL, 'gamma': 0.98},
    dataclasses.replace(_QUICK, options=('action_repeat=8',)),
  ),
}
OTHERS: tuple[int, dict[str, Any], Collection] = (300_000, {}, Collection())


class Trained(NamedTuple):
  """What a training leaves.

  Attributes:
    params: `sac.Params` of `medium` and `expert`.
    facts: `ref_min`, `ref_max`, the environment's options, and each policy's
      decisions and return.
  """

  params: dict[str, Any]
  facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Policy:
  """A policy in facts.json."""

  decisions: int
  mean_return: float
  params: arrays.Stored


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What facts.json holds; see `Trained`."""

  ref_min: float
  ref_max: float
  medium: _Policy
  expert: _Policy
  options: list[str] = dataclasses.field(default_factory=list)


def run(
  env_name: str,
  out: pathlib.Path,
  *,
  steps: int,
  transitions: int,
  seed: int,
  sac: Any,
  collection: Collection,
  minari: bool = False,
) -> None:
  """Makes the data sets that are missing, and prints what there is.

  `steps` are decisions of the training; `transitions` are rows of random,
  medium and expert each; `sac` is `agents.sac.Config`; `minari` also writes
  Minari's folders.

  Raises:
    ValueError: settings that do not fit, a folder of other settings, or a
      training that did not reach medium.
  """
  if steps <= collection.warmup:
    raise ValueError(
      f'steps={steps}: must be more than warmup={collection.warmup}'
    )
  if minari and importlib.util.find_spec('h5py') is None:
    raise ValueError("minari: needs h5py: pip install 'outplay[hdf5]'")
  env = collector.simulators(env_name, collection.num_envs, collection.options)
  if not hasattr(env.spec.observation, 'shape'):
    raise ValueError(
      f'env={env_name}: observations of several arrays, must be a single one'
    )
  agent = collector.make_agent(sac, env.spec)
  least = 3 * collection.num_envs
  if collection.warmup < least:
    raise ValueError(
      f'warmup={collection.warmup}: must be at least {least}, three time steps '
      f'of each of num_envs={collection.num_envs}'
    )
  at = stream_seed(seed, 'train')
  experiment = behaviour.describe(
    env_name, sac, collection, steps=steps, seed=at
  )
  # Medium and expert are in memory together with what they are joined to.
  floats = math.prod(env.spec.observation.shape) + math.prod(
    getattr(env.spec.action, 'shape', ())
  )
  size = 4 * 4.0 * floats * transitions
  capacity.check([capacity.Need('transitions', transitions, size, True)])
  wanted = {'env': env_name, 'steps': steps, 'transitions': transitions}
  own = dataclasses.asdict(collection)
  if not own['options']:  # Folders from before there were options resume.
    del own['options']
  wanted |= {'seed': seed, 'sac': sac, 'collection': own}
  run_config.check_run_config(out, wanted)
  with locking.locked(out):
    if run_config.check_run_config(out, wanted) is None:
      run_config.write_run_config(out, wanted)
    ended = _make(
      env, agent, out, experiment, transitions, seed, collection, minari
    )
  if not ended:
    return
  terminal.end(
    f'{out}/{{{",".join(QUALITIES)}}}',
    f'python -m experiments.train --preset=atac_small --dataset={out}/medium'
    f'{names.flag(env_name)}',
  )


def _make(
  env, agent, out, experiment, transitions, seed, collection, minari
) -> bool:
  """Makes what is missing, and prints what there is; False if stopped."""
  from experiments.data import npz

  env_name = env.spec.name
  terminal.begin(
    f'{env_name}: SAC learns ({experiment.steps:,} decisions), then '
    f'{transitions:,} transitions of each quality, folder {out}'
  )
  play = collector.players(agent)
  trained, made = None, set()
  if not ((out / 'agent').exists() and (out / 'medium-replay').exists()):
    if not _train(env, agent, play, out, experiment, seed, collection):
      return False
    made.add('medium-replay')
  # What is needed of it is saved by now.
  shutil.rmtree(out / 'training', ignore_errors=True)
  for quality in QUALITIES:
    if not (out / quality).exists():
      trained = trained or _load(out / 'agent', agent)
      dataset = _collect(
        quality, env.spec, collection, play, trained, out, transitions, seed
      )
      npz.save(_with_returns(dataset), out / quality)
      made.add(quality)
    _check_stored(out, quality, quality in made)
    dataset = npz.load(out / quality)
    terminal.say(_line(quality, dataset))
    if minari:
      _to_minari(quality, dataset, out / 'minari')
  return True


def _check_stored(out, quality, is_new):
  """Notes the files of a data set, or compares them with the note."""
  from experiments.data import npz

  path, known = out / 'stored.json', {}
  with contextlib.suppress(Missing):
    known = reading.read_json(path, dict[str, dict[str, arrays.Stored]])
  if quality in known and not is_new:
    try:
      npz.check_stored(out / quality, known[quality])
    except configs.UserError as error:
      raise configs.UserError(
        f'{error}; restore it from a copy, or delete {shown(out / quality)}, '
        'then the same command makes it again'
      ) from error
    return
  known[quality] = npz.stored(out / quality)
  writing.write_text(path, json.dumps(known, indent=1))


def stream_seed(seed: int, what: str, number: int = 0) -> int:
  """A seed of simulators that nothing else has.

  `what` is `train`, `evaluate`, `reference` or a quality; `number` an
  evaluation's.
  """
  return (seed * len(_STREAMS) + _STREAMS.index(what)) * 10**6 + number


def _play(env_name, collection, act, params, episodes, seed):
  """The mean return of whole episodes."""
  import jax

  from experiments.runtime import evaluate

  games = collector.simulators(
    env_name, min(_GAMES, episodes), collection.options
  )
  played = evaluate.on_host(
    games,
    act,
    params,
    key=jax.random.key(seed),
    num_episodes=episodes,
    seed=seed,
  )
  return float(played.returns.mean())


def _train(env, agent, play, out, experiment, seed, collection) -> bool:
  """Trains; writes `medium-replay` and then `agent`; False if stopped."""
  from experiments.data import npz

  name, folder = env.spec.name, out / 'training'

  def evaluate(params, number):
    at = stream_seed(seed, 'evaluate', number)
    episodes = collection.evaluate_episodes
    return _play(name, collection, play['policy'], params, episodes, at)

  with plan.out_of_memory(experiment), signals.graceful_exit() as asked:
    trained = behaviour.learn(experiment, folder, evaluate, asked)
  if not trained.ended:
    print(
      f'stopped at update {trained.end:,} of {words.planned(experiment)}; the '
      'same command resumes from here'
    )
    return False
  found = behaviour.evaluations(experiment, folder, agent)
  episodes, at = collection.reference_episodes, stream_seed(seed, 'reference')
  explore = collector.uniform(env.spec, min(_GAMES, episodes), at)
  ref_min = _play(name, collection, explore, None, episodes, at)
  # Of few episodes the luckiest evaluation is not the best policy's.
  order = np.argsort([-e.mean_return for e in found], kind='stable')[:_FINAL]
  finals = [
    _play(name, collection, play['mean'], found[i].params, episodes, at)
    for i in order
  ]
  best, ref_max = int(order[int(np.argmax(finals))]), max(finals)
  expert = found[best]
  share = collection.medium_share
  medium = choose_medium(found[:best], ref_min, ref_max, share)
  facts: dict[str, Any] = {'ref_min': ref_min, 'ref_max': ref_max}
  facts['options'] = list(collection.options)
  for quality, chosen in (('medium', medium), ('expert', expert)):
    facts[quality] = {k: getattr(chosen, k) for k in _EVALUATED}
  about = _about(env.spec, 'medium-replay', facts)
  for name in ('medium-replay', 'agent'):
    shutil.rmtree(out / name, ignore_errors=True)
  past = behaviour.history(trained)[: medium.rows]
  replay = collector.by_episode(past, about)
  npz.save(_with_returns(replay), out / 'medium-replay')
  _write_agent(out, found, {'medium': medium, 'expert': expert}, facts)
  return True


def _write_agent(out, found, chosen, facts) -> None:
  """Writes the policies that play, with their facts."""
  partial = out / f'.agent.{secrets.token_hex(8)}.partial'
  _write_evaluations(partial / 'evaluations.csv', found)
  for quality, one in chosen.items():
    leaves = behaviour.leaves(one.params)
    facts[quality]['params'] = arrays.write(partial / f'{quality}.bin', leaves)
  text = json.dumps(facts, indent=1)
  writing.write_text(partial / 'facts.json', text)
  with writing.writing(out / 'agent'):
    partial.rename(out / 'agent')


def choose_medium(
  found: list[behaviour.Evaluation],
  ref_min: float,
  ref_max: float,
  share: float,
) -> behaviour.Evaluation:
  """The evaluation whose return is nearest to `share` of the way.

  `found` are those before the expert's.

  Raises:
    ValueError: there is none, or the expert is no better than random.
  """
  if not found or ref_min >= ref_max:
    raise ValueError(
      f'steps: too few for medium: {len(found)} evaluations before the best, '
      f'whose return is {ref_max:.4g} (random has {ref_min:.4g}); train longer '
      'or lower evaluate_every'
    )
  middle = ref_min + share * (ref_max - ref_min)
  return min(found, key=lambda e: abs(e.mean_return - middle))


def _write_evaluations(path, found):
  rows = [[getattr(e, field) for field in _EVALUATED] for e in found]
  tables.write_lines(path, [_EVALUATED, *rows])


def _load(folder, agent):
  if (folder / 'medium.npz').exists():
    raise configs.UserError(
      f'{shown(folder)}: was written by an older release; delete it, then the '
      'same command makes it again'
    )
  facts, params = reading.read_json(folder / 'facts.json', _Facts), {}
  for quality, about in (('medium', facts.medium), ('expert', facts.expert)):
    path = folder / f'{quality}.bin'
    try:
      params[quality] = behaviour.read_params(path, agent, about.params)
    except configs.UserError as error:
      raise configs.UserError(
        f'{error}; restore it from a copy, or delete {shown(folder)}, then the '
        'same command makes it again'
      ) from error
  known = dataclasses.asdict(facts)
  for quality in ('medium', 'expert'):
    del known[quality]['params']
  return Trained(params, known)


def _about(spec, quality, facts):
  from experiments.data import layout

  policies = {
    'random': 'uniform actions',
    'medium-replay': "SAC's whole memory up to medium",
    'medium-expert': 'SAC, half trained and trained',
  }
  extra = {k: facts[k] for k in ('medium', 'expert') if k in quality}
  if facts.get('options'):
    extra['options'] = facts['options']
  return layout.About(
    name=f'{spec.name.rpartition(":")[2]}-{quality}',
    env=spec.name,
    action_low=spec.action.low,
    action_high=spec.action.high,
    ref_min=facts['ref_min'],
    ref_max=facts['ref_max'],
    source=f'outplay, {policies.get(quality, "SAC, sampling")}',
    extra=extra,
  )


def _collect(quality, spec, collection, play, trained, out, transitions, seed):
  """The data set of a quality other than the training's memory."""
  import jax

  from experiments.data import layout, npz

  about = _about(spec, quality, trained.facts)
  if quality == 'medium-expert':
    parts = [npz.load(out / part) for part in ('medium', 'expert')]
    return layout.concatenate(parts, about)
  at = stream_seed(seed, quality)
  if quality == 'random':
    choose = collector.uniform(spec, _GAMES, at)
  else:
    params, key = jax.device_put(trained.params[quality]), jax.random.key(at)
    choose = lambda step, timestep: play['policy'](
      params, jax.random.fold_in(key, step), timestep
    )
  print(f'{quality}: {transitions:,} transitions', flush=True)
  bar = metrics.progress(transitions)
  try:
    history = collector.gather(
      collector.simulators(spec.name, _GAMES, collection.options),
      choose,
      transitions,
      at,
      report=lambda count: bar.write(count, {}),
    )
  finally:
    bar.close()
  dataset = collector.by_episode(history, about)
  return collector.first_rows(dataset, transitions)


def _with_returns(dataset):
  """The data set with a summary of its behaviour's returns in `extra`."""
  from experiments.data import layout

  returns, about = layout.returns(dataset), dataset.about
  behaviour: dict[str, Any] = {'episodes': len(returns)}
  if len(returns):
    behaviour |= {
      'return_mean': float(returns.mean()),
      'return_sd': float(returns.std()),
    }
  extra = {**about.extra, 'behaviour': behaviour}
  return dataset._replace(about=about._replace(extra=extra))


def _line(quality, dataset):
  from experiments.data import layout

  about, behaviour = dataset.about, dataset.about.extra['behaviour']
  line = f'{quality:13} {len(dataset.reward):9,} transitions'
  line += f' {behaviour["episodes"]:6,} episodes'
  if 'return_mean' not in behaviour:
    return line
  mean = behaviour['return_mean']
  score = layout.normalised_score(about, mean)
  return (
    f'{line}  return {mean:8.1f} (sd {behaviour["return_sd"]:.1f})  '
    f'score {score:5.1f}'
  )


def _to_minari(quality, dataset, folder):
  from experiments.data import minari_files

  dataset_id = f'outplay/{dataset.about.env}/{quality}-v0'
  if not (folder / dataset_id).exists():
    minari_files.save(dataset, dataset_id, folder)
