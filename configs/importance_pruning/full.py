"""SmolLM2-135M: all scorers against pruned heads and FFNs, the joint grid, re-scoring.

  python -m gatedfm.sweep --config=configs/importance_pruning/full.py --workdir=runs/importance_full

On two cores about ten hours; it resumes, and perplexities come first.
"""

from gatedfm.evaluation.importance_sweep import ImportanceConfig, PrunedConfig

HEADS = {
  'taylor': range(10, 100, 10),
  'random': range(10, 100, 10),
  'fisher': (10, 30, 50, 70, 90),
  'activation': (10, 30, 50, 70, 90),
  'wanda': (10, 30, 50, 70, 90),
  'magnitude': (10, 30, 50, 70, 90),
}
FFN = ('taylor', 'random', 'oracle', 'fisher', 'activation', 'influence')


def get_config() -> ImportanceConfig:
  """Points by scorer and budget."""
  points = {}
  for scorer, shares in HEADS.items():
    for share in shares:
      points[f'{scorer}_heads{share}'] = PrunedConfig(scorer, f'heads:{share / 100}')
  for scorer in FFN:
    for share in (10, 20, 30, 40, 50):
      points[f'{scorer}_ffn{share}'] = PrunedConfig(scorer, f'ffn:{share / 100}')
  for heads in (10, 30, 50):
    for ffn in (10, 20, 30):
      budget = f'heads:{heads / 100},ffn:{ffn / 100}'
      points[f'taylor_heads{heads}_ffn{ffn}'] = PrunedConfig('taylor', budget)
  for share in (30, 50, 70):
    points[f'taylor_heads{share}_rescored'] = PrunedConfig('taylor', f'heads:{share / 100}', 4)
  return ImportanceConfig(points=points)
