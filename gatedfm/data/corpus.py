"""From a configuration to everything that training and evaluation read."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gatedfm.data import features, pipeline, sources, text
from gatedfm.data.tokenizer import Tokenizer
from gatedfm.data.types import DataError, Source

ASSETS = 'assets'  # folder of a workdir
TOKENIZER, STATS = 'tokenizer.json', 'feature_stats.npz'


@dataclasses.dataclass(frozen=True)
class Assets:
  """What a model needs beside its parameters: tokenizer and feature statistics."""

  tokenizer: Tokenizer
  stats: features.FeatureStats

  def save(self, folder: Path) -> None:
    """Writes both files, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    self.tokenizer.save(folder / TOKENIZER)
    self.stats.save(folder / STATS)

  @property
  def sizes(self) -> dict[str, int]:
    """What the tokenizer says of the model: fields of its configuration, by name."""
    t = self.tokenizer
    # One language more: the unknown one.
    return {'vocab_size': t.vocab_size, 'languages': len(t.languages) + 1, 'tasks': len(t.tasks)}

  @classmethod
  def load(cls, folder: Path) -> Assets:
    """Reads them; raises DataError, naming folder or file, where they are missing or damaged."""
    if not (folder / TOKENIZER).exists() or not (folder / STATS).exists():
      raise DataError(
        f'{folder} has no {TOKENIZER} and {STATS}: not the assets of a trained model; '
        'give the workdir of a training run'
      )
    return cls(Tokenizer.load(folder / TOKENIZER), features.FeatureStats.load(folder / STATS))


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of all sources: utterances, their features, the examples made of them."""

  sources: Sequence[Source]
  caches: Sequence[features.FeatureCache]
  examples: pipeline.Examples
  shapes: Sequence[pipeline.Shape]

  def utterance_id(self, example: int) -> str:
    """The record id of an example, for messages."""
    source = self.sources[self.examples.source[example]]
    return source.records[self.examples.utterance[example]].id


def open_sources(
  config: pipeline.DataConfig, split: str, data_dir: Path, skip_bad: bool = False
) -> list[Source]:
  """The sources of a split, prepared where that has not been done yet."""
  return [sources.load(spec, split, data_dir, skip_bad) for spec in config.sources]


def open_features(opened: Sequence[Source], data_dir: Path) -> list[features.FeatureCache]:
  """The log-mel features of each source."""
  return [features.FeatureCache.build(s, data_dir / 'features', 2) for s in opened]


def make_assets(config: pipeline.DataConfig, vocab: int, data_dir: Path, skip_bad: bool) -> Assets:
  """Trains the tokenizer and gathers feature statistics on the training split alone.

  Raises:
    DataError: data that cannot be had, or a vocabulary that does not fit its texts.
  """
  train = open_sources(config, 'train', data_dir, skip_bad)
  targets = {t[3:] for t in config.tasks if t.startswith('st_')}
  texts, languages = [], set(targets)
  for source in train:
    for record in source.records:
      languages.add(record.language)
      if record.text:
        texts.append(text.normalize(record.text))
      texts += [text.normalize(record.translations[t]) for t in targets & set(record.translations)]
  try:
    tokenizer = Tokenizer.train(sorted(texts), vocab, sorted(languages), config.tasks)
  except ValueError as e:
    raise DataError(f'vocab: {e}') from e
  caches = open_features(train, data_dir)
  stats = features.FeatureStats.of(c.get(i) for c in caches for i in range(len(c)))
  return Assets(tokenizer, stats)


def open_split(
  config: pipeline.DataConfig,
  assets: Assets,
  split: str,
  data_dir: Path,
  batch_multiple: int = 1,
  skip_bad: bool = False,
  say: Callable[[str], None] = print,
) -> Split:
  """Opens a split, makes its examples and says what was left out, and why.

  The training split has the sources of `config.extra` too.

  Raises:
    DataError: data that cannot be had, no example, or a task that nothing trains.
  """
  opened = open_sources(config, split, data_dir, skip_bad)
  if split == 'train':
    opened += [sources.load(spec, split, data_dir, skip_bad) for spec in config.extra]
  caches = open_features(opened, data_dir)
  examples, skipped = pipeline.build_examples(opened, assets.tokenizer, config)
  numbers = {t: int((examples.task == assets.tokenizer.task_id(t)).sum()) for t in config.tasks}
  if split == 'train' and not all(numbers.values()):
    idle = ' '.join(t for t, number in numbers.items() if not number)
    raise DataError(
      f'no training utterance serves {idle} (asr needs text, st_xxx a translation to xxx, all a '
      f'length within the limits): give what is missing, or drop {idle} from data.tasks'
    )
  if split != 'train':  # seen now and then: padding costs less than compiling
    config = dataclasses.replace(config, num_buckets=-(-config.num_buckets // 2))
  shapes = pipeline.batch_shapes([examples], config, batch_multiple)
  say(
    f'data: {split}: {len(examples)} examples ('
    + ', '.join(f'{number} {task}' for task, number in numbers.items())
    + f') of {sum(len(s) for s in opened)} utterances, '
    'batch shapes (a compilation each): ' + ', '.join(f'{s.batch}x{s.frames}' for s in shapes)
  )
  if skipped:
    example = {}
    for name, why in skipped:
      example.setdefault(_kind(why), name)
    often = collections.Counter(_kind(why) for _, why in skipped).most_common(5)
    reasons = '; '.join(f'{number} {kind} (such as {example[kind]})' for kind, number in often)
    say(f'data: {split}: left out: {reasons}')
  return Split(opened, caches, examples, shapes)


def _kind(reason: str) -> str:
  """A reason without its own number, so that like ones can be counted."""
  kind = re.sub(r'\d+ (?=frames|tokens)', 'too many ', reason)
  return re.sub(r'\d+ (?=samples)', 'too few ', kind)
