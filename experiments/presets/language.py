"""Presets of language models, which learn from a text."""

from experiments.presets.settings import Preset

PRESETS = {
  'moe_language': Preset(
    summary='a language model with 32 experts, 4 of them active, on a text',
    agent='language',
    env='',
    steps=27_000,
    settings=(
      # Network and optimiser are the Config's defaults. The paper's batch is
      # 300,000 words, its vocabulary 793,471, on 16 GPUs; these fit on one.
      'text.vocabulary=32768',
      'batch_size=256',
      'log_every=50',
      'checkpoint_every=1000',
      'evaluate_every=1000',
    ),
    source='Shazeer 2017, Appendix C.1, MoE-32 of Table 7; vocabulary, batch '
    'and learning rate are ours',
  ),
  'moe_language_small': Preset(
    summary='the same, but small: 5M tokens in minutes on two CPU cores',
    agent='language',
    env='',
    steps=1_221,
    settings=(
      'network.size=128',
      'network.moe.hidden=256',
      'network.moe.k=2',
      'learning_rate=1e-2',
      'warmup_updates=100',
      'batch_size=64',
      'log_every=20',
      'checkpoint_every=200',
      'evaluate_every=200',
    ),
    source='ours, chosen on two CPU cores; balance and dropout as Shazeer 2017',
  ),
}
