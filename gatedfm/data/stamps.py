"""tuxpaint-stamps: short descriptions read by volunteers in nine languages, and translated.

Each stamp (item) has a text file with its English description and translations into up to
78 locales, and recordings of some of them. The default set of the project: see `Stamps`.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.stats
import soundfile
import tensorflow_datasets as tfds

from gatedfm.data import audio_io, fetch, languages, splits, store
from gatedfm.data.progress import track
from gatedfm.data.types import LANGUAGES, SPLITS, DataError, Parallel, Record

PACKAGE = fetch.DebianPackage(
  name='tuxpaint-stamps-default',
  version='2022.06.04-1',
  sha256='6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
  megabytes=161,
)
STAMPS = 'usr/share/tuxpaint/stamps'  # inside the package
_TEXTS = 'texts.jsonl'  # beside the ArrayRecord

# Locales of the package: one per language, regional variants and second scripts left out.
LOCALES = languages.BY_CODE | {'zh_CN': 'zho'}

# Recordings outside this range of actual over expected seconds do not hold their
# transcript: some Catalan, Greek and Belarusian ones read but the letter or first words.
PLAUSIBLE = (0.65, 2.5)
_FIT_AT_LEAST = 50  # recordings of a language, for an expectation

# Of the numbers 0..999 the one that brings every language closest to 80/10/10 %.
SALT = 'tuxpaint-stamps-434'


@dataclasses.dataclass(frozen=True)
class Item(Parallel):
  """A stamp: its texts, and the path of its recordings by language."""

  recordings: Mapping[str, Path]


@dataclasses.dataclass(frozen=True)
class Clip:
  """A recording that is used: an item and the language spoken."""

  item: Item
  language: str

  @property
  def id(self) -> str:
    return f'{self.item.id}:{self.language}'


def parse_texts(content: str) -> dict[str, str]:
  """Texts by ISO 639-3 language of one .txt file: English first, then `locale.utf8=`."""
  first, *lines = content.split('\n')
  texts = {'eng': first.strip()}
  for line in lines:
    locale, found, text = line.partition('.utf8=')
    if found and locale.strip() in LOCALES and text.strip():
      texts[LOCALES[locale.strip()]] = text.strip()
  return texts


def read_items(root: Path) -> list[Item]:
  """Reads an unpacked package and groups its items.

  Items that share the English text, the text in one of the nine spoken languages, or a
  recording form one group: 37 % of the test texts would stand in training if single items
  were split. In the pinned package 952 items make 727 groups of at most 9 items.

  Args:
    root: the folder `usr/share/tuxpaint/stamps`.

  Returns:
    Items in the order of their paths.

  Raises:
    DataError: there are no texts below root.
  """
  names, texts, recordings, keys = [], [], [], []
  for path in sorted(root.rglob('*.txt')):
    found = parse_texts(path.read_text(encoding='utf-8'))
    if not found['eng']:
      continue
    oggs = {
      language: ogg
      for locale, language in LOCALES.items()
      if language in LANGUAGES and language in found
      for ogg in [path.with_name(f'{path.stem}_desc_{locale}.ogg')]
      if ogg.exists()
    }
    names.append(path.relative_to(root).with_suffix('').as_posix())
    texts.append(found)
    recordings.append(oggs)
    spoken = [(lang, splits.text_key(found[lang])) for lang in LANGUAGES if lang in found]
    digests = [fetch.sha256(ogg) for ogg in oggs.values()]
    keys.append([('eng', splits.text_key(found['eng'])), *spoken, *digests])
  if not names:
    raise DataError(f'no stamps below {root}: it should hold usr/share/tuxpaint/stamps')
  items = []
  for i, first in enumerate(splits.connected(keys)):
    group = splits.text_key(texts[first]['eng'])
    split = splits.split_of(group, SALT)
    items.append(Item(names[i], texts[i], group, split, recordings[i]))
  return items


def select(items: Sequence[Item]) -> list[Clip]:
  """Chooses the recordings to use.

  Left out are copies (variants of a stamp carry the same recordings: 13 % of the files),
  recordings with several transcripts, and those of implausible length for their transcript.
  """
  clips: dict[tuple[str, str], Clip] = {}
  transcripts: dict[tuple[str, str], set[str]] = {}
  for item in items:
    for language, path in item.recordings.items():
      key = (language, fetch.sha256(path))
      clips.setdefault(key, Clip(item, language))
      transcripts.setdefault(key, set()).add(splits.text_key(item.texts[language]))
  unique = [clip for key, clip in clips.items() if len(transcripts[key]) == 1]
  by_language = [[c for c in unique if c.language == language] for language in LANGUAGES]
  return sorted(itertools.chain(*map(_plausible, by_language)), key=lambda clip: clip.id)


def _plausible(clips: Sequence[Clip]) -> list[Clip]:
  """Clips of one language and speaker whose length fits a robust line over characters."""
  if len(clips) < _FIT_AT_LEAST:
    return list(clips)
  length = np.array([len(c.item.texts[c.language]) for c in clips])
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    paths = [c.item.recordings[c.language] for c in clips]
    seconds = np.array([info.duration for info in pool.map(soundfile.info, paths)])
  usual = length <= np.percentile(length, 95)
  slope, intercept, *_ = scipy.stats.theilslopes(seconds[usual], length[usual])
  ratio = seconds / (intercept + slope * length)
  low, high = PLAUSIBLE
  return [clip for clip, r in zip(clips, ratio) if low <= r <= high]


class TuxpaintStamps(tfds.core.GeneratorBasedBuilder):
  """The recordings as ArrayRecord, without TensorFlow. Splits 80/10/10 by text group.

  Args:
    tree: an unpacked package to read instead of fetching the pinned one.
    downloads: folder of fetched packages.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar = {'1.0.0': 'Recordings of the package 2022.06.04-1.'}

  def __init__(self, *, tree: Path | None = None, downloads: Path | None = None, **kwargs):
    self._tree = tree
    self._downloads = downloads
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description='Short spoken descriptions in nine languages, with translations.',
      homepage='https://tuxpaint.org/stamps/',
      license='GPL-2.0',
      features=tfds.features.FeaturesDict(
        {
          'id': text(),
          'language': text(),
          'text': text(),
          'translations': text(doc='JSON object: text by ISO 639-3 language'),
          'group': text(),
          'audio': tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding='bytes'),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # apt-get fetches
    if self._tree is not None:
      return self._generators(self._tree)
    deb = fetch.fetch(PACKAGE, self._downloads)
    self._unpacked = tempfile.TemporaryDirectory(dir=self._downloads)
    print('unpacking the recordings', flush=True)
    fetch.unpack(deb, Path(self._unpacked.name))
    return self._generators(Path(self._unpacked.name) / STAMPS)

  def _generators(self, root: Path):
    items = read_items(root)
    with open(Path(self.data_path) / _TEXTS, 'w', encoding='utf-8') as file:
      for item in items:
        texts = Parallel(item.id, item.texts, item.group, item.split)
        file.write(json.dumps(dataclasses.asdict(texts), ensure_ascii=False) + '\n')
    clips = select(items)
    return {
      split: self._generate_examples([clip for clip in clips if clip.item.split == split])
      for split in SPLITS
    }

  def _generate_examples(self, clips: Sequence[Clip]):
    decode = lambda clip: audio_io.load(clip.item.recordings[clip.language])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      audios = track(pool.map(decode, clips), len(clips), 'decoding stamps', 'recordings')
      for key, (audio, clip) in enumerate(zip(audios, clips)):
        item, language = clip.item, clip.language
        translations = {k: v for k, v in item.texts.items() if k != language}
        example = {
          'id': clip.id,
          'language': language,
          'text': item.texts[language],
          'translations': json.dumps(translations, ensure_ascii=False, sort_keys=True),
          'group': item.group,
          'audio': audio,
        }
        yield key, example


def folder(data_dir: Path) -> Path:
  """Where `prepare` puts the data set below the cache folder `data_dir`."""
  return data_dir / 'tfds' / 'tuxpaint_stamps' / str(TuxpaintStamps.VERSION)


def prepare(data_dir: Path, tree: Path | None = None) -> Path:
  """Builds the data set unless it is there.

  Args:
    data_dir: the cache folder.
    tree: an unpacked package to read instead of fetching the pinned one.

  Returns:
    The folder of the prepared data set, for `Stamps`.

  Raises:
    FetchError: the package cannot be fetched.
  """
  made = folder(data_dir)
  if not made.exists():
    downloads = data_dir / 'downloads'
    downloads.mkdir(parents=True, exist_ok=True)
    builder = TuxpaintStamps(tree=tree, downloads=downloads, data_dir=str(data_dir / 'tfds'))
    tfds.disable_progress_bar()
    try:
      builder.download_and_prepare()
    except OSError:
      if not made.exists():  # else another process was faster, and its data set stands
        raise
  return made


def texts(folder: Path) -> list[Parallel]:
  """Texts of all stamps, recorded or not, of the data set that `prepare` made."""
  with open(folder / _TEXTS, encoding='utf-8') as lines:
    return [Parallel(**json.loads(line)) for line in lines]


class Stamps:
  """A split of a prepared `TuxpaintStamps` as a source.

  An index of the records lies beside the ArrayRecord, so that opening decodes no audio.

  Args:
    folder: what `prepare` returned.
    split: 'train', 'validation' or 'test'.
  """

  name = 'stamps'

  def __init__(self, folder: Path, split: str):
    splits.check_split(split)
    self._folder, self._split = folder, split
    index = folder / f'records-{split}.jsonl'
    if not index.exists():
      store.write_records(index, map(_to_record, self._examples))
    self.records = store.read_records(index)
    self.fingerprint = store.fingerprint(index, self.name, split)

  def __len__(self) -> int:
    return len(self.records)

  def audio(self, i: int) -> np.ndarray:
    """Audio of record i: int16 [S] at 16 kHz."""
    return self._examples[i]['audio']

  @functools.cached_property
  def _examples(self):
    builder = tfds.builder_from_directory(str(self._folder))
    return builder.as_data_source(self._split)

  def __reduce__(self):
    return type(self), (self._folder, self._split)


def _to_record(example: Mapping[str, Any]) -> Record:
  return Record(
    id=example['id'].decode(),
    source=Stamps.name,
    language=example['language'].decode(),
    text=example['text'].decode(),
    translations=json.loads(example['translations']),
    num_samples=len(example['audio']),
    group=example['group'].decode(),
  )
