"""Scores heads and FFNs of a language model, cuts the lowest out of it, measures what that saves.

Example:
  python -m gatedfm.prune --checkpoint=runs/smollm2 --workdir=runs/smollm2_heads30 \\
      --scorer=taylor --budget=heads:0.3,ffn:0.1 --calibration=sst5,agnews

The workdir then holds a smaller model, which gatedfm.import_checkpoint --export and all else take
like the one that it was cut from; scores.npz, report.json with costs and times before and after,
and pictures of the heads' and FFNs' scores. Calibration takes tasks of StaICC and files of one's
own: .jsonl, .csv or .txt.
"""

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Language model, from import_checkpoint.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder to write; it must be empty or new.')
_SCORER = flags.DEFINE_string(
  'scorer',
  'taylor',
  'How modules and units are scored: taylor, taylor_layer_norm, fisher, activation, wanda, '
  'magnitude, influence, oracle, random.',
)
_BUDGET = flags.DEFINE_string(
  'budget',
  None,
  'Shares to close: heads:0.7,ffn:0.2; also attention, channels, layers, and ranks of factorized '
  'embeddings. Or a share of the model: params:0.3, macs:0.3, bytes:0.3, latency:0.3 (measured).',
)
_OVER = flags.DEFINE_list('over', ['heads', 'ffn'], 'What a share of the model is closed among.')
_STEPS = flags.DEFINE_integer('steps', 1, 'Parts of the budget; what is left is scored anew.')
_CALIBRATION = flags.DEFINE_list('calibration', [], 'Tasks or files that scores are taken on.')
_EXAMPLES = flags.DEFINE_integer('examples', 100, 'Of each task, of its training split.')
_SHOTS = flags.DEFINE_integer('shots', 0, 'Answered questions in front of each example.')
_AGGREGATION = flags.DEFINE_enum(
  'aggregation', 'mean', ['mean', 'rank', 'zscore'], "How several tasks' scores are joined."
)
_SHAPE = flags.DEFINE_enum(
  'shape',
  'ragged',
  ['ragged', 'bucketed', 'uniform'],
  'Whether layers may keep differing numbers of units, multiples of --bucket, or as many each.',
)
_BUCKET = flags.DEFINE_integer('bucket', 1, 'Of --shape=bucketed.')
_FLOOR = flags.DEFINE_integer('floor', 0, 'Units that stay in each layer.')
_GROUPS = flags.DEFINE_bool('groups', False, 'Close query heads that share keys together.')
_TOKENS = flags.DEFINE_integer('tokens', 512, 'Of prompts at most, and of the text that is timed.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Of the timing; 0 leaves it out.')
_REPAIR = flags.DEFINE_bool('repair', False, 'Fit what is left to the dense model (least squares).')
_SEED = flags.DEFINE_integer('seed', 0, 'Of examples, shots and random scores.')
flags.mark_flags_as_required(['checkpoint', 'workdir', 'budget'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.evaluation import pruning_runs
  from gatedfm.pruning.allocation import Allocation

  with mains.clear_errors():
    over = tuple(_OVER.value)
    options = _SHAPE.value, _BUCKET.value, _FLOOR.value, _GROUPS.value, over, _TOKENS.value
    shape = Allocation(*options)
    how = pruning_runs.Pruning(
      _SCORER.value,
      _BUDGET.value,
      tuple(_CALIBRATION.value),
      _EXAMPLES.value,
      _SHOTS.value,
      _AGGREGATION.value,
      shape,
      _TOKENS.value,
      _ROUNDS.value,
      _SEED.value,
      _STEPS.value,
      _REPAIR.value,
    )
    folders = mains.folder(_CHECKPOINT.value), mains.folder(_WORKDIR.value)
    pruning_runs.run(*folders, how, lambda line: print(line, flush=True))
    print(f'next: python -m gatedfm.few_shot|generate --checkpoint={folders[1]}')


if __name__ == '__main__':
  mains.run(main)
