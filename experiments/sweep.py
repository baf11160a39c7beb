"""Seeds times grid or random search: `python -m experiments.sweep`.

  python -m experiments.sweep --preset=muzero_catch --env=jax:catch --seeds=16
    --grid=learning_rate=1e-3,3e-3 --grid=num_simulations=4,8
    --workdir=sweeps/NAME

On a pure-JAX environment seeds and floats are vmapped into one program, and
what changes shapes becomes another one; any other environment runs as one
process a row. The same command goes on with what is left, also with more
`--seeds`.
"""

import importlib.util
import pathlib

from experiments import (
  build,
  offline,
  presets,
  support,
  sweep_engines,
  sweep_plan,
  sweep_results,
  terminal,
  train,
)
from experiments.runtime import config as configs


def define_flags() -> None:
  """The flags of `python -m experiments.sweep`."""
  from absl import flags

  flags.DEFINE_string(
    'preset', presets.DEFAULT, f'what to run:\n{presets.help_text()}\n'
  )
  flags.DEFINE_enum('agent', None, presets.AGENTS, 'another agent')
  flags.DEFINE_string('env', None, 'another environment, as for train')
  flags.DEFINE_string(
    'dataset', None, 'to learn from instead of from play, as for train'
  )
  flags.DEFINE_string('text', None, 'to learn from, as for train')
  flags.DEFINE_multi_string('set', [], 'field=value of every row, repeatable')
  flags.DEFINE_integer('steps', None, 'decisions; the preset has its own', 1)
  flags.DEFINE_integer('seeds', 4, 'of every setting: 0, 1, ...', 1)
  flags.DEFINE_multi_string(
    'grid',
    [],
    'field=value,value; repeated ones are multiplied; semicolons where a '
    'value has commas',
  )
  flags.DEFINE_multi_string(
    'random',
    [],
    'field=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A:B; '
    'repeated ones are drawn together',
  )
  flags.DEFINE_integer('samples', 0, 'settings drawn from --random', 0)
  flags.DEFINE_integer('sweep_seed', 0, 'of that drawing', 0, configs.MAX_SEED)
  flags.DEFINE_string('workdir', None, "the sweep's folder", required=True)
  flags.DEFINE_string(
    'metric',
    None,
    'a column of curves.csv, higher is better; if left out eval_return, or '
    'held_log_likelihood of a text',
  )
  flags.DEFINE_enum(
    'engine',
    'auto',
    ['auto', 'vmap', 'processes', 'ray'],
    'auto is vmap on a pure-JAX environment or a data set, else processes',
  )
  flags.DEFINE_integer('max_rows', 64, 'rows in one program', 1)
  flags.DEFINE_float(
    'checkpoint_minutes', 5.0, 'between checkpoints of a program', 0.0
  )
  flags.DEFINE_integer('at_once', 2, 'processes at the same time', 1)
  flags.DEFINE_integer('retries', 2, 'of a row whose process died', 0)
  flags.DEFINE_string(
    'ray_address', None, "a cluster's; a running or a new local one if left out"
  )
  flags.DEFINE_float('row_cpus', 1.0, 'that a row takes on Ray', 0.0)
  flags.DEFINE_float('row_gpus', 0.0, 'that a row takes on Ray', 0.0)


def main() -> None:
  """Sweeps as the flags say.

  Raises:
    SystemExit: with 1, where rows are left to do.
  """
  from absl import flags

  values = flags.FLAGS
  workdir = pathlib.Path(values.workdir)
  metric = values.metric or 'eval_return'
  with configs.user_errors():
    plan = sweep_plan.make_plan(
      values.preset,
      agent=values.agent,
      env=values.env,
      steps=values.steps,
      fixed=values.set,
      grid=values.grid,
      random=values.random,
      samples=values.samples,
      seed=values.sweep_seed,
      dataset=train.text_or_dataset(values),
    )
    configs.check_place('workdir', workdir, folder=True)
    first = plan.describe(sweep_plan.Row(0, 0))
    if first.is_text and not values.metric:
      metric = 'held_log_likelihood'
    engine = choose_engine(plan, values.engine, metric)
    rows = sweep_plan.rows(plan, values.seeds)
    # Rows of processes and of Ray are alike.
    kind = 'vmap' if engine == 'vmap' else 'processes'
    content = plan._asdict() | {'engine': kind}
    if plan.dataset:
      content |= {'dataset_checksum': offline.checksum_of(first)}
    if configs.check_run_config(workdir, content, engine, ('dataset',)) is None:
      configs.write_run_config(workdir, content, engine)
    where = first.dataset or first.env_name
    terminal.begin(
      f'{len(plan.settings)} settings x {values.seeds} seeds = {len(rows)} '
      f'rows, engine {engine}, folder {workdir}',
      f'{first.agent_name} on {where}, {first.updates:,} updates of '
      f'{first.run.batch_size} rows',
      # Processes and machines of a cluster have devices of their own.
      compiles=engine == 'vmap',
    )
  run = _run_programs if engine == 'vmap' else _run_jobs
  results, failed = run(plan, rows, workdir, engine, metric)
  if results:
    summaries = sweep_results.write(plan, results, metric, workdir)
    sweep_results.show(plan, summaries, metric, workdir)
    _tell_support(plan, results)
  for row, reason in failed.items():
    words = f'{sweep_results.label(plan, row.setting)} seed={row.seed}'
    terminal.say(f'failed: {words}: {reason}')
  if len(results) < len(rows):
    left = len(rows) - len(results)
    print(f'{left} rows are left; the same command goes on from here')
  if failed:
    raise SystemExit(1)


