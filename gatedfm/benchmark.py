"""Times gated execution against dense, side by side in one process.

Example:
  python -m gatedfm.benchmark --suite=encoder --model=6x256 --json=runs/encoder.json

A stack alone, a training step of the encoder, whole utterances with their gates predicted, or a
stream of mixed utterances; language models that are pruned, or scored (--model=smollm2, opt-125m);
embedding tables, and factorizing a large one (--rows, --features).
Prints a line per way and pattern; with --json writes all numbers and, beside them, a picture of
time against the MACs that are kept.
Programs are compiled anew each time, so that their seconds mean something: minutes for a stream,
which has 12 of each way (three lengths, four sizes of batches). Goals are for widths from 256 on.
"""

import json

from absl import flags

from gatedfm import mains

_SUITE = flags.DEFINE_enum(
  'suite',
  'encoder',
  ['encoder', 'decoder', 'utterance', 'stream', 'train', 'lm', 'scoring', 'tables', 'svd'],
  'What is timed.',
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
_TOKENS = flags.DEFINE_integer(
  'tokens', None, 'That the decoder writes, one by one (20), or a language model reads (512).'
)
_BUDGETS = flags.DEFINE_list(
  'budgets', ['heads:0.3', 'heads:0.5', 'heads:0.7', 'ffn:0.2'], 'Of language models, one each.'
)
_ROWS = flags.DEFINE_integer('rows', None, 'Of tables: 400,000, of --suite=svd 2,000,000.')
_FEATURES = flags.DEFINE_integer('features', 300, 'Of their rows.')
_COMPRESSION = flags.DEFINE_float('compression', 0.9, 'Share of parameters that factors remove.')
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
  'batch': ('encoder', 'decoder', 'utterance', 'train', 'tables'),
  'frames': ('encoder', 'decoder', 'utterance', 'train'),
  'masks': ('encoder', 'decoder', 'utterance', 'train'),
  'tokens': ('decoder', 'utterance', 'lm', 'scoring'),
  'budgets': ('lm',),
  'rows': ('tables', 'svd'),
  'features': ('tables', 'svd'),
  'compression': ('tables', 'svd'),
  'rounds': ('encoder', 'decoder', 'utterance', 'stream', 'train', 'lm', 'tables'),
  'pruned': ('encoder', 'decoder', 'utterance', 'stream', 'train'),
  'dtype': ('encoder', 'decoder', 'utterance', 'stream', 'train'),
  'contexts': ('encoder', 'decoder', 'utterance', 'stream', 'train'),
  'against': ('encoder', 'decoder', 'train'),
  'stacks': ('utterance',),
  'subsampling_channels': ('utterance', 'stream'),
  'utterances': ('stream',),
}


def _case():
  """The module of benchmarks that runs the suite, and what it is to time."""
  from gatedfm.benchmarks import embeddings, factorizing, language, stacks, traffic
  from gatedfm.convert import lm_files

  suite, rounds, seed = _SUITE.value, _ROUNDS.value, _SEED.value
  tokens = {} if _TOKENS.value is None else {'tokens': _TOKENS.value}
  if suite in embeddings.SUITES + factorizing.SUITES:
    sizes = {'features': _FEATURES.value, 'compression': _COMPRESSION.value, 'seed': seed}
    sizes |= {} if _ROWS.value is None else {'rows': _ROWS.value}
    if suite in factorizing.SUITES:
      return factorizing, factorizing.SvdCase(**sizes)
    batch = {'batch': _BATCH.value} if flags.FLAGS['batch'].present else {}
    return embeddings, embeddings.Case(**sizes, **batch, rounds=rounds)
  if suite in language.SUITES:
    model = lm_files.config_of(_MODEL.value if flags.FLAGS['model'].present else 'smollm2')
    how = {'rounds': rounds, 'seed': seed}
    return language, language.Case(suite, model, tuple(_BUDGETS.value), **tokens, **how)
  model = stacks.model(_MODEL.value, _DTYPE.value, subsampling_channels=_SUBSAMPLING.value)
  shared = {'pruned': stacks.shares(_PRUNED.value), 'rounds': rounds, 'seed': seed}
  if _CONTEXTS.value is not None:
    shared['contexts'] = _CONTEXTS.value
  if suite == 'stream':
    return traffic, traffic.Traffic(model, _UTTERANCES.value, **shared)
  shared |= {'masks': _MASKS.value, 'against': _AGAINST.value, 'stacks': tuple(_STACKS.value)}
  return stacks, stacks.Case(suite, model, _BATCH.value, _FRAMES.value, **tokens, **shared)


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  from gatedfm import atomic, provenance
  from gatedfm.analysis import plots
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    for name, suites in _READ_BY.items():
      if flags.FLAGS[name].present and _SUITE.value not in suites:
        raise ConfigError(f'--{name} is of --suite={"|".join(suites)}: drop it')
    kind, case = _case()
    case.validate()
    path = mains.json_path(_JSON.value, '.png')
    origin = provenance.collect('gatedfm.benchmark')  # of what runs, whatever is edited meanwhile
    rows = kind.run(case, lambda line: print(line, flush=True))
    if path:
      result = origin | {'rows': rows}
      atomic.write_text(path, json.dumps(result, indent=1) + '\n')
      ways = [row for row in rows if 'ratio' in row and row['way'] != 'predictors']
      if ways:
        plots.save(plots.time_against_macs(ways), path.with_suffix('.png'))
      print(path)


if __name__ == '__main__':
  mains.run(main)
