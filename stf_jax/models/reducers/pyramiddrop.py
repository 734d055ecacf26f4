"""PyramidDrop (arXiv 2410.17247), without its training: image tokens are dropped at several depths of the decoder.

Trained it is models/schedules/pyramiddrop.py, which has the same computation.

At each drop they are ranked by the attention that the prompt's last token would pay to them in the next layer,
averaged over heads. (FastV takes the layer just run.) Positions are counted from 0 again after each drop, as in the
authors' program, and new tokens of the answer continue from there in each layer.

- ``after`` lists the layers before the drops, as ``after=8+16+24``; by default a quarter, a half and three quarters of
  the layers.
- Each drop keeps the same fraction of the tokens left, rounded for each drop. ``keep`` counts the tokens after the last
  one: ``--keep=72`` of 576 is the authors' schedule, 288, 144 and 72, on average 270. With ``count=average`` it counts
  the average over all layers, which is what tables equate; an average below a quarter needs earlier drops. Every paper
  has its own schedule for 192, 128 and 64 tokens, which is why their rows differ.
- The authors' program counts the kept tokens of one image a row. Here each row ranks the tokens of all its images
  together.

It acts in the decoder and needs one row of attention per drop, but not from the attention kernel. Its own cost is the
queries and keys of one more layer per drop.
"""

from stf_jax.models.reducers.base import Count, DecoderReducer
from stf_jax.models.stages import last_token_attention, quarters


def pyramiddrop(*, after: tuple[int, ...] = (), count: Count = "after") -> DecoderReducer:
    """PyramidDrop with drops after these layers; none: the default ones."""
    return DecoderReducer(last_token_attention, after or quarters, count, scored_by="next", renumber=True)


COMPONENTS = {"pyramiddrop": pyramiddrop}