def _tell_support(plan, results) -> None:
  """A line for each setting with rows whose targets were clipped."""
  for setting in range(len(plan.settings)):
    rows = {row: r for row, r in results.items() if row.setting == setting}
    clipped = {row: support.worst(r.curve) for row, r in rows.items()}
    experiment = plan.describe(sweep_plan.Row(setting, 0))
    lines = {row: support.warning(experiment, m) for row, m in clipped.items()}
    told = [row for row, line in lines.items() if line is not None]
    if told:
      seeds = ', '.join(str(row.seed) for row in told)
      words = sweep_results.label(plan, setting)
      print(f'{words}, seeds {seeds}: {lines[told[0]]}')


def choose_engine(plan: sweep_plan.Plan, asked: str, metric: str = '') -> str:
  """The engine for a plan, whose every agent is made once to see that it fits.

  Raises:
    ValueError: an environment or agent that cannot be made; `vmap` asked for
      an environment that is not pure JAX.
  """
  from search.model import Environment

  if asked == 'ray' and importlib.util.find_spec('ray') is None:
    raise configs.UserError(
      'engine=ray: needs Ray: pip install "ray>=2.50", or take processes'
    )
  if plan.dataset:
    experiment = plan.describe(sweep_plan.Row(0, 0))
    if not experiment.env_name and metric.startswith('eval_'):
      raise configs.UserError(
        f'metric={metric}: {plan.dataset} has no simulator to play in; take '
        'loss'
      )
    # Every row's agent is made when it is found out what may be traced.
    engine = 'vmap' if asked == 'auto' else asked
    for i in range(len(plan.settings)):
      where = plan.describe(sweep_plan.Row(i, 0)).run.data_on
      if engine == 'vmap' and where != 'device':
        raise configs.UserError(
          f'data_on={where}: rows in one program need device; or take '
          '--engine=processes'
        )
    return engine
  envs = {}
  for i in range(len(plan.settings)):
    experiment = plan.describe(sweep_plan.Row(i, 0))
    if experiment.env not in envs:
      envs[experiment.env] = build.make_env(experiment, training=True)
    build.make_agent(experiment, envs[experiment.env].spec)
  is_pure = all(isinstance(env, Environment) for env in envs.values())
  if asked == 'auto':
    return 'vmap' if is_pure else 'processes'
  if asked == 'vmap' and not is_pure:
    raise configs.UserError(
      f'engine=vmap: {experiment.env_name} is not a pure-JAX environment; use '
      'processes or ray'
    )
  return asked


def _run_programs(plan, rows, workdir, engine, metric):
  from absl import flags

  from experiments.runtime import metrics, signals

  del engine
  values = flags.FLAGS
  train.use_compilation_cache()
  with configs.user_errors():
    todo = sweep_engines.parts(plan, rows, workdir, values.max_rows)
  left = [part for part in todo if not sweep_engines.finished(part)]
  for part in left:
    traced = ', '.join(part.traced) or 'no field'
    print(
      f'program {part.folder.name}: {len(part.rows)} rows, seeds and {traced} '
      'vmapped',
      flush=True,
    )
  if left:
    updates = [plan.describe(part.rows[0]).updates for part in left]
    shown = (metric, 'episode_return', 'loss', 'finite')
    bar = metrics.progress(sum(updates), 0, tuple(dict.fromkeys(shown)))
    with signals.graceful_exit() as stopping:
      try:
        sweep_engines.vmapped(
          plan,
          left,
          checkpoint_minutes=values.checkpoint_minutes,
          stopping=stopping,
          report=bar.write,
        )
      finally:
        bar.close()
  return sweep_engines.read_parts(todo, rows), {}


def _run_jobs(plan, rows, workdir, engine, metric):
  from absl import flags

  from experiments.runtime import metrics, signals

  del metric
  values = flags.FLAGS
  todo = sweep_engines.jobs(plan, rows, workdir)
  bar = metrics.progress(len(todo))
  with signals.graceful_exit() as stopping:
    shared = {
      'retries': values.retries,
      'stopping': stopping,
      'report': lambda ended: bar.write(ended, {}),
    }
    try:
      if engine == 'ray':
        failed = sweep_engines.on_ray(
          plan,
          todo,
          address=values.ray_address,
          cpus=values.row_cpus,
          gpus=values.row_gpus,
          **shared,
        )
      else:
        failed = sweep_engines.processes(todo, at_once=values.at_once, **shared)
    finally:
      bar.close()
  return sweep_engines.read_jobs(todo, failed), failed


if __name__ == '__main__':
  define_flags()
  configs.run_main(main)
