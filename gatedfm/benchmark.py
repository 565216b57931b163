"""Times gated execution against dense, side by side in one process.

Example:
  python -m gatedfm.benchmark --suite=encoder --model=6x256 --json=runs/encoder.json

A stack alone, a training step of the encoder, whole utterances with their gates predicted, or a
stream of mixed utterances. Prints a line per way and pattern; with --json writes all numbers and,
beside them, a picture of time against the MACs that are kept.
Programs are compiled anew each time, so that their seconds mean something: minutes for a stream,
which has 12 of each way (three lengths, four sizes of batches). Goals are for widths from 256 on.
"""

import json

from absl import flags

from gatedfm import mains

_SUITE = flags.DEFINE_enum(
  'suite', 'encoder', ['encoder', 'decoder', 'utterance', 'stream', 'train'], 'What is timed.'
)
_MODEL = flags.DEFINE_string(
  'model', '6x256', "Layers x width, or one of OWSM's: base, small, medium."
)
_SUBSAMPLING = flags.DEFINE_integer(
  'subsampling_channels', 0, "Of the convolutions before the encoder; 0: the width, as ESPnet's."
)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of matrix products.')
_BATCH = flags.DEFINE_integer('batch', 1, 'Utterances at a time.')
_FRAMES = flags.DEFINE_integer('frames', 100, 'Frames of 40 ms that the stack sees.')
_TOKENS = flags.DEFINE_integer('tokens', 20, 'That the decoder writes, one by one.')
_CONTEXTS = flags.DEFINE_integer(
  'contexts', None, 'Gate patterns within the batch (1), or in the stream (8).'
)
_PRUNED = flags.DEFINE_list('pruned', ['0', '0.3', '0.5', '0.7'], 'Shares of modules closed.')
_MASKS = flags.DEFINE_integer('masks', 3, 'Random patterns per share.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Times that each is run, side by side.')
_UTTERANCES = flags.DEFINE_integer('utterances', 500, 'Of the stream.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of parameters, inputs and patterns.')
_AGAINST = flags.DEFINE_enum(
  'against', '', ['', 'torch'], "What else is timed: ESPnet's modules with the same weights."
)
_STACKS = flags.DEFINE_list(
  'stacks', ['encoder', 'decoder'], "Whose gates utterances' predictors decide."
)
_JSON = flags.DEFINE_string('json', '', 'Where to write the numbers.')

# Flags that only some suites read.
_READ_BY = {
  'batch': ('encoder', 'decoder', 'utterance', 'train'),
  'frames': ('encoder', 'decoder', 'utterance', 'train'),
  'masks': ('encoder', 'decoder', 'utterance', 'train'),
  'tokens': ('decoder', 'utterance'),
  'against': ('encoder', 'decoder', 'train'),
  'stacks': ('utterance',),
  'subsampling_channels': ('utterance', 'stream'),
  'utterances': ('stream',),
}


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  from gatedfm import atomic, provenance
  from gatedfm.analysis import plots
  from gatedfm.benchmarks import stacks, traffic
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    for name, suites in _READ_BY.items():
      if flags.FLAGS[name].present and _SUITE.value not in suites:
        raise ConfigError(f'--{name} is of --suite={"|".join(suites)}: drop it')
    suite = _SUITE.value
    model = stacks.model(_MODEL.value, _DTYPE.value, subsampling_channels=_SUBSAMPLING.value)
    pruned, rounds, seed = stacks.shares(_PRUNED.value), _ROUNDS.value, _SEED.value
    shared = {'pruned': pruned, 'rounds': rounds, 'seed': seed}
    if _CONTEXTS.value is not None:
      shared['contexts'] = _CONTEXTS.value
    if suite == 'stream':
      kind, case = traffic, traffic.Traffic(model, _UTTERANCES.value, **shared)
    else:
      kind = stacks
      case = stacks.Case(
        suite,
        model,
        _BATCH.value,
        _FRAMES.value,
        _TOKENS.value,
        masks=_MASKS.value,
        against=_AGAINST.value,
        stacks=tuple(_STACKS.value),
        **shared,
      )
    case.validate()
    path = mains.folder(_JSON.value) if _JSON.value else None
    if path and path.suffix != '.json':
      raise ConfigError(f'--json={path} must end in .json: the picture goes beside it as .png')
    for target in (path, path.with_suffix('.png')) if path else ():
      atomic.check(target)
    origin = provenance.collect('gatedfm.benchmark')  # of what runs, whatever is edited meanwhile
    rows = kind.run(case, lambda line: print(line, flush=True))
    if path:
      result = origin | {'rows': rows}
      atomic.write_text(path, json.dumps(result, indent=1) + '\n')
      ways = [row for row in rows if row['way'] != 'predictors']  # whose time is no way's
      plots.save(plots.time_against_macs(ways), path.with_suffix('.png'))
      print(path)


if __name__ == '__main__':
  mains.run(main)
