"""From a text to a run: its tokens, its windows, what is held out, its play.

A text takes the way of a data set: `Experiment.dataset` is its path, and
`experiments.build.dataset` calls here where an experiment `is_text`.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.data import text as texts
from experiments.data.text import Corpus
from experiments.files import writing
from experiments.files.errors import UserError
from experiments.report import terminal

VOCABULARY = 'vocabulary.json'
_HELD_OUT_BATCH = 32


def complete(experiment: Any, env: str | None):
  """An experiment on a text, which nobody plays in.

  Args:
    experiment: from `build.describe`, with or without a text.
    env: what the user wants to evaluate in.

  Raises:
    UserError: there is no text, or something else that it cannot have.
  """
  if not experiment.dataset:
    raise UserError(
      f'text: {experiment.agent_name} learns from a text: --text=PATH '
      '(python -m experiments.corpus fetches some)'
    )
  if env:
    raise UserError(f'env={env}: a text is learned from without one')
  for field in ('hold_out', 'early_update'):
    if getattr(experiment.run, field):
      raise UserError(
        f'{field}={getattr(experiment.run, field)}: needs a run that acts; set '
        'it to 0, and text.held_out to '
        'the share of the text that is not trained on'
      )
  if experiment.run.data_on != 'device':
    raise UserError(
      f'data_on={experiment.run.data_on}: a text lies on the device'
    )
  return experiment._replace(env_name='')


def opened(experiment: Any) -> Corpus:
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


def told(experiment: Any, corpus: Corpus) -> tuple[str, str]:
  """A line about a text, and one about the network that reads it."""
  from networks import language

  size = language.size_of(experiment.config.network)
  return (
    f'text {corpus.name}: {len(corpus.train):,} tokens to train on, '
    f'{len(corpus.held_out):,} held out, {corpus.vocabulary.size:,} different '
    'ones',
    f'{size.operations / 1e6:.3g}M operations a token, '
    f'{size.parameters / 1e6:.3g}M parameters without embedding and softmax',
  )


def spec_of(corpus: Corpus):
  """What the agent is told: one token is seen, one is predicted."""
  import numpy as np

  from agents.core.types import ArraySpec, Discrete, Spec

  return Spec(
    ArraySpec((), np.int32), Discrete(corpus.vocabulary.size), name=corpus.name
  )


def make_source(experiment: Any, corpus: Corpus, place: Callable):
  """The source of an experiment on a text; see `runtime.text`."""
  from experiments.runtime import text as runtime

  return runtime.from_tokens(
    corpus.train,
    experiment.run.batch_size,
    experiment.config.text.length,
    place=place,
  )


def held_out(experiment: Any, corpus: Corpus):
  """Windows that are never trained on, int32 `[n, B, L + 1]`.

  B is 32, whatever the batch that is trained on, so that all runs on a text
  are measured on the same; the last windows, which would not fill one, are
  left out.
  """
  import numpy as np

  from experiments.runtime import text as runtime

  length = experiment.config.text.length
  windows = runtime.num_windows(corpus.held_out, length)
  size = min(_HELD_OUT_BATCH, windows)
  index = np.arange(windows // size * size)
  taken = runtime.take_windows(corpus.held_out, index, length)
  return taken.astype(np.int32).reshape(-1, size, length + 1)


def measure(agent: Any, params: Any, windows: Any) -> dict[str, Any]:
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


def evaluator(experiment: Any, agent: Any) -> Callable:
  """`(params, step) -> metrics` of the text that is held out."""
  import jax
  import jax.numpy as jnp

  from experiments.runtime import mesh

  windows = jnp.asarray(held_out(experiment, opened(experiment)))
  compiled = jax.jit(functools.partial(measure, agent))

  def evaluate(params, step):
    del step
    found = compiled(mesh.local(params), windows)
    return {name: float(value) for name, value in found.items()}

  return evaluate


def finish(
  experiment: Any, agent: Any, workdir: pathlib.Path, found: dict[str, Any]
) -> None:
  """Measures the trained network on what is held out; table and line.

  Args:
    experiment: from `build.describe`.
    agent: its agent.
    workdir: the run's folder.
    found: parameters by the checkpoint's name.
  """
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
    lines = lines or [','.join(row)]
    cells = (
      f'{x:.6g}' if isinstance(x, float) else str(x) for x in row.values()
    )
    lines.append(','.join(cells))
    print(
      f'{name}: held-out perplexity {row["held_perplexity"]:.2f}, '
      f'{row["held_bits_per_character"]:.3f} bits a character '
      f'({target.size:,} tokens)'
    )
  writing.write_text(workdir / 'evaluation.csv', '\n'.join(lines) + '\n')
  terminal.end(
    f'{workdir}/evaluation.csv, metrics.csv',
    f"python -m experiments.play --workdir={workdir} --prompt='The '",
    f'python -m experiments.plots --workdirs={workdir} --y=perplexity '
    '--out=curve.png',
  )


def save_vocabulary(workdir: pathlib.Path, corpus: Corpus) -> None:
  """Keeps what tokens mean, so that playing needs no text."""
  words = json.dumps(corpus.vocabulary.words) + '\n'
  writing.write_text(workdir / VOCABULARY, words)
