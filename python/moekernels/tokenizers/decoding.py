"""From ids to text."""

from __future__ import annotations

from typing import Any

from moekernels.tokenizers.encoding import as_list

# English spacing that word-level tokenizers introduce, and its repair, in this order.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Decoding:
    """Gives a tokenizer `decode` and `batch_decode`."""

    clean_up_tokenization_spaces: bool

    def _decode(self, token_ids: list[int], skip_special_tokens: bool, between: str) -> str:
        raise NotImplementedError

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of one id, or of a list or one-dimensional tensor of them.

        Args:
            token_ids: the ids.
            skip_special_tokens: leave them out.
            clean_up_tokenization_spaces: instead of the tokenizer's setting.
            spaces_between_special_tokens: put a space around added tokens, if the tokenizer is not fast.
        """
        ids = as_list(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        text = self._decode(ids, skip_special_tokens, " " if spaces_between_special_tokens else "")
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """The texts of several rows of ids."""
        options = (skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens)
        return [self.decode(ids, *options) for ids in sequences]

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Removes spaces before English punctuation and contractions."""
        for untidy, tidy in _CLEAN_UP:
            text = text.replace(untidy, tidy)
        return text
