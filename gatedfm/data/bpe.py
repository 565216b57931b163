"""Tokenizers of language models, in the format of Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gatedfm import atomic
from gatedfm.data.types import DataError


class LmTokenizer:
  """Text to tokens and back; nothing is put before or after a text."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Some tokenizers put a space before a text, and take it from it again.
    self._other = self.encode('a')

  @classmethod
  def load(cls, path: Path) -> LmTokenizer:
    """From a `tokenizer.json`; raises DataError where there is none, or a damaged one."""
    if not path.is_file():
      raise DataError(f'{path} is missing: import the checkpoint again, with its tokenizer')
    try:
      return cls(Tokenizer.from_file(str(path)))
    except Exception as e:  # the library raises nothing narrower
      raise DataError(f'{path} is not a tokenizer: {e}') from None

  @classmethod
  def in_folder(cls, folder: Path) -> LmTokenizer | None:
    """That of a checkpoint's folder: `tokenizer.json`, or GPT-2's two files; None without any."""
    if (folder / 'tokenizer.json').exists():
      return cls.load(folder / 'tokenizer.json')
    vocabulary, merges = folder / 'vocab.json', folder / 'merges.txt'
    if not (vocabulary.exists() and merges.exists()):
      return None
    try:
      out = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as e:
      raise DataError(f'{folder}: vocab.json and merges.txt are no tokenizer: {e}') from None
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    if bos := _begins(folder / 'tokenizer_config.json'):
      out.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', special_tokens=[(bos, out.token_to_id(bos))]
      )
    return cls(out)

  def save(self, path: Path) -> None:
    """Writes a `tokenizer.json`."""
    atomic.write_text(path, self._tokenizer.to_str(pretty=True))

  @property
  def vocab_size(self) -> int:
    """Tokens that there are."""
    return self._tokenizer.get_vocab_size()

  def name(self, token: int) -> str | None:
    """What a token is called; None where there is none of that number."""
    return self._tokenizer.id_to_token(token)

  def begins_with(self, token: int) -> bool:
    """Whether those who made it put this token before a text."""
    return self._tokenizer.encode('a').ids[:1] == [token]

  def encode(self, text: str, follows: bool = False) -> list[int]:
    """Tokens of a text; of one that `follows` another and begins with a space, as they are then."""
    tokens = lambda text: self._tokenizer.encode(text, add_special_tokens=False).ids
    return tokens(f'a{text}')[len(self._other) :] if follows else tokens(text)

  def decode(self, tokens: Sequence[int], follows: bool = False) -> str:
    """The text of tokens, without control tokens; of such that `follow` others with its space."""
    text = lambda tokens: self._tokenizer.decode(list(tokens))
    if not follows:
      return text(tokens)
    return text([*self._other, *tokens])[len(text(self._other)) :]

  def merge_order(self) -> list[int]:
    """Ordinary tokens: those that no merge makes by number, then as BPE merges them.

    Added tokens, such as those of control, are left out. Of a vocabulary that is no BPE all are
    ordered by number.
    """
    about = json.loads(self._tokenizer.to_str())
    merged = [m if isinstance(m, str) else ' '.join(m) for m in about['model'].get('merges', ())]
    rank = {text.replace(' ', ''): i for i, text in reversed(list(enumerate(merged)))}
    added = {token['id'] for token in about['added_tokens']}
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False).items()
    ordered = sorted((rank.get(text, -1), i) for text, i in vocabulary if i not in added)
    return [i for _, i in ordered]


def _begins(path: Path) -> str:
  """The token that such a file puts before texts; empty where it has none or is not there."""
  try:
    about = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  except ValueError as e:
    raise DataError(f'{path} is damaged: {e}') from None
  token = about.get('bos_token') if about.get('add_bos_token') else None
  return token.get('content', '') if isinstance(token, dict) else token or ''
