"""Scores the heads of a language model for induction: prefix matching and copying.

Example:
  python -m gatedfm.induction --checkpoint=runs/smollm2 --workdir=runs/induction --sequences=20 \\
      --scores=runs/small/scores.npz

The workdir then holds induction.json (both scores of all heads, mean and variance over sequences)
and a map of each, prefix_matching.png and copying.png. With the scores.npz of gatedfm.prune it also
tells how much of both scores is left when the least important heads are closed.
"""

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Language model, from import_checkpoint.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder to write; it must be empty or new.')
_MODE = flags.DEFINE_enum(
  'mode',
  'algorithm2',
  ['algorithm2', 'released'],
  "After the paper's Algorithm 2, or after its released code.",
)
_INPUTS = flags.DEFINE_enum(
  'inputs',
  '',
  ['', 'hidden', 'embeddings'],
  'What each layer is fed: what it reads in the model (algorithm2), or the embeddings (released).',
)
_SEQUENCES = flags.DEFINE_integer('sequences', 100, 'Random sequences for each score.')
_SHORTEST = flags.DEFINE_integer('shortest', 25, 'Tokens of the shortest, which stands four times.')
_STEP = flags.DEFINE_integer('step', 2, 'Tokens by which each is longer than the one before.')
_SCORES = flags.DEFINE_string('scores', None, 'scores.npz of gatedfm.prune, of the same heads.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the sequences.')
flags.mark_flags_as_required(['checkpoint', 'workdir'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.analysis.induction import Induction
  from gatedfm.evaluation import induction_runs

  with mains.clear_errors():
    how = Induction(
      _MODE.value,
      _INPUTS.value,
      _SEQUENCES.value,
      _SHORTEST.value,
      _STEP.value,
      seed=_SEED.value,
    )
    scores = None if _SCORES.value is None else mains.folder(_SCORES.value)
    folders = mains.folder(_CHECKPOINT.value), mains.folder(_WORKDIR.value)
    induction_runs.run(*folders, how, scores, lambda line: print(line, flush=True))
    print(folders[1])


if __name__ == '__main__':
  mains.run(main)
