"""Transcribes or translates audio files, or names their language.

Example:
  python -m gatedfm.transcribe --checkpoint=runs/quickstart/gated --task=asr a.wav b.ogg

Without --language each file's language is identified first. Prints text, language, the
modules that opened and the seconds that it took, without the compilation that the first file
of a length needs; with --timestamps also start, end and text of each word. Long files are cut
into windows, whose transcripts are joined where they overlap.
"""

import functools
import sys
from pathlib import Path

from absl import flags

from gatedfm import mains
from gatedfm.execution import EXECUTIONS

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Workdir of a training run.')
_LANGUAGE = flags.DEFINE_string('language', '', 'ISO code, such as fr or fra; empty: find out.')
_TASK = flags.DEFINE_string('task', 'asr', 'asr, lid or st:LANGUAGE, such as st:en.')
_CTC = flags.DEFINE_bool('ctc', False, 'Write by CTC alone, without the attention decoder.')
_CTC_WEIGHT = flags.DEFINE_float(
  'ctc_weight', None, 'Of CTC in joint decoding; by default as in training.', 0, 1
)
_EXECUTION = flags.DEFINE_enum(
  'execution',
  'auto',
  ['auto', *EXECUTIONS],
  'How gates are executed; auto chooses and says why.',
)
_SEARCH = mains.define_search()
_TIMESTAMPS = flags.DEFINE_bool('timestamps', False, 'Also say when each word is said.')
_WINDOW = flags.DEFINE_float('window', 30.0, 'Seconds of audio taken at a time.')
_OVERLAP = flags.DEFINE_float('overlap', 5.0, 'Seconds that neighbouring windows share.')
flags.mark_flag_as_required('checkpoint')


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise SystemExit('error: no audio files given; see --help')
  mains.set_up()
  from gatedfm.execution import files, long_form
  from gatedfm.execution.recognizer import Recognizer
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    task = files.parse_task(_TASK.value)
    language = files.parse_language(_LANGUAGE.value)
    search = _SEARCH(decoder=not _CTC.value)
    if _CTC.value and _CTC_WEIGHT.value is not None:
      raise ConfigError('--ctc leaves the attention decoder out: drop --ctc_weight')
    windows = long_form.Windows(_WINDOW.value, _OVERLAP.value)
    workdir = mains.folder(_CHECKPOINT.value)
    say = functools.partial(print, file=sys.stderr, flush=True)  # the results are on stdout
    options = _EXECUTION.value, _CTC_WEIGHT.value, search
    recognizer = Recognizer.load(workdir, *options, say=say)
    files.check(recognizer, task, language, _TIMESTAMPS.value)
    how = _TIMESTAMPS.value, windows, say
    failed = 0
    for path in map(Path, argv[1:]):
      try:
        result = files.transcribe(recognizer, path, task, language, *how)
      except files.FileError as e:
        print(f'{path}\terror: {e}', file=sys.stderr)
        failed += 1
        continue
      print(f'{path}\t{result.language}\t{result.text}')
      print(f'  {result.seconds:.3f} s  open {result.open:.0%}  {result.pattern}')
      for word in result.words:
        print(f'  {word.start:8.2f} {word.end:8.2f}  {word.text}')
  if failed:
    raise SystemExit(1)


if __name__ == '__main__':
  mains.run(main)
