"""From names to what is run: `build.describe`, then what is made of it."""

from experiments.build.agent import make_agent as make_agent
from experiments.build.agent import make_env as make_env
from experiments.build.agent import make_networks as make_networks
from experiments.build.agent import make_phases as make_phases
from experiments.build.agent import row as row
from experiments.build.experiment import describe as describe
from experiments.build.experiment import text_or_dataset as text_or_dataset
from experiments.build.material import Experiment as Experiment
from experiments.build.material import is_fresh as is_fresh
from experiments.build.material import window_of as window_of
from experiments.build.source import Layout as Layout
from experiments.build.source import lay_out as lay_out
from experiments.build.source import make_layout as make_layout
from experiments.build.source import make_source as make_source
from experiments.build.source import state_sharding as state_sharding
