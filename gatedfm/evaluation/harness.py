"""Language models in EleutherAI's lm-evaluation-harness, under the name `gatedfm`.

Example, with `pip install lm_eval` beside this package:
  python -m gatedfm.evaluation.harness run --model gatedfm \\
      --model_args checkpoint=runs/smollm2 --tasks hellaswag --limit 100

or in Python `lm_eval.simple_evaluate(harness.register()('runs/smollm2'), tasks=['hellaswag'])`.
Texts become tokens and requests are cut as by the harness's own model `hf`, so that figures
compare. Letters: B batch, L tokens, P targets.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gatedfm import compiling
from gatedfm.data import lm_batches
from gatedfm.data.lm_batches import Pair
from gatedfm.execution import lm_workdir
from gatedfm.execution.generation import Generator, Sampling
from gatedfm.models.lm import for_inference
from gatedfm.models.lm_losses import losses_and_hits
from gatedfm.models.speech_config import ConfigError

NAME = 'gatedfm'
# What the harness and its tasks call the number of tokens to write.
_MOST = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


class Answering:
  """The part of a model in the harness that does not need the harness.

  Args:
    checkpoint: language model, dense or pruned.
    batch_size: texts written at a time; `auto` is 8.
    room: tokens read at a time, B times L.
    max_length: tokens that are given at most, of the model's positions less one; longer texts lose
      their beginning, or are cut into windows where all of them counts. `hf` takes all positions,
      which for long ones is slow.
    max_gen_toks: tokens written at most, where a task does not say.
    add_bos_token: whether texts begin with the model's token for that; False as with `hf`.
    max_batch_size, device: which the harness gives to all models; JAX chooses its device.
  """

  def __init__(
    self,
    checkpoint: str | Path,
    batch_size: int | str = 8,
    room: int = 512,
    max_length: int = 2048,
    max_gen_toks: int = 256,
    add_bos_token: bool = False,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    self._checkpoint = str(checkpoint)
    model = lm_workdir.load(Path(checkpoint).expanduser())
    self._cfg, self._lm_tokenizer = model.cfg, model.tokenizer
    rows = 8 if str(batch_size).startswith('auto') else int(batch_size)
    self._generator = Generator(model, rows)  # which refuses a model without tokenizer
    if add_bos_token and model.cfg.bos < 0:
      raise ConfigError('add_bos_token: this model has no beginning of text')
    self._bos, self._room, self._max_gen_toks = add_bos_token, room, max_gen_toks
    self.max_length = min(max_length, model.cfg.max_tokens - 1)
    net, self._params = for_inference(model.cfg, model.params, 'skip')
    fixed = model.fixed()
    self._losses = compiling.Programs(
      jax.jit(lambda params, *batch: losses_and_hits(net, params, *batch, fixed))
    )

  @property
  def tokenizer_name(self) -> str:
    """What the harness tells its caches of requests apart by."""
    return self._checkpoint

  @property
  def eot_token_id(self) -> int:
    """Token that ends a text."""
    return self._cfg.eos

  @property
  def prefix_token_id(self) -> int:
    """Token that stands in front of a text where nothing else does."""
    return self._cfg.eos if self._cfg.bos < 0 else self._cfg.bos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **options: Any
  ) -> list[int]:
    """Tokens; behind a beginning of text where that is wanted and the text does not have it."""
    tokens = self._lm_tokenizer.encode(string)
    begin = self._bos and tokens[:1] != [self._cfg.bos]
    if add_special_tokens is not None:
      begin = add_special_tokens and self._bos
    return [self._cfg.bos, *tokens] if begin else tokens

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    disable_tqdm: bool = False,
    **options: Any,
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of each request's targets, and whether greedy decoding would write them."""
    pairs = [Pair(tuple(context), tuple(target)) for _, context, target in requests]
    out: list[Any] = [None] * len(pairs)
    pad = self._cfg.padding
    for b in lm_batches.batches(pairs, self._room, self.max_length + 1, pad):
      key = b.tokens.shape, b.at.shape
      loss_BxP, hit_BxP = map(np.asarray, self._losses(key, self._params, b.tokens, b.mask, b.at))
      for row in np.flatnonzero(b.number >= 0):
        real, number = b.weight[row] > 0, b.number[row]
        out[number] = -float(loss_BxP[row, real].sum()), bool(hit_BxP[row, real].all())
        self._remember('loglikelihood', requests[number][0], out[number])
    return out

  def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of whole texts, in windows of `max_length` where they are longer."""
    from lm_eval import utils

    windows, owner = [], []
    for number, request in enumerate(requests):
      cut = utils.get_rolling_token_windows(
        self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
      )
      for window in map(utils.make_disjoint_window, cut):
        windows.append((None, *window))
        owner.append(number)
    out = [0.0] * len(requests)
    for number, (likelihood, _) in zip(owner, self._loglikelihood_tokens(windows)):
      out[number] += likelihood
    for request, likelihood in zip(requests, out):
      self._remember('loglikelihood_rolling', request.args, likelihood)
    return out

  def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
    """What is written behind each context, those with the same options side by side."""
    alike, out = collections.defaultdict(list), [''] * len(requests)
    for number, request in enumerate(requests):
      alike[json.dumps(request.args[1], sort_keys=True)].append(number)
    for options, numbers in alike.items():
      most, sampling, until = _read(json.loads(options), self._max_gen_toks)
      if most >= self.max_length:
        raise ConfigError(f'{most} tokens to write leave none of {self.max_length} to be given')
      room = self.max_length - most
      given = [self.tok_encode(requests[n].args[0])[-room:] for n in numbers]
      prompts = [tokens or [self.prefix_token_id] for tokens in given]
      for n, written in zip(numbers, self._generator.generate(prompts, most, sampling, until)):
        out[n] = written.text
        self._remember('generate_until', requests[n].args, written.text)
    return out

  def _remember(self, kind: str, request: Any, answer: Any) -> None:
    """In the harness's cache of answers."""
    if request is not None:
      self.cache_hook.add_partial(kind, request, answer)


