"""Decoding by CTC alone: the attention decoder is not in the program.

Letters: B batch, S frames of 40 ms, L tokens, K hypotheses, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gatedfm.execution import beam, ctc_prefix
from gatedfm.execution.decoding import Decoded, Request, Vocabulary
from gatedfm.gates import Gates


def alone(ctc: ctc_prefix.Frames, gates: Gates, x: Request, vocabulary: Vocabulary) -> Decoded:
  """The best path's text, or by a beam the likeliest text over all of its paths.

  The second is prefix search (Graves, "Supervised Sequence Labelling with Recurrent Neural
  Networks" (2008), section 7.5.1): texts grow token by token, ranked by the probability that the
  utterance's begins with them; scores are log-probabilities of whole texts.

  Args:
    ctc: what CTC says of each frame.
    gates: all that were used; the decoder's are left out.
    x: `search`, `length` and `steps` are read.
    vocabulary: what may be written.
  """
  used = Gates({name: g for name, g in gates.values.items() if not name.startswith('decoder/')})
  may_V = vocabulary.allowed.copy()
  may_V[ctc_prefix.BLANK], may_V[vocabulary.eos] = True, False
  log_probs = jnp.where(may_V, ctc.log_probs, ctc_prefix.IMPOSSIBLE)
  path_BxS = ctc_prefix.best_path(ctc.replace(log_probs=log_probs))
  if x.search.beam == 1:
    return Decoded(collapsed(path_BxS, x.length, vocabulary.eos), path_BxS, None, used)
  found = beam.search(None, lambda caches, *_: caches, (), jnp.ones(()), ctc, x, vocabulary)
  return Decoded(found.tokens[:, 0], path_BxS, None, used, found.tokens, found.score)


def collapsed(path_BxS: jax.Array, length: int, eos: int) -> jax.Array:
  """A path's text: repeats merged, blanks dropped; `[B, length]`, `eos` from its end on."""
  before_BxS = jnp.pad(path_BxS, ((0, 0), (1, 0)))[:, :-1]
  kept_BxS = (path_BxS != before_BxS) & (path_BxS != ctc_prefix.BLANK)
  to_BxS = jnp.where(kept_BxS, jnp.cumsum(kept_BxS, 1) - 1, length)  # where nothing is written
  empty_BxL = jnp.full((len(path_BxS), length), eos, jnp.int32)
  rows_Bx1 = jnp.arange(len(path_BxS))[:, None]
  return empty_BxL.at[rows_Bx1, to_BxS].set(path_BxS.astype(jnp.int32), mode='drop')
