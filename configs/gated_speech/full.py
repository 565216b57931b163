"""The full comparison on the embedded data: sparsity targets, stacks, contexts, seeds.

  bash launch/local.sh configs/gated_speech/full.py runs/full

Hours on two cores; restartable at any moment, every point is trained once. Which points choose
anything is read off the validation split (`--config.split=validation`); the test split reports.
"""

from configs.gated_speech import quickstart, tiny
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.trainers.config import TrainConfig

STEPS, GATED_STEPS = 6_000, 600
# Synthetic voices that read other words: more text than the recordings have, and speakers that
# do not give their language away. Belarusian has no word list.
EXTRA = ('espeak:phrases?number=500', 'espeak:stamps?languages=bel')


def dense(seed: int) -> TrainConfig:
  """Twice the quickstart's depth, dropout, longer utterances, synthetic speech, more steps."""
  cfg = tiny.get_config()
  cfg.seed, cfg.steps = seed, STEPS
  cfg.eval_every = cfg.checkpoint_every = 500
  cfg.data.extra, cfg.data.num_buckets = EXTRA, 5
  cfg.data.max_frames, cfg.data.max_tokens = 640, 192
  model = cfg.model
  model.encoder_layers, model.decoder_layers = 6, 2
  model.kernel, model.dropout, model.attention_dropout = 15, 0.1, 0.1
  cfg.optimizer.warmup = 200
  return cfg


def get_config() -> SweepConfig:
  """Dense and gated points; see `configs/gated_speech/README.md` for what each answers."""
  points = {'dense': dense(0)}

  def add(name: str, target: float, parent: str = 'dense', seed: int = 0) -> TrainConfig:
    cfg = quickstart.gated(points[parent], target, GATED_STEPS)
    cfg.init_from, cfg.seed = parent, seed
    points[name] = cfg
    return cfg

  for target in (0.3, 0.5, 0.7):
    add(f'both_{target}', target)
    add(f'encoder_{target}', target).model.gates.stacks = ('encoder',)
    add(f'decoder_{target}', target).model.gates.stacks = ('decoder',)
  for context in ('speech', 'language', 'task'):
    add(f'both_0.5_{context}', 0.5).model.gates.context = (context,)
  # An empty context decides the same for every utterance: a learned fixed mask, the control.
  add('both_0.5_static', 0.5).model.gates.context = ()
  for seed in (1, 2):
    points[f'dense_seed{seed}'] = dense(seed)
    add(f'both_0.5_seed{seed}', 0.5, f'dense_seed{seed}', seed)
    add(f'both_0.5_static_seed{seed}', 0.5, f'dense_seed{seed}', seed).model.gates.context = ()
  return SweepConfig(
    points=points,
    other='asterisk?languages=fra,rus,spa',
    ctc_weight=0.5,
    timed=60,
    rounds=5,
  )