def _read(options: Mapping[str, Any], most: int) -> tuple[int, Sampling, list[str]]:
  """Options of a task as ours: tokens, choice of them, texts that end one.

  Raises:
    ConfigError: an option that would change what is written and that there is not.
  """
  options = dict(options)
  until = options.pop('until', None) or []
  numbers = [options.pop(name, None) for name in _MOST]
  most = next((int(n) for n in numbers if n is not None), most)
  temperature, top_p = float(options.pop('temperature', 0.0)), float(options.pop('top_p', 1.0))
  draws = options.pop('do_sample', None)
  if draws is None:
    draws = temperature > 0
  elif draws and not temperature:
    temperature = 1.0
  without_effect = {'num_beams': 1, 'top_k': 0, 'repetition_penalty': 1.0}
  for name, value in options.items():
    if value is not None and value != without_effect.get(name):
      raise ConfigError(f'{name}={value}: texts are written greedily or with temperature and top_p')
  sampling = Sampling(temperature, top_p) if draws else Sampling()
  return most, sampling, [until] if isinstance(until, str) else [text for text in until if text]


@functools.cache
def register() -> type:
  """The class that the harness then knows as `gatedfm`; its arguments are those of `Answering`.

  Raises:
    ConfigError: the harness is not installed.
  """
  try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
  except ImportError as e:
    raise ConfigError(
      f'the evaluation harness is not installed ({e}): pip install lm_eval'
    ) from None
  return register_model(NAME)(type('GatedfmLM', (Answering, TemplateLM), {}))


def command() -> None:
  """The harness's own command line, with `gatedfm` among its models."""
  register()
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()


if __name__ == '__main__':
  from gatedfm import mains

  with mains.clear_errors():
    mains.set_up()
    command()
