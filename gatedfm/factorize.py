"""Replaces matrices of a language model by products of two smaller ones, measures what that saves.

Example:
  python -m gatedfm.factorize --checkpoint=runs/smollm2 --workdir=runs/smollm2_half \\
      --match=decoder/embedding --compression=0.5 --weights=frequency --calibration=sst5,agnews

The workdir then holds a smaller model that all commands take, and report.json with costs and times
before and after. Paths may have wildcards: '*/ffn/w_1/kernel' is of all layers. What is factorized
may be pruned afterwards, and the other way round. Speech models and text classifiers are
factorized where their training goes on: see --config.model.factors and --config.classifier.table
of gatedfm.train.
"""

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Language model, from import_checkpoint.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder to write; it must be empty or new.')
_MATCH = flags.DEFINE_list('match', ['decoder/embedding'], 'Paths of matrices, * and ? allowed.')
_RANK = flags.DEFINE_integer('rank', None, 'Of the factors.')
_COMPRESSION = flags.DEFINE_float('compression', None, 'Share of the parameters to remove.')
_ENERGY = flags.DEFINE_float('energy', None, 'Share of the squared singular values to keep.')
_WEIGHTS = flags.DEFINE_enum(
  'weights',
  'none',
  ['none', 'frequency', 'activation', 'fisher'],
  'How much each row counts: by its frequency, by what reads it, by its gradient.',
)
_SPLIT = flags.DEFINE_enum(
  'split', 'balanced', ['reference', 'balanced'], 'Singular values in the second factor, or both.'
)
_CALIBRATION = flags.DEFINE_list('calibration', [], 'Tasks or files that weights are taken on.')
_EXAMPLES = flags.DEFINE_integer('examples', 100, 'Of each task, of its training split.')
_TOKENS = flags.DEFINE_integer('tokens', 512, 'Of examples at most, and of the text that is timed.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Of the timing; 0 leaves it out.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of examples.')
flags.mark_flags_as_required(['checkpoint', 'workdir'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.evaluation import factor_runs
  from gatedfm.models.speech_config import ConfigError

  sizes = {'rank': _RANK.value, 'compression': _COMPRESSION.value, 'energy': _ENERGY.value}
  with mains.clear_errors():
    given = [(name, value) for name, value in sizes.items() if value is not None]
    if len(given) != 1:
      raise ConfigError('give one of --rank, --compression and --energy')
    how = factor_runs.Factoring(
      tuple(_MATCH.value),
      given[0],
      _WEIGHTS.value,
      _SPLIT.value,
      tuple(_CALIBRATION.value),
      examples=_EXAMPLES.value,
      tokens=_TOKENS.value,
      rounds=_ROUNDS.value,
      seed=_SEED.value,
    )
    folders = mains.folder(_CHECKPOINT.value), mains.folder(_WORKDIR.value)
    factor_runs.run(*folders, how, lambda line: print(line, flush=True))
    print(folders[1])


if __name__ == '__main__':
  mains.run(main)
