"""The settings of a run as a table: `train --show`."""

import dataclasses

from experiments import build
from experiments.report import terminal
from experiments.runtime import overrides


def show(experiment: build.Experiment) -> None:
  """Prints the fields of the agent, the environment and the run."""
  rows = []

  def add(prefix, config):
    docs = {field.name: field for field in overrides.describe(config)}
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        add(f'{prefix}{field.name}.', value)
      else:
        doc = docs[field.name].doc or ''
        rows.append((prefix + field.name, str(value), doc))

  add('', experiment.config)
  add('env.', experiment.env)
  add('run.', experiment.run)
  title = f'{experiment.name}: --set=FIELD=VALUE'
  terminal.print_table(('field', 'value', 'meaning'), rows, title, left=3)
