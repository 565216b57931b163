"""SmolLM2-135M: heads and FFNs by |A dL/dA| and at random, asked without shots.

  python -m gatedfm.sweep --config=configs/importance_pruning/quickstart.py --workdir=runs/lm

On two cores under ten minutes after the download.
"""

from gatedfm.evaluation.importance_config import ImportanceConfig, PrunedConfig


def get_config() -> ImportanceConfig:
  """Two scorers, three budgets, two tasks."""
  points = {}
  for scorer in ('taylor', 'random'):
    for budget in ('heads:0.3', 'heads:0.5', 'ffn:0.1'):
      points[f'{scorer}_{budget.replace(":0.", "")}0'] = PrunedConfig(scorer, budget)
  return ImportanceConfig(
    tasks=('sst2', 'trec'), shots=(0,), seeds=(0,), questions=64, examples=32, text_tokens=2048,
    points=points,
  )  # fmt: skip
