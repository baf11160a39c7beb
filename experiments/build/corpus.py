"""From a text to a run: its tokens, windows and held-out part.

`Experiment.dataset` is the path of the text.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.build import capacity
from experiments.build.material import (
  About,
  Experiment,
  Kept,
  Material,
  Measure,
  Opened,
)
from experiments.build.source import place_over
from experiments.data import text as texts
from experiments.data.text import Corpus
from experiments.files import reading, tables, writing
from experiments.files.errors import UserError
from experiments.report import terminal

VOCABULARY = 'vocabulary.json'
_HELD_OUT_BATCH = 32


def complete(experiment: Experiment, env: str | None) -> Experiment:
  """An experiment on a text, which has no environment.

  Raises:
    UserError: there is no text, or a setting that it cannot have.
  """
  if not experiment.dataset:
    raise UserError(
      f'text: {experiment.agent_name} learns from a text: --text=PATH '
      '(python -m experiments.corpus fetches some)'
    )
  if env:
    raise UserError(f'env={env}: a text has no environment; leave --env out')
  for field in ('hold_out', 'early_update'):
    if getattr(experiment.run, field):
      raise UserError(
        f'{field}={getattr(experiment.run, field)}: needs a run that acts; set '
        'it to 0, and text.held_out to '
        'the share of the text that is not trained on'
      )
  if experiment.run.data_on != 'device':
    raise UserError(
      f'data_on={experiment.run.data_on}: must be device for a text'
    )
  return experiment._replace(env_name='')


def opened(experiment: Experiment) -> Corpus:
  """The text of an experiment as tokens, read once while its file stays.

  Raises:
    ValueError: one line that names the file and what is wrong with it.
  """
  path = pathlib.Path(experiment.dataset)
  stamp = ()
  if path.exists():
    about = path.stat()
    stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
  return _opened(path, stamp, experiment.config.text)


@functools.lru_cache(maxsize=2)
def _opened(path, stamp, config) -> Corpus:
  del stamp
  corpus = texts.read(
    path,
    vocabulary=config.vocabulary,
    held_out=config.held_out,
    encoding=config.encoding,
    cache=pathlib.Path.home() / '.cache' / 'outplay' / 'text',
  )
  if len(corpus.held_out) <= config.length:
    raise UserError(
      f'held_out={config.held_out}: leaves {len(corpus.held_out)} tokens of '
      f'{path}, must be more than length={config.length}'
    )
  return corpus


def about(experiment: Experiment, spec: Any) -> About:
  """A line about a text, and one about the network that reads it."""
  from networks import language

  del spec
  corpus = opened(experiment)
  size = language.size_of(experiment.config.network)
  return About(
    (),
    f'text {corpus.name}: {len(corpus.train):,} tokens to train on, '
    f'{len(corpus.held_out):,} held out, {corpus.vocabulary.size:,} different '
    'ones',
    (
      f'{size.operations / 1e6:.3g}M operations a token, '
      f'{size.parameters / 1e6:.3g}M parameters without embedding and softmax',
    ),
  )


def spec_of(name: str, vocabulary: texts.Vocabulary):
  """The agent's spec: one token is seen, one is predicted."""
  import numpy as np

  from agents.core.types import ArraySpec, Discrete, Spec

  return Spec(ArraySpec((), np.int32), Discrete(vocabulary.size), name=name)


def prepared(experiment: Experiment, parts: int = 1) -> Opened:
  """The tokens that an experiment learns from; `parts` do not divide them.

  Raises:
    ValueError: they cannot be read.
  """
  from experiments.runtime import token_windows as runtime

  del parts
  corpus = opened(experiment)

  def source(
    experiment: Experiment, phase: Any, layout: Any = None, stopping: Any = None
  ):
    del phase, stopping
    return runtime.from_tokens(
      corpus.train,
      experiment.run.batch_size,
      experiment.config.text.length,
      place=place_over(layout and layout.mesh),
    )

  return Opened(spec_of(corpus.name, corpus.vocabulary), False, source)


def kept(experiment: Experiment, agent: Any, spec: Any) -> Kept:
  """Nothing but the text; a row of a batch has a window."""
  del agent
  each = 2 * capacity.bytes_of(capacity.timestep(spec).observation)
  return Kept('batch_size', 0, 0.0, experiment.config.text.length * each)


