"""How tests make an agent of its module, a config and a spec."""


def make_agent(module, config, spec, networks=None, terms=None, **keywords):
  """An agent of a module; `terms` replace losses, `keywords` go to `make`."""
  networks = networks or module.make_networks(config, spec)
  losses = module.make_losses()._replace(**(terms or {}))
  return module.make(config, networks, losses, spec, **keywords)


def make_warm_start(module, config, spec, networks=None, terms=None):
  """The agent of ATAC's first phase."""
  networks = networks or module.make_networks(config, spec)
  losses = module.make_losses()._replace(**(terms or {}))
  return module.make_phases(config, networks, losses, spec)[0].agent
