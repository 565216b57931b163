"""SmolLM2-135M: all scorers against pruned heads and FFNs, the joint grid, re-scoring, repair.

  python -m gatedfm.sweep --config=configs/importance_pruning/full.py --workdir=runs/importance_full

On two cores six hours; about one and a half where these multiply bfloat16 (AMX), with
`--config.dtype=bfloat16`; it resumes, and perplexities come first.
"""

from gatedfm.evaluation.importance_config import ImportanceConfig, PrunedConfig

HEADS = {
  'taylor': (5, *range(10, 100, 10)),
  'random': (5, 10, 30, 50, 70, 90),
  'fisher': (5, 10, 30, 50, 70),
  'activation': (5, 10, 30, 50, 70),
  'wanda': (5, 10, 30, 50, 70),
  'magnitude': (5, 10, 30, 50),
}
FFN = {
  'taylor': (4, 10, 20, 30, 40, 50),
  'random': (10, 20, 30, 40, 50),
  'oracle': (4, 10, 20, 30, 40, 50),
  'fisher': (10, 20, 30),
  'activation': (10, 20, 30),
  'influence': (10, 20, 30),
}


def get_config() -> ImportanceConfig:
  """Points by scorer and budget."""
  points = {}
  for site, scorers in (('heads', HEADS), ('ffn', FFN)):
    for scorer, shares in scorers.items():
      for share in shares:
        points[f'{scorer}_{site}{share}'] = PrunedConfig(scorer, f'{site}:{share / 100}')
  for heads in (10, 30, 50):
    for ffn in (10, 20):
      budget = f'heads:{heads / 100},ffn:{ffn / 100}'
      points[f'taylor_heads{heads}_ffn{ffn}'] = PrunedConfig('taylor', budget)
  for share in (20, 30, 50):  # scored anew every 10%
    budget = f'heads:{share / 100}'
    points[f'taylor_heads{share}_rescored'] = PrunedConfig('taylor', budget, steps=share // 10)
  for budget in ('heads:0.3', 'heads:0.5', 'ffn:0.1', 'ffn:0.2'):
    name = budget.replace(':0.', '') + '0'
    points[f'taylor_{name}_repaired'] = PrunedConfig('taylor', budget, repair=True)
  return ImportanceConfig(points=points)
