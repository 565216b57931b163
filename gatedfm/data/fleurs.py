"""Makes a manifest of FLEURS, unpacked: recognition and n-way parallel translation.

  python -m gatedfm.data.fleurs --root=fleurs --languages=fr_fr,es_419 --out=fleurs.jsonl

Layout, of the archives that TFDS (`xtreme_s/fleurs.*`) downloads and of the repository
google/fleurs on Hugging Face with its `audio/*.tar.gz` unpacked in place: LANGUAGE/{train,
dev,test}.tsv without header (id, file, raw transcript, transcript, characters, samples,
gender) and LANGUAGE/audio/{train,dev,test}/FILE.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gatedfm.data import languages, manifest
from gatedfm.data.types import DataError

_SPLITS = {'train': 'train', 'dev': 'validation', 'test': 'test'}


def lines(root: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Lines of the manifest, with absolute paths.

  Sentences have the same id in all languages: each line takes the texts of the other named
  languages as its translations, and the sentence as its group.

  Args:
    root: the unpacked corpus.
    names: languages as FLEURS names them.

  Raises:
    DataError: a file is missing or has other columns.
  """
  rows = {
    (name, split): list(_rows(root / name / f'{split}.tsv')) for name in names for split in _SPLITS
  }
  texts: dict[str, dict[str, str]] = {}
  for (name, _), table in rows.items():
    for sentence, _, text in table:
      texts.setdefault(sentence, {})[_code(name)] = text
  for (name, split), table in rows.items():
    for sentence, file, text in table:
      others = {k: v for k, v in texts[sentence].items() if k != _code(name)}
      yield {
        'id': f'{name}/{split}/{file}',
        'audio': str((root / name / 'audio' / split / file).absolute()),
        'language': _code(name),
        'text': text,
        'translation': others,
        'group': sentence,
        'split': _SPLITS[split],
      }


def _code(name: str) -> str:
  code = name.split('_')[0]
  return languages.BY_CODE.get(code, code)


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
  """(sentence id, file, raw transcript) of a table."""
  try:
    with open(path, encoding='utf-8', newline='') as file:
      table = list(csv.reader(file, delimiter='\t', quoting=csv.QUOTE_NONE))
  except OSError as error:
    raise DataError(f'{error}: is the corpus unpacked whole?') from error
  for number, row in enumerate(table, start=1):
    if len(row) != 7:
      raise DataError(f'{path} line {number} has {len(row)} columns, expected 7')
    yield row[0], row[1], row[2]


def main(argv: list[str]) -> None:
  from gatedfm import mains  # not above: what only imports this module needs no commands

  mains.no_arguments(argv)
  found = lines(mains.folder(flags.FLAGS.root), flags.FLAGS.languages)
  with mains.clear_errors():
    count = manifest.write(mains.folder(flags.FLAGS.out), found)
  print(f'{flags.FLAGS.out}: {count} utterances')


if __name__ == '__main__':
  from gatedfm import mains

  flags.DEFINE_string('root', None, 'The unpacked corpus.', required=True)
  flags.DEFINE_string('out', None, 'The manifest to write.', required=True)
  flags.DEFINE_list('languages', None, "As in 'fr_fr,en_us'.", required=True)
  mains.run(main)
