"""Tiny models of each architecture, and how each of them is asked to translate.

Every learner has a model and a tokenizer made for it, turns pairs into what the model is trained on, and translates.
Letters: B pairs, S tokens of the longest.
"""

from __future__ import annotations

import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moekernels.checkpoint import OBSOLETE_WEIGHTS, replace_files
from moekernels.demo.corpus import Corpus, Pair
from moekernels.demo.numbers import LANGUAGES
from moekernels.models import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from moekernels.tokenizers import AutoTokenizer, GPTNeoXTokenizerFast, LlamaTokenizer, NllbTokenizer, T5Tokenizer

_VOCAB_SIZE = 160
_IGNORED = -100  # a label that is not learned
_WIDTH = 128
_EXPERTS = 8
_MAX_NEW_TOKENS = 32


class Learner(ABC):
    """A model, its tokenizer, and how they translate."""

    name: str
    auto_model: Any

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def create(cls, corpus: Corpus) -> Learner:
        """With new weights, and a tokenizer trained on the corpus."""

    @classmethod
    def load(cls, directory: Path) -> Learner:
        return cls(cls.auto_model.from_pretrained(directory, progress=False), AutoTokenizer.from_pretrained(directory))

    def save(self, directory: Path) -> None:
        with replace_files(directory, OBSOLETE_WEIGHTS) as stage:  # the model never with another's tokenizer
            self.model.save_pretrained(stage)
            self.tokenizer.save_pretrained(stage)

    @abstractmethod
    def batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The model's keywords for a step of training, labels among them."""

    @abstractmethod
    def translate(self, pairs: Sequence[Pair], **options: Any) -> list[str]:
        """Translations of the pairs' sources; `options` are those of `generate`."""

    def padded(self, rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
        """``[B, S]``, filled up with `value`."""
        length = max(map(len, rows))
        fill = [[value] * (length - len(row)) for row in rows]
        both = zip(rows, fill, strict=True)
        return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for row, f in both], device=self.model.device)


