"""Evaluates one trained model: recognition, translation, language identification, gates.

Example:
  python -m gatedfm.evaluate --checkpoint=runs/quickstart/dense --split=validation

Prints the mean scores; those of every language, and every output, go beside the checkpoint.
"""

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'Which split.')
_OTHER = flags.DEFINE_string('other', '', 'Source for language identification elsewhere.')
_DATA = flags.DEFINE_string(
  'data_dir',
  '',
  'Where data is prepared; empty: as in training, else $GATEDFM_DATA or ~/.cache/gatedfm.',
)
_CTC_WEIGHT = flags.DEFINE_float(
  'ctc_weight', None, 'Of CTC in joint decoding; by default as in training.', 0, 1
)
_SEARCH = mains.define_search()
flags.mark_flag_as_required('checkpoint')


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.analysis import report
  from gatedfm.evaluation import points

  with mains.clear_errors():
    workdir = mains.folder(_CHECKPOINT.value)
    how = _CTC_WEIGHT.value, _SEARCH()
    result = points.evaluate(workdir, _SPLIT.value, _OTHER.value, _DATA.value, *how)
    print(report.aligned(report.results({'points': {workdir.resolve().name: result}})))
    print(f'{points.file_of(workdir, _SPLIT.value, *how)} has the rest')


if __name__ == '__main__':
  mains.run(main)
