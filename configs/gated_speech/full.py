"""The full comparison on the embedded data: sparsity targets, stacks, contexts, seeds.

  bash launch/local.sh configs/gated_speech/full.py runs/full

Hours on two cores; restartable at any moment, every point is trained once. Which points choose
anything is read off the validation split (`--config.split=validation`); the test split reports.
Points can be trained side by side, one process each, before the sweep is called as a whole:

  python -m gatedfm.sweep --config=configs/gated_speech/full.py --workdir=runs/full --only=dense
"""

from configs.gated_speech import quickstart, tiny
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.trainers.config import TrainConfig

STEPS, GATED_STEPS, MORE_STEPS = 12_000, 500, 1500
# Synthetic voices that read other words: more text than the recordings have, and speakers that
# do not give their language away. Belarusian has no word list.
EXTRA = ('espeak:phrases?number=300', 'espeak:stamps?languages=bel')


def dense() -> TrainConfig:
  """Twice the quickstart's depth, longer utterances, synthetic speech, more steps.

  No dropout: after some twenty passes over augmented recordings little overfits yet, and random
  numbers alone would take a third of a step on CPU.
  """
  cfg = tiny.get_config()
  cfg.steps = STEPS
  cfg.eval_every, cfg.checkpoint_every = 1000, 500
  cfg.data.extra = EXTRA
  cfg.data.max_frames, cfg.data.max_tokens = 640, 192
  cfg.model.encoder_layers, cfg.model.decoder_layers = 6, 2
  cfg.optimizer.warmup = 200
  return cfg


def get_config() -> SweepConfig:
  """Dense and gated points; see `configs/gated_speech/README.md` for what each answers."""
  points = {'dense': dense()}

  def add(name: str, target: float, seed: int = 0, steps: int = GATED_STEPS) -> TrainConfig:
    cfg = points[name] = quickstart.gated(points['dense'], target, steps)
    cfg.seed = seed
    return cfg

  # The headline and its controls first. An empty context decides the same for every utterance,
  # a learned fixed mask; `dense_longer` is trained on like the others and closes nothing.
  add('both_0.5', 0.5)
  add('both_0.5_static', 0.5).model.gates.context = ()
  add('dense_longer', 0.5).model.gates.enabled = False
  add('both_0.3', 0.3)
  add('both_0.7', 0.7)
  for context in ('speech', 'language', 'task'):
    add(f'both_0.5_{context}', 0.5).model.gates.context = (context,)
  for target in (0.3, 0.5, 0.7):
    add(f'encoder_{target}', target).model.gates.stacks = ('encoder',)
    add(f'decoder_{target}', target).model.gates.stacks = ('decoder',)
  for seed in (1, 2):  # of the gates and the augmentation; dense model and order stay the same
    add(f'both_0.5_seed{seed}', 0.5, seed)
  # Does what closing costs grow back with more fine-tuning? With a control of its own.
  add('dense_1500', 0.5, steps=MORE_STEPS).model.gates.enabled = False
  add('both_0.5_1500', 0.5, steps=MORE_STEPS)
  add('both_0.3_1500', 0.3, steps=MORE_STEPS)
  # In the encoder it does: seeds, a fixed mask and a higher target of that point.
  for seed in (0, 1, 2):
    name = f'encoder_0.5_1500_seed{seed}' if seed else 'encoder_0.5_1500'
    add(name, 0.5, seed, MORE_STEPS).model.gates.stacks = ('encoder',)
  gates = add('encoder_0.5_1500_static', 0.5, steps=MORE_STEPS).model.gates
  gates.stacks, gates.context = ('encoder',), ()
  add('encoder_0.7_1500', 0.7, steps=MORE_STEPS).model.gates.stacks = ('encoder',)
  return SweepConfig(
    points=points,
    other='asterisk?languages=fra,rus,spa',
    timed=60,
    rounds=5,
  )