class EncoderDecoderLearner(Learner):
    auto_model = AutoModelForSeq2SeqLM

    @abstractmethod
    def source_ids(self, pair: Pair) -> list[int]: ...

    @abstractmethod
    def target_ids(self, pair: Pair) -> list[int]: ...

    def sources(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        input_ids = self.padded([self.source_ids(pair) for pair in pairs], pad)
        return {"input_ids": input_ids, "attention_mask": (input_ids != pad).long()}

    def batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        return {**self.sources(pairs), "labels": self.padded([self.target_ids(pair) for pair in pairs], _IGNORED)}


class NllbMoeLearner(EncoderDecoderLearner):
    """Languages are tokens: the source begins with its own, and the decoder is made to begin with the target's."""

    name = "nllb-moe"

    @classmethod
    def create(cls, corpus: Corpus) -> NllbMoeLearner:
        with _SentencePieceFile(corpus.texts(), unk_id=0, bos_id=1, eos_id=2) as file:
            tokenizer = NllbTokenizer(file, additional_special_tokens=list(LANGUAGES))
        assert tokenizer.pad_token_id is not None
        config = NllbMoeConfig(
            vocab_size=len(tokenizer),
            d_model=_WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=2 * _WIDTH,
            decoder_ffn_dim=2 * _WIDTH,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            dropout=0.0,
            attention_dropout=0.0,
            moe_token_dropout=0.0,
            max_position_embeddings=128,
            num_experts=_EXPERTS,
            expert_capacity=None,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            router_aux_loss_coef=0.01,
            output_router_logits=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
        )
        return cls(NllbMoeForConditionalGeneration(config), tokenizer)

    def source_ids(self, pair: Pair) -> list[int]:
        return self._ids(pair.source_language, pair.source)

    def target_ids(self, pair: Pair) -> list[int]:
        return self._ids(pair.target_language, pair.target)

    def _ids(self, language: str, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return [self.tokenizer.lang_code_to_id[language], *ids, self.tokenizer.eos_token_id]

    def translate(self, pairs: Sequence[Pair], **options: Any) -> list[str]:
        texts = [""] * len(pairs)
        for language, code in self.tokenizer.lang_code_to_id.items():
            chosen = [i for i, pair in enumerate(pairs) if pair.target_language == language]
            if not chosen:
                continue
            ids = self.model.generate(
                **self.sources([pairs[i] for i in chosen]),
                forced_bos_token_id=code,
                max_new_tokens=_MAX_NEW_TOKENS,
                **options,
            )
            for i, text in zip(chosen, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                texts[i] = text
        return texts


class SwitchLearner(EncoderDecoderLearner):
    """The source says which language is wanted, as T5's prefixes do."""

    name = "switch"

    @classmethod
    def create(cls, corpus: Corpus) -> SwitchLearner:
        with _SentencePieceFile(corpus.texts(), pad_id=0, eos_id=1, unk_id=2, bos_id=-1) as file:
            tokenizer = T5Tokenizer(file, extra_ids=0, additional_special_tokens=list(LANGUAGES))
        config = SwitchTransformersConfig(
            vocab_size=len(tokenizer),
            d_model=_WIDTH,
            d_kv=_WIDTH // 4,
            d_ff=2 * _WIDTH,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            num_heads=4,
            num_experts=_EXPERTS,
            expert_capacity=16,
            dropout_rate=0.0,
            router_aux_loss_coef=0.01,
            add_router_probs=True,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        return cls(SwitchTransformersForConditionalGeneration(config), tokenizer)

    def source_ids(self, pair: Pair) -> list[int]:
        ids: list[int] = self.tokenizer(pair.target_language + pair.source).input_ids
        return ids

    def target_ids(self, pair: Pair) -> list[int]:
        ids: list[int] = self.tokenizer(pair.target).input_ids
        return ids

    def translate(self, pairs: Sequence[Pair], **options: Any) -> list[str]:
        ids = self.model.generate(**self.sources(pairs), max_new_tokens=_MAX_NEW_TOKENS, **options)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


class DecoderLearner(Learner):
    """Source and target are one text, with a language before each; only the target is learned."""

    auto_model = AutoModelForCausalLM

    def prompt_ids(self, pair: Pair) -> list[int]:
        text = f"{pair.source_language}{pair.source}{pair.target_language}"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        prompts = [self.prompt_ids(pair) for pair in pairs]
        answers = [
            [*self.tokenizer(pair.target, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            for pair in pairs
        ]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[_IGNORED] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
        lengths = torch.tensor([[len(row)] for row in rows], device=self.model.device)
        input_ids = self.padded(rows, self.tokenizer.pad_token_id)
        mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": self.padded(labels, _IGNORED)}

    def translate(self, pairs: Sequence[Pair], **options: Any) -> list[str]:
        pad = self.tokenizer.pad_token_id
        input_ids = self.padded([self.prompt_ids(pair) for pair in pairs], pad, side="left")
        mask = (input_ids != pad).long()
        ids = self.model.generate(input_ids, attention_mask=mask, max_new_tokens=_MAX_NEW_TOKENS, **options)
        texts = self.tokenizer.batch_decode(ids[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


class OlmoeLearner(DecoderLearner):
    name = "olmoe"

    @classmethod
    def create(cls, corpus: Corpus) -> OlmoeLearner:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|padding|>", *LANGUAGES]
        trainer = trainers.BpeTrainer(
            vocab_size=_VOCAB_SIZE,
            special_tokens=special,
            initial_alphabet=sorted({c for text in corpus.texts() for c in _byte_letters(text)}),
            show_progress=False,
        )
        backend.train_from_iterator(corpus.texts(), trainer)
        tokenizer = GPTNeoXTokenizerFast(
            tokenizer_object=backend,
            pad_token="<|padding|>",
            padding_side="left",
            additional_special_tokens=list(LANGUAGES),
        )
        config = OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            num_experts=_EXPERTS,
            num_experts_per_tok=2,
            output_router_logits=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return cls(OlmoeForCausalLM(config), tokenizer)


class PhimoeLearner(DecoderLearner):
    name = "phimoe"

    @classmethod
    def create(cls, corpus: Corpus) -> PhimoeLearner:
        with _SentencePieceFile(corpus.texts(), unk_id=0, bos_id=1, eos_id=2) as file:
            tokenizer = LlamaTokenizer(
                file, pad_token="<unk>", padding_side="left", additional_special_tokens=list(LANGUAGES)
            )
        config = PhimoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_theta=10000.0,
            num_local_experts=_EXPERTS,
            router_aux_loss_coef=0.01,
            output_router_logits=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return cls(PhimoeForCausalLM(config), tokenizer)


LEARNERS: dict[str, type[Learner]] = {
    learner.name: learner for learner in (NllbMoeLearner, SwitchLearner, OlmoeLearner, PhimoeLearner)
}


class _SentencePieceFile:
    """A sentencepiece model trained on texts, as a file while the context lasts."""

    def __init__(self, texts: Iterable[str], **special: int) -> None:
        model = io.BytesIO()
        options: dict[str, Any] = {"model_type": "bpe", "vocab_size": _VOCAB_SIZE, "character_coverage": 1.0, **special}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, num_threads=1, minloglevel=2, **options
        )
        self._model = model.getvalue()
        self._directory = tempfile.TemporaryDirectory()

    def __enter__(self) -> str:
        file = Path(self._directory.name) / "sentencepiece.bpe.model"
        file.write_bytes(self._model)
        return str(file)

    def __exit__(self, *error: object) -> None:
        self._directory.cleanup()


def _byte_letters(text: str) -> str:
    """The letters that byte-level BPE writes the bytes of a text with."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