def held_out(experiment: Experiment, corpus: Corpus):
  """Windows that are never trained on, int32 `[n, B, L + 1]`.

  B is 32, whatever the training batch, so that all runs on a text are measured
  on the same; windows that would not fill a batch are left out.
  """
  import numpy as np

  from experiments.runtime import token_windows as runtime

  length = experiment.config.text.length
  windows = runtime.num_windows(corpus.held_out, length)
  size = min(_HELD_OUT_BATCH, windows)
  index = np.arange(windows // size * size)
  taken = runtime.take_windows(corpus.held_out, index, length)
  return taken.astype(np.int32).reshape(-1, size, length + 1)


def likelihoods(agent: Any, params: Any, windows: Any) -> dict[str, Any]:
  """Metrics `held_...` of windows `[n, B, L + 1]`; may be traced.

  `held_log_likelihood` is the mean of a token, in nats, and `held_perplexity`
  its exponential; the others are means over batches.
  """
  import jax
  import jax.numpy as jnp

  from agents.core.types import Text

  one = lambda tokens: agent.evaluate(params, Text(tokens), None)
  means = jax.tree.map(jnp.mean, jax.lax.map(one, windows))
  loss = means.pop('loss')
  means |= {'perplexity': jnp.exp(loss), 'log_likelihood': -loss}
  return {f'held_{name}': value for name, value in means.items()}


def evaluator(experiment: Experiment, agent: Any) -> Callable:
  """`(params, step) -> metrics` of the text that is held out."""
  import jax
  import jax.numpy as jnp

  from experiments.runtime import mesh

  windows = jnp.asarray(held_out(experiment, opened(experiment)))
  compiled = jax.jit(functools.partial(likelihoods, agent))

  def evaluate(params, step):
    del step
    found = compiled(mesh.local(params), windows)
    return {name: float(value) for name, value in found.items()}

  return evaluate


def measure(experiment: Experiment, agent: Any) -> Measure:
  """The evaluation of rows in one program."""
  del agent
  windows = held_out(experiment, opened(experiment))

  def evaluate(own, agent, params, seed, step):
    del own, seed, step
    return likelihoods(agent, params, windows)

  return Measure(evaluate, None, lambda found: found)


def columns(experiment: Experiment, agent: Any) -> set[str]:
  """Names of the metrics that `evaluator` finds."""
  import jax
  import jax.numpy as jnp

  params = jax.eval_shape(agent.init, jax.random.key(0)).params
  size = 1, experiment.run.batch_size, experiment.config.text.length + 1
  windows = jax.ShapeDtypeStruct(size, jnp.int32)
  found = functools.partial(likelihoods, agent)
  return set(jax.eval_shape(found, params, windows))


def finish(
  experiment: Experiment,
  agent: Any,
  workdir: pathlib.Path,
  found: dict[str, Any],
) -> None:
  """Measures trained networks (params by checkpoint) on held-out text."""
  corpus = opened(experiment)
  evaluate = evaluator(experiment, agent)
  windows = held_out(experiment, corpus)
  target = windows[..., 1:]
  characters = len(texts.decode(corpus.vocabulary, target.reshape(-1)))
  lines = []
  for name, params in found.items():
    metrics = evaluate(params, 0)
    nats = -metrics['held_log_likelihood'] * target.size
    row = {
      'checkpoint': name,
      'held_tokens': target.size,
      **metrics,
      'held_bits_per_character': nats / math.log(2) / max(characters, 1),
    }
    lines = lines or [[*row]]
    lines.append([*row.values()])
    print(
      f'{name}: held-out perplexity {row["held_perplexity"]:.2f}, '
      f'{row["held_bits_per_character"]:.3f} bits a character '
      f'({target.size:,} tokens)'
    )
  tables.write_lines(workdir / 'evaluation.csv', lines, digits=6)
  terminal.end(
    f'{workdir}/evaluation.csv, metrics.csv',
    f"python -m experiments.play --workdir={workdir} --prompt='The '",
    f'python -m experiments.plots --workdirs={workdir} --y=perplexity '
    '--out=curve.png',
  )


def keep(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Writes the vocabulary, so that playing needs no text."""
  words = json.dumps(opened(experiment).vocabulary.words) + '\n'
  writing.write_text(workdir / VOCABULARY, words)


def read_vocabulary(workdir: pathlib.Path) -> texts.Vocabulary:
  """What `keep` wrote.

  Raises:
    UserError: it is not there, or damaged.
  """
  path = workdir / VOCABULARY
  return texts.Vocabulary(reading.read_json(path, tuple[str, ...]))


MATERIAL = Material(
  flag='text',
  acts=False,
  plays=False,
  metric='held_log_likelihood',
  memory=('batch_size', 'rollout_batch', 'data_on'),
  sizes=(),
  complete=complete,
  name=lambda experiment: pathlib.Path(experiment.dataset).stem,
  fingerprint=lambda experiment: {
    'dataset_checksum': texts.checksum(experiment.dataset)
  },
  open=prepared,
  rows=lambda experiment: opened(experiment).train,
  kept=kept,
  describe=about,
  evaluate=evaluator,
  measure=measure,
  columns=columns,
  keep=keep,
  finish=lambda experiment, agent: functools.partial(finish, experiment, agent),
)
