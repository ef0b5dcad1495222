"""From a text to another one, by an encoder and a decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from moekernels.models import AutoModelForSeq2SeqLM
from moekernels.pipelines.generation import GenerationPipeline

_TRANSLATION = re.compile(r"translation_(.+)_to_(.+)")


@dataclass
class _Options:
    tensors: bool = False
    clean_up_tokenization_spaces: bool = False
    truncation: bool | str | None = None
    languages: dict[str, str] = field(default_factory=dict)  # of translation alone
    generation: dict[str, Any] = field(default_factory=dict)


class Text2TextGenerationPipeline(GenerationPipeline):
    """Generates a text from each text.

    Parameters of a call, besides those of `generate`, which are `max_new_tokens=256, num_beams=4` unless
    said otherwise:

    * `return_tensors`: results hold ids, not text.
    * `clean_up_tokenization_spaces` (False): as for decoding.
    * `truncation`: as for calling the tokenizer.
    * `stop_sequence`: text that ends the generation.

    A text gives a list with a dictionary per sequence, `[{"generated_text": ...}]`, and so does a list of texts; where
    there are several sequences for each, it gives a list of such lists.
    """

    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    default_task: ClassVar[str] = "text2text-generation"
    default_generation: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "num_beams": 4}
    encoder_decoder: ClassVar[bool] = True
    padding_side: ClassVar[str] = "right"
    #: What the names of results begin with.
    returns: ClassVar[str] = "generated"

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        results = super().__call__(inputs, **parameters)
        if isinstance(inputs, (list, tuple)) and all(len(records) == 1 for records in results):
            return [records[0] for records in results]
        return results

    def _options(self, parameters: dict[str, Any]) -> _Options:
        given = dict(parameters)
        tensors = given.pop("return_tensors", None)
        given.pop("return_text", None)
        stop = given.pop("stop_sequence", None)
        if stop is not None:
            given["stop_strings"] = stop
        own = ("clean_up_tokenization_spaces", "truncation")
        taken = {name: given.pop(name) for name in own if name in given}
        return _Options(
            tensors=bool(tensors), generation=given, **{k: value for k, value in taken.items() if value is not None}
        )

    def _encode(self, item: Any, options: _Options) -> dict[str, list[int]]:
        if not isinstance(item, str):
            raise TypeError(f"{self.task}: an input must be text, got {type(item).__name__}")
        inputs = self._tokenized(self.prefix + item, options)
        return {"input_ids": inputs["input_ids"], "attention_mask": [1] * len(inputs["input_ids"])}

    def _tokenized(self, text: str, options: _Options) -> Any:
        return self.tokenizer(text, truncation=options.truncation)

    def _decode(self, item: Any, encoded: dict[str, list[int]], output: Tensor, options: _Options) -> Any:
        if options.tensors:
            return [{f"{self.returns}_token_ids": ids} for ids in output]
        texts = self.tokenizer.batch_decode(
            output,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=options.clean_up_tokenization_spaces,
        )
        return [{f"{self.returns}_text": text} for text in texts]


class SummarizationPipeline(Text2TextGenerationPipeline):
    """Shortens texts: as :class:`Text2TextGenerationPipeline`, with results named `summary_text`."""

    default_task: ClassVar[str] = "summarization"
    returns: ClassVar[str] = "summary"


class TranslationPipeline(Text2TextGenerationPipeline):
    """Translates texts: as :class:`Text2TextGenerationPipeline`, with results named `translation_text`.

    Two more parameters are `src_lang` and `tgt_lang`, for models whose tokenizer knows languages. Without them the name
    of the task says what they are, `translation_en_to_fr`, or else the tokenizer.
    """

    default_task: ClassVar[str] = "translation"
    returns: ClassVar[str] = "translation"

    def _options(self, parameters: dict[str, Any]) -> _Options:
        given = dict(parameters)
        src_lang, tgt_lang = given.pop("src_lang", None), given.pop("tgt_lang", None)
        options = super()._options(given)
        if not hasattr(self.tokenizer, "get_lang_id"):
            return options
        named = _TRANSLATION.fullmatch(self.task)
        source, target = named.groups() if named else (self.tokenizer.src_lang, self.tokenizer.tgt_lang)
        target = tgt_lang or target
        if target is None:
            raise ValueError(f"{self.task}: which language to translate to? Pass tgt_lang")
        options.languages = {"src_lang": src_lang or source, "tgt_lang": target}
        options.generation.setdefault("forced_bos_token_id", self.tokenizer.get_lang_id(target))
        return options

    def _tokenized(self, text: str, options: _Options) -> Any:
        if not options.languages:
            return super()._tokenized(text, options)
        # Not by setting the tokenizer's language: that would be the next call's too, and another thread's.
        return self.tokenizer._build_translation_inputs(
            text, return_tensors=None, truncation=options.truncation, **options.languages
        )
