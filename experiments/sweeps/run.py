"""What `python -m experiments.sweep` does, by its flags."""

import contextlib
import importlib.util
import pathlib

from experiments import build
from experiments.build import capacity, support
from experiments.build.unused import refuse_unused
from experiments.files import locking
from experiments.report import terminal
from experiments.runtime import config as configs
from experiments.runtime import devices, run_config, signals
from experiments.runtime import flags as flag_checks
from experiments.sweeps import engines, halving, metrics, ray_pool, status
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import pool as sweep_pool
from experiments.sweeps import results as sweep_results
from experiments.sweeps import rows as sweep_rows


def run(held: contextlib.ExitStack) -> None:
  """Sweeps as the flags of `experiments.sweep` say; `held` gets the lock.

  Raises:
    UserError: what the flags ask for cannot be done.
    SystemExit: with 1, if rows failed.
  """
  from absl import flags

  values = flags.FLAGS
  workdir = pathlib.Path(values.workdir)
  if values.status:
    status.show(workdir)
    return
  with configs.user_errors():
    share = read_share(values.share)
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
      dataset=build.text_or_dataset(values),
    )
    configs.check_place('workdir', workdir, folder=True)
    first = plan.describe(sweep_plan.Row(0, 0))
    numbers = range(len(plan.settings))
    refuse_unused(
      [*plan.fixed, *plan.assignments(0)],
      [plan.describe(sweep_plan.Row(i, 0)).config for i in numbers],
      on_data=not first.material.acts,
      is_fresh=build.is_fresh(first.config),
    )
    metric = values.metric or first.material.metric
    asked = values.engine
    if asked == 'auto' and (share != (0, 1) or values.halving):
      asked = 'processes'
    engine = choose_engine(plan, asked, metric)
    halving = make_halving(first, engine, metric)
    if not values.random:
      flag_checks.refuse(['sweep_seed'], 'without --random')
    _refuse_others(engine)
    rows = sweep_plan.rows(plan, values.seeds)
    metrics.check(first, metric)
    if engine == 'vmap':
      capacity.check_rows(first, min(len(rows), values.max_rows), len(rows))
    pool = _make_pool(engine, workdir)
    # Rows of processes and of Ray are the same.
    kind = 'vmap' if engine == 'vmap' else 'processes'
    content = plan._asdict() | {'engine': kind}
    content |= first.material.fingerprint(first)
    run_config.check_run_config(workdir, content, engine, ('dataset',))
    if values.check:
      print('no problem found')
      return
    if values.share is None:  # tasks of one sweep share its folder
      held.enter_context(locking.locked(workdir))
    if (
      run_config.check_run_config(workdir, content, engine, ('dataset',))
      is None
    ):
      run_config.write_run_config(workdir, content, engine)
    status.note_rows(workdir, plan, values.seeds)
    terminal.begin(
      f'{len(plan.settings)} settings x {values.seeds} seeds = {len(rows)} '
      f'rows, engine {engine}, folder {workdir}',
      f'{first.agent_name} on {first.where}, {first.updates:,} updates of '
      f'{first.run.batch_size} rows',
      # Processes and machines of a cluster have devices of their own.
      compiles=engine == 'vmap',
    )
  if pool is None:
    results, failed = _run_programs(plan, rows, workdir, metric), {}
  else:
    results, failed = _run_jobs(plan, rows, share, workdir, pool, halving)
  left = [row for row in rows if row not in results]
  summaries = sweep_results.write(plan, results, metric, workdir, left)
  if results:
    sweep_results.show(plan, summaries, metric, workdir)
    _tell_support(plan, results)
  for row, reason in failed.items():
    words = f'{sweep_results.label(plan, row.setting)} seed={row.seed}'
    terminal.say(f'failed: {words}: {reason}')
  if left:
    print(f'{len(left)} rows are left; the same command resumes from here')
  if failed and not signals.received():
    raise SystemExit(1)


def _tell_support(plan, results) -> None:
  """A line for each setting with rows whose targets were clipped."""
  for setting in range(len(plan.settings)):
    rows = {row: r for row, r in results.items() if row.setting == setting}
    clipped = {row: support.worst(r.curve) for row, r in rows.items()}
    experiment = plan.describe(sweep_plan.Row(setting, 0))
    lines = {row: support.warning(experiment, m) for row, m in clipped.items()}
    warned = [row for row, line in lines.items() if line is not None]
    if warned:
      seeds = ', '.join(str(row.seed) for row in warned)
      words = sweep_results.label(plan, setting)
      print(f'{words}, seeds {seeds}: {lines[warned[0]]}')


