"""Tokens of texts alone and behind others, whichever kind of tokenizer it is."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.types import DataError


def byte_level():
  vocabulary = {c: i for i, c in enumerate(['a', 'i', 's', 'Ġ', 'Ġi', 'Ġis', 'b'])}
  out = Tokenizer(models.BPE(vocabulary, [('Ġ', 'i'), ('Ġi', 's')]))
  out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  out.decoder = decoders.ByteLevel()
  return out


def sentence_piece():
  """As Llama 2 has them: a space before every text, which decoding takes away."""
  vocabulary = {c: i for i, c in enumerate(['<s>', '▁', 'a', 'i', 's', '▁a', '▁i', '▁is', 'b'])}
  merges = [('▁', 'a'), ('▁', 'i'), ('▁i', 's')]
  out = Tokenizer(models.BPE(vocabulary, merges))
  out.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  steps = [decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  out.decoder = decoders.Sequence(steps)
  return out


@pytest.mark.parametrize('make', [byte_level, sentence_piece])
def test_what_follows_is_as_in_the_whole(make):
  tokenizer = LmTokenizer(make())
  whole = tokenizer.encode('ab is')
  given = tokenizer.encode('ab')
  assert tokenizer.encode(' is', follows=True) == whole[len(given) :]
  assert len(whole) == len(given) + 1
  assert tokenizer.decode(whole[len(given) :], follows=True) == ' is'
  assert tokenizer.decode(whole) == 'ab is'


def test_nothing_is_cut_or_filled_up():
  plain = byte_level()
  plain.enable_truncation(2)
  plain.enable_padding(length=9)
  assert LmTokenizer(plain).encode('abbaab') == [0, 6, 6, 0, 0, 6]


def test_what_texts_begin_with():
  assert not LmTokenizer(sentence_piece()).begins_with(0)
  begins = sentence_piece()
  begins.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  tokenizer = LmTokenizer(begins)
  assert tokenizer.begins_with(0)
  assert not tokenizer.begins_with(1)
  assert tokenizer.encode('a') == [5]
  assert tokenizer.name(0) == '<s>'
  assert tokenizer.name(99) is None


def test_two_files_of_gpt2(tmp_path):
  plain = byte_level()
  plain.add_special_tokens(['</s>'])
  vocabulary = plain.get_vocab()
  (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\nĠ i\nĠi s\n')
  assert not LmTokenizer.in_folder(tmp_path).begins_with(vocabulary['</s>'])
  about = tmp_path / 'tokenizer_config.json'
  about.write_text(json.dumps({'add_bos_token': True, 'bos_token': {'content': '</s>'}}))
  tokenizer = LmTokenizer.in_folder(tmp_path)
  assert tokenizer.begins_with(vocabulary['</s>'])
  assert tokenizer.encode('a is') == [0, 5]
  about.write_text('{')
  with pytest.raises(DataError, match='tokenizer_config.json is damaged'):
    LmTokenizer.in_folder(tmp_path)
