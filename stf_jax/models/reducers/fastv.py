"""FastV (arXiv 2403.06764): image tokens with little attention are dropped inside the decoder.

After layer K it ranks them by the attention that the prompt's last token pays to them in that layer, averaged over
heads; all later layers, and their caches, hold only the best of them and the text, at their old positions.

- The rule is that of the authors' program. Section 4.1 of the paper describes another one, the mean attention from all
  other tokens, which keeps other tokens.
- Tokens are ranked once, while the prompt is read: what the authors' README calls static pruning of the cache. The
  program behind the paper's numbers ranks again at every new token, by that token. Only the first token of an answer is
  certain to be the same.
- K is the option ``after``. The paper's tables use 2, the authors' program for lmms-eval 3; published rows mix both.
- ``keep`` counts the tokens after layer K, as the authors do. Tables of later papers equate the average over all
  layers: that is ``count=average``.
- The authors' program handles one image in a batch of one. Here each row ranks the tokens of all its images together.

It acts in the decoder and needs one row of attention, but not from the attention kernel: its own cost is one query
against all keys of one layer.
"""

from stf_jax.models.reducers.base import Count, DecoderReducer
from stf_jax.models.stages import last_token_attention


def fastv(*, after: int = 2, count: Count = "after") -> DecoderReducer:
    """FastV with K = ``after``."""
    return DecoderReducer(last_token_attention, after, count)


COMPONENTS = {"fastv": fastv}
