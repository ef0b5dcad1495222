"""Fast tokenizers that add a beginning and an end of text only where their settings say so."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenizers.processors import TemplateProcessing

from moekernels.tokenizers.fast import PreTrainedTokenizerFast


class _BosEosTokenizerFast(PreTrainedTokenizerFast):
    """Replaces what `tokenizer.json` says about special tokens around a text by `add_bos_token` and `add_eos_token`."""

    model_input_names = ("input_ids", "attention_mask")
    #: Special tokens, unless the files say otherwise.
    default_tokens: ClassVar[dict[str, str]]
    default_add_bos_token: ClassVar[bool] = False

    def __init__(self, *, add_bos_token: bool | None = None, add_eos_token: bool = False, **kwargs: Any) -> None:
        super().__init__(**{**self.default_tokens, **kwargs})
        self._add_bos_token = self.default_add_bos_token if add_bos_token is None else add_bos_token
        self._add_eos_token = add_eos_token
        self._update_template()

    @property
    def add_bos_token(self) -> bool:
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = value
        self._update_template()

    @property
    def add_eos_token(self) -> bool:
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = value
        self._update_template()

    def _update_template(self) -> None:
        bos = self._token_if(self._add_bos_token, "bos")
        eos = self._token_if(self._add_eos_token, "eos")

        def around(text: str, sequence: int) -> str:
            return " ".join([*(f"{token}:{sequence}" for token, _ in bos), f"{text}:{sequence}",
                             *(f"{token}:{sequence}" for token, _ in eos)])  # fmt: skip

        single = around("$A", 0)
        with self._backends.changing() as backend:
            backend.post_processor = TemplateProcessing(
                single=single, pair=f"{single} {around('$B', 1)}", special_tokens=[*bos, *eos]
            )

    def _token_if(self, wanted: bool, role: str) -> list[tuple[str, int]]:
        if not wanted:
            return []
        token, index = getattr(self, f"{role}_token"), getattr(self, f"{role}_token_id")
        if token is None or index is None:
            raise ValueError(f"add_{role}_token is set, but there is no {role}_token")
        return [(token, index)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one or two texts with the special tokens around each."""
        bos = [index for _, index in self._token_if(self._add_bos_token, "bos")]
        eos = [index for _, index in self._token_if(self._add_eos_token, "eos")]
        first = bos + token_ids_0 + eos
        return first if token_ids_1 is None else first + bos + token_ids_1 + eos

    def _saved_settings(self) -> dict[str, Any]:
        settings = super()._saved_settings()
        # A token that the class has by default and this tokenizer has not must be said to be missing.
        settings.update({name: None for name in self.default_tokens if getattr(self, name) is None})
        return {**settings, "add_bos_token": self._add_bos_token, "add_eos_token": self._add_eos_token}


class GPTNeoXTokenizerFast(_BosEosTokenizerFast):
    """Byte-level BPE as in GPT-NeoX-20B and OLMoE."""

    default_tokens: ClassVar[dict[str, str]] = {
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }


class LlamaTokenizerFast(_BosEosTokenizerFast):
    """BPE over sentencepiece pieces, as in Llama 2 and PhiMoE."""

    padding_side = "left"
    default_tokens: ClassVar[dict[str, str]] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    default_add_bos_token: ClassVar[bool] = True
