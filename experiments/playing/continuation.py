"""Continues a prompt with a trained language model."""

import pathlib
from typing import Any

from experiments.build import corpus
from experiments.data import text as texts
from experiments.files.errors import UserError, shown


def continue_text(
  experiment: Any, workdir: str, name: str, options: Any
) -> None:
  """Prints a trained network's continuation of a prompt.

  `name` is the checkpoint's; `options` are the flags `prompt`, `tokens`,
  `temperature` and `seed`.

  Raises:
    UserError: no prompt, or no such run or checkpoint.
  """
  import jax

  from experiments import build
  from experiments.build.saved import load_params
  from experiments.runtime import token_windows as runtime

  if not options.prompt:
    raise UserError(
      'prompt: is empty; give the text that the language model continues, such '
      "as --prompt='The '"
    )
  folder = pathlib.Path(workdir)
  vocabulary = corpus.read_vocabulary(folder)
  spec = corpus.spec_of(folder.name, vocabulary)
  agent = build.make_agent(experiment, spec)
  params = load_params(workdir, agent, [name])[name]
  networks = build.make_networks(experiment, spec)
  predict = lambda tokens: networks.apply(*params, tokens, False, None)[0]
  tokens = runtime.continuation(
    jax.jit(predict),
    texts.encode(vocabulary, options.prompt),
    options.tokens,
    length=experiment.config.text.length,
    temperature=options.temperature,
    key=jax.random.key(options.seed),
  )
  # The vocabulary comes from a file and may contain control characters.
  continued = options.prompt + texts.decode(vocabulary, tokens)
  lines = continued.split('\n')
  print('\n'.join(shown(line, max(len(line), 20)) for line in lines))
