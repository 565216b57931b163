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
# What is asked, too; of the rest the perplexity says enough.
ASKED = {
  'heads': {
    'taylor': (5, 10, 20, 30, 50, 70, 90),
    'random': (5, 10, 30, 50, 70),
    'fisher': (5, 10, 30, 50),
    'activation': (10,),
    'wanda': (10,),
    'magnitude': (10,),
  },
  'ffn': {
    'taylor': (4, 10, 20, 30, 50),
    'random': (10, 20, 50),
    'oracle': (4, 10, 20, 30, 50),
    'fisher': (10, 20, 30),
    'activation': (10,),
    'influence': (10, 20, 30),
  },
}
REPAIRED = {
  'taylor': ('heads:0.1', 'heads:0.2', 'heads:0.3', 'heads:0.5', 'ffn:0.1', 'ffn:0.2'),
  'fisher': ('heads:0.3', 'heads:0.5', 'heads:0.7'),
}


def get_config() -> ImportanceConfig:
  """Points by scorer and budget."""
  points = {}
  for site, scorers in (('heads', HEADS), ('ffn', FFN)):
    for scorer, shares in scorers.items():
      for share in shares:
        point = PrunedConfig(scorer, f'{site}:{share / 100}', ask=share in ASKED[site][scorer])
        points[f'{scorer}_{site}{share}'] = point
  for heads in (10, 30, 50):
    for ffn in (10, 20):
      budget = f'heads:{heads / 100},ffn:{ffn / 100}'
      ask = heads + ffn <= 40
      points[f'taylor_heads{heads}_ffn{ffn}'] = PrunedConfig('taylor', budget, ask=ask)
  for share in (20, 30, 50):  # scored anew every 10%
    budget = f'heads:{share / 100}'
    points[f'taylor_heads{share}_rescored'] = PrunedConfig('taylor', budget, steps=share // 10)
  for scorer, budgets in REPAIRED.items():
    for budget in budgets:
      name = budget.replace(':0.', '') + '0'
      points[f'{scorer}_{name}_repaired'] = PrunedConfig(scorer, budget, repair=True)
  points['taylor_heads50_rescored_repaired'] = PrunedConfig('taylor', 'heads:0.5', 5, True)
  points['taylor_heads30_ffn10_repaired'] = PrunedConfig('taylor', 'heads:0.3,ffn:0.1', 1, True)
  return ImportanceConfig(points=points)