def read_share(text: str | None) -> tuple[int, int]:
  """`I/N` as numbers; `(0, 1)` for None.

  Raises:
    UserError: another text, or I is not below N.

  >>> read_share('2/8')
  (2, 8)
  """
  if text is None:
    return 0, 1
  first, slash, second = text.partition('/')
  numbers = [int(x) for x in (first, second) if x.isascii() and x.isdecimal()]
  if not slash or len(numbers) != 2 or numbers[0] >= numbers[1]:
    raise configs.UserError(
      f'share={text}: must be I/N with I from 0 to N - 1, as in 0/4'
    )
  return numbers[0], numbers[1]


def make_halving(
  experiment: build.Experiment, engine: str, metric: str
) -> halving.Halving | None:
  """The rule that ends poor rows, as the flags say.

  Raises:
    UserError: it does not fit the engine, or nothing is measured meanwhile.
  """
  from absl import flags

  values, updates = flags.FLAGS, experiment.updates
  factor, first = values.halving, values.halving_first
  if not factor:
    if first is not None:
      raise configs.UserError(
        f'halving_first={first}: has no effect without --halving; give both'
      )
    return None
  field = f'halving={factor}'
  if factor == 1:
    raise configs.UserError(f'{field}: must be 0 or at least 2')
  if engine == 'vmap':
    raise configs.UserError(
      f'{field}: the rows of one program end together; take '
      '--engine=processes or ray'
    )
  if metric.startswith(('eval_', 'network_', 'held_')) and (
    not experiment.run.evaluate_every
  ):
    raise configs.UserError(
      f'{field}: {metric} is not measured while a row trains; give '
      '--set=evaluate_every=N or another --metric'
    )
  first = first or max(updates // factor**2, 1)
  if first >= updates:
    raise configs.UserError(
      f'halving_first={first}: must be below the {updates} updates of a row'
    )
  return halving.Halving(factor, first, metric)


def _make_pool(engine: str, workdir: pathlib.Path) -> sweep_pool.Pool | None:
  """Where rows run; None for one program."""
  from absl import flags

  values = flags.FLAGS
  if engine == 'vmap':
    for name in ('share', 'row_minutes', 'row_gb'):
      value = getattr(values, name)
      if value is not None:
        raise configs.UserError(
          f'{name}={value}: the rows of one program run together; take '
          '--engine=processes or ray'
        )
    return None
  limits = sweep_pool.Limits(values.row_minutes, values.row_gb)
  if engine == 'processes':
    return sweep_pool.local(values.at_once, limits)
  return ray_pool.connect(
    values.ray_address,
    workdir,
    cpus=values.row_cpus,
    gpus=values.row_gpus,
    limits=limits,
  )


# Flags of some engines only.
_ENGINES = {
  'max_rows': ('vmap',),
  'checkpoint_minutes': ('vmap',),
  'at_once': ('processes',),
  'retries': ('processes', 'ray'),
  'ray_address': ('ray',),
  'row_cpus': ('ray',),
  'row_gpus': ('ray',),
}


def _refuse_others(engine: str) -> None:
  names = [name for name, own in _ENGINES.items() if engine not in own]
  flag_checks.refuse(names, f'with engine {engine}')


def choose_engine(plan: sweep_plan.Plan, asked: str, metric: str = '') -> str:
  """The engine for a plan; makes every agent once to see that it fits.

  Raises:
    ValueError: an environment or agent that cannot be made; `vmap` asked for an
      environment that is not pure JAX.
  """
  from search.model import Environment

  if asked == 'ray' and importlib.util.find_spec('ray') is None:
    raise configs.UserError(
      'engine=ray: needs Ray: pip install "ray>=2.50", or take processes'
    )
  experiment = plan.describe(sweep_plan.Row(0, 0))
  if not experiment.material.acts:
    if not experiment.env_name and metric.startswith('eval_'):
      raise configs.UserError(
        f'metric={metric}: {experiment.where} has no simulator to play in; '
        'take loss'
      )
    # Every row's agent is made when `traceable` traces it.
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


def _run_programs(plan, rows, workdir, metric):
  from absl import flags

  from experiments.runtime import metrics

  values = flags.FLAGS
  devices.use_compilation_cache()
  with configs.user_errors():
    todo = engines.parts(plan, rows, workdir, values.max_rows)
  left = [part for part in todo if not engines.finished(part)]
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
        engines.vmapped(
          plan,
          left,
          checkpoint_minutes=values.checkpoint_minutes,
          stopping=stopping,
          report=bar.write,
        )
      finally:
        bar.close()
  return engines.read_parts(todo, rows)


def _run_jobs(plan, rows, share, workdir, pool, halving):
  from absl import flags

  from experiments.runtime import metrics

  todo = sweep_rows.jobs(plan, rows, workdir)
  own = todo[share[0] :: share[1]]
  bar = metrics.progress(len(own))
  with signals.graceful_exit() as stopping:
    try:
      failed = sweep_pool.run(
        own,
        pool,
        retries=flags.FLAGS.retries,
        stopping=stopping,
        report=lambda ended: bar.write(ended, {}),
        halving=halving,
      )
    finally:
      bar.close()
  return sweep_rows.read(todo, failed), failed
