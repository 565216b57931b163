"""Says whether a language model fits on given chips, and what lies where; nothing is computed.

Example:
  python -m gatedfm.memory --model=opt-66b --chips=v4:64,h100:8 --batch=16 --json=opt66b.json

The model is a published one (opt-125m to opt-66b, smollm2), or a folder with its config.json: of
Hugging Face's kind, or one that gatedfm.import_checkpoint wrote. Prints a table for each kind of
chip: every kind of array, its logical axes, the mesh axes that they are split over, and its bytes.
Keys and values are those of --batch texts of --length tokens; activations are not counted.
"""

import json

from absl import flags

from gatedfm import mains

_MODEL = flags.DEFINE_string('model', None, 'Name of a model, or a folder with its config.json.')
_CHIPS = flags.DEFINE_list('chips', None, 'KIND:NUMBER of each case: v4:64,h100:8.')
_BATCH = flags.DEFINE_integer('batch', 1, 'Texts at a time.')
_LENGTH = flags.DEFINE_integer('length', 2048, 'Tokens of each, prompt and answer.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', ['float32', 'bfloat16', 'float16'], 'Of parameters, keys and values.'
)
_JSON = flags.DEFINE_string('json', '', 'Where to write all numbers; the tables go beside it, .md.')
flags.mark_flags_as_required(['model', 'chips'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  from gatedfm import atomic, provenance
  from gatedfm.convert import lm_files
  from gatedfm.models import lm_memory
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    cfg, fits = lm_files.config_of(_MODEL.value), []
    path = mains.json_path(_JSON.value, '.md')
    for case in _CHIPS.value:
      chip, _, number = case.partition(':')
      if not number.isdecimal():
        raise ConfigError(f'--chips={case}: write KIND:NUMBER, such as v4:64')
      sizes = int(number), _BATCH.value, _LENGTH.value
      fits.append(lm_memory.fit(cfg, chip, *sizes, _DTYPE.value))
    text = lm_memory.markdown(fits)
    print(text)
    if path:
      origin = provenance.collect('gatedfm.memory')
      result = origin | {'cases': [fit.as_dict() for fit in fits]}
      atomic.write_text(path, json.dumps(result, indent=1) + '\n')
      title = f'{_MODEL.value}: {_BATCH.value} texts of {_LENGTH.value} tokens'
      atomic.write_text(
        path.with_suffix('.md'), f'## {title}\n\n```\n{origin["command"]}\n```\n\n{text}\n'
      )


if __name__ == '__main__':
  mains.run(main)
