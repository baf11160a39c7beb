"""The table of presets: `presets.find('efficientzero_catch')`."""

from experiments.presets.settings import EnvConfig as EnvConfig
from experiments.presets.settings import Preset as Preset
from experiments.presets.settings import RunConfig as RunConfig
from experiments.presets.table import AGENTS as AGENTS
from experiments.presets.table import DEFAULT as DEFAULT
from experiments.presets.table import PRESETS as PRESETS
from experiments.presets.table import find as find
from experiments.presets.table import find_agent as find_agent
from experiments.presets.table import help_text as help_text
from experiments.presets.table import is_offline as is_offline
