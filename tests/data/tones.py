"""A source of speech made of tones, for the tests of the data room."""

import numpy as np

from gatedfm.data import types

WORDS = {
  'fra': 'un chat noir dort ici l’été à côté du grand château',
  'rus': 'чёрный кот спит здесь летом у большого дома',
  'eng': 'the black cat sleeps here in summer by a big house',
}


class ToneSource:
  """`size` utterances of 0.3 to 2 s in French and Russian, translated to English."""

  def __init__(self, size: int = 40, name: str = 'tones', seed: int = 0):
    rng = np.random.default_rng(seed)
    self.name = name
    self.fingerprint = f'{name}-{size}-{seed}'
    self.records = []
    for i in range(size):
      language = ('fra', 'rus')[i % 2]
      speak = lambda lang: ' '.join(rng.choice(WORDS[lang].split(), rng.integers(1, 5)))
      self.records.append(
        types.Record(
          id=f'{name}/{i}',
          source=name,
          language=language,
          text=None if i % 10 == 7 else speak(language),
          translations={} if i % 10 == 3 else {'eng': speak('eng')},
          num_samples=int(rng.integers(4_800, 32_000)),
          group=str(i),
        )
      )

  def __len__(self) -> int:
    return len(self.records)

  def audio(self, i: int) -> np.ndarray:
    time = np.arange(self.records[i].num_samples) / types.SAMPLE_RATE
    noise = np.random.default_rng(i).normal(0, 300, len(time))
    return (8_000 * np.sin(2 * np.pi * (200 + 40 * i) * time) + noise).astype(np.int16)
