"""Counts the special tokens of an encoded conversation, and those that the template should have added."""

import collections
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from stf_jax.data.conversation import Encoded
from stf_jax.models.decoders.chat import Control, Item, Mark


def count_special_tokens(
    result: Encoded, items: Sequence[Item], tokenizer: PreTrainedTokenizerFast
) -> tuple[collections.Counter, collections.Counter]:
    """Returns how often each special token occurs outside of images, and how often it should."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    found = collections.Counter(token for token in result.tokens[~result.is_image].tolist() if token in special)
    expected = collections.Counter(tokenizer("").input_ids)
    for item in items:
        if isinstance(item, Control) or item is Mark.END:
            token = tokenizer.eos_token if item is Mark.END else item.token
            expected[tokenizer.convert_tokens_to_ids(token)] += 1
    return found, expected
