"""Makes a manifest of Europarl-ST (v1.1), unpacked: recognition and translation.

  python -m gatedfm.data.europarl_st --root=v1.1 --out=europarl_st.jsonl

Layout of the corpus: SOURCE/audios/SPEECH.m4a and SOURCE/TARGET/{train,dev,test}/ with
segments.lst (speech, start, end) and segments.SOURCE, segments.TARGET, a line per segment.
Directions that the corpus lacks are passed over. https://www.mllp.upv.es/europarl-st
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gatedfm.data import languages, manifest
from gatedfm.data.types import DataError

_SPLITS = {'train': 'train', 'dev': 'validation', 'test': 'test'}
_ORDER = list(_SPLITS.values())


def lines(root: Path, sources: Sequence[str], targets: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Lines of the manifest, with absolute paths.

  The corpus cuts the same speeches anew for each target language. Segments cut alike are
  one line with several translations. Recognition takes the cuts of the first target that
  a source has, so that nothing is counted twice. A speech that stands in several splits
  keeps but the one that is heard last: test, validation, train.

  Args:
    root: the unpacked corpus.
    sources: two-letter codes of spoken languages.
    targets: two-letter codes of text languages.

  Raises:
    DataError: no direction is there, or a file of one is missing or of another length.
  """
  for source in sources:
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    split_of: dict[str, str] = {}
    transcribed = None
    for target in targets:
      folder = root / source / target
      if target == source or not folder.is_dir():
        continue
      transcribed = transcribed or target
      for split, name in _SPLITS.items():
        for speech, start, end, text, translation in _segments(folder / split, source):
          split_of[speech] = max(split_of.get(speech, name), name, key=_ORDER.index)
          line = found.setdefault(
            (name, speech, start, end),
            {
              'id': f'{speech}:{start}-{end}',
              'audio': str((root / source / 'audios' / f'{speech}.m4a').absolute()),
              'start': float(start),
              'end': float(end),
              'language': languages.BY_CODE[source],
              'text': text,
              'translation': {},
              'task': ['asr', 'lid'] if target == transcribed else [],
              'group': speech,
              'split': name,
            },
          )
          code = languages.BY_CODE[target]
          line['translation'][code] = translation
          line['task'].append(f'st_{code}')
    if transcribed is None:
      raise DataError(f'no {source}/TARGET of {", ".join(targets)} below {root}')
    for line in found.values():
      if line['split'] == split_of[line['group']]:
        yield line


def _segments(folder: Path, source: str) -> Iterator[tuple[str, str, str, str, str]]:
  """(speech, start, end, transcript, translation) of one direction and split."""
  names = ('segments.lst', f'segments.{source}', f'segments.{folder.parent.name}')
  columns = []
  for name in names:
    try:
      # Not splitlines, which breaks a text at Unicode's separators too.
      with open(folder / name, encoding='utf-8', newline='\n') as file:
        columns.append(list(file))
    except OSError as error:
      raise DataError(f'{error}: is the corpus unpacked whole?') from error
  if len(set(map(len, columns))) != 1:
    counts = ', '.join(f'{name} {len(c)}' for name, c in zip(names, columns))
    raise DataError(f'files of {folder} differ in their number of lines: {counts}')
  for segment, text, translation in zip(*columns):
    speech, start, end = segment.split()
    if text.strip() and translation.strip():
      yield speech, start, end, text.strip(), translation.strip()


def main(argv: list[str]) -> None:
  from gatedfm import mains  # not above: what only imports this module needs no commands

  mains.no_arguments(argv)
  found = lines(mains.folder(flags.FLAGS.root), flags.FLAGS.sources, flags.FLAGS.targets)
  with mains.clear_errors():
    count = manifest.write(mains.folder(flags.FLAGS.out), found)
  print(f'{flags.FLAGS.out}: {count} segments')


if __name__ == '__main__':
  from gatedfm import mains

  flags.DEFINE_string('root', None, 'The unpacked corpus.', required=True)
  flags.DEFINE_string('out', None, 'The manifest to write.', required=True)
  flags.DEFINE_list('sources', ['de', 'fr', 'it'], 'Spoken languages.')
  flags.DEFINE_list('targets', ['en', 'de', 'fr', 'it'], 'Languages of the text.')
  mains.run(main)
