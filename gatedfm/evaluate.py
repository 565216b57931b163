"""Evaluates one trained model: recognition, translation, language identification, gates.

Example:
  python -m gatedfm.evaluate --checkpoint=runs/quickstart/dense --split=validation

Prints the scores and leaves them, with every output, beside the checkpoint.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'Which split.')
_OTHER = flags.DEFINE_string('other', '', 'Source for language identification elsewhere.')
_DATA = flags.DEFINE_string('data_dir', '', 'Where data is prepared.')
_CTC_WEIGHT = flags.DEFINE_float('ctc_weight', 0.3, 'Of CTC in joint decoding.', 0, 1)
flags.mark_flag_as_required('checkpoint')


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.evaluation import points

  with mains.clear_errors():
    result = points.evaluate(
      Path(_CHECKPOINT.value), _SPLIT.value, _OTHER.value, _DATA.value, _CTC_WEIGHT.value
    )
    shown = {k: v for k, v in result.items() if k != 'gate_map'}
    print(json.dumps(shown, indent=1, ensure_ascii=False))


if __name__ == '__main__':
  sys.exit(app.run(main))
