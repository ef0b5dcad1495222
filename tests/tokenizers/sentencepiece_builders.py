"""Sentencepiece models trained on the spot, in checkpoint directories as the translation models have them."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import transformers

from moekernels.tokenizers.languages import M2M100, WMT21

TEXTS = (Path(__file__).parent / "data" / "multilingual.txt").read_text(encoding="utf-8").splitlines()
# Harder than what was trained on: special tokens of every kind in the text, white space, unseen scripts.
PROBES = (
    *TEXTS[::4],
    "",
    " ",
    " \n\t  ",
    "  leading,  inner and trailing  ",
    "line one\nline two\ttab\u00a0hard space\u3000wide space",
    "a</s>b </s> c<unk> <pad>d<s>",
    "Life __fr__ is __en____de__ like fra_Latn a eng_Latndeu_Latn river",
    "The <extra_id_0> opens <extra_id_1><extra_id_10>at<extra_id_99>",
    "a <mask> b<mask>c",
    "<|user|>\n What is <|end|>  \n<|assistant|> it?<|endoftext|> ",
    "\u13a3\u13b3 unseen \u13a3 in the middle \u16a0\u16b1",
    "\u2581already\u2581 marked \u2581",
    "ﬁne ½ \uff21\uff22\uff23 e\u0301 naïve 👩\u200d🚀",
    "x" * 200,
)  # fmt: skip


@cache
def bpe_model() -> bytes:
    """As M2M100 and NLLB have it."""
    return _train(model_type="bpe", vocab_size=900, unk_id=0, bos_id=1, eos_id=2, character_coverage=0.995)


@cache
def unigram_model() -> bytes:
    """As T5 and Switch have it."""
    return _train(model_type="unigram", vocab_size=700, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@cache
def byte_model() -> bytes:
    """As Llama 2 and PhiMoE have it: bytes for what has no piece, and white space as it is."""
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return _train(model_type="bpe", vocab_size=1000, unk_id=0, bos_id=1, eos_id=2, character_coverage=0.995, **options)


def _train(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    return model.getvalue()


@cache
def m2m_vocab() -> dict[str, int]:
    """Ids in another order than sentencepiece's, and none for some of its pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=bpe_model())
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    kept = [piece for position, piece in enumerate(reversed(pieces)) if position % 50]
    return {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *kept])}


def m2m_100(directory: Path, languages_listed: bool = True, **config: Any) -> Path:
    """M2M100's files. The released ones list the languages among the special tokens."""
    codes = WMT21 if config.get("language_codes") == "wmt21" else M2M100
    _write_json(directory / "vocab.json", m2m_vocab())
    (directory / "sentencepiece.bpe.model").write_bytes(bpe_model())
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "M2M100Tokenizer", **config})
    tokens: dict[str, Any] = {"eos_token": "</s>", "unk_token": "<unk>"}
    if languages_listed:
        tokens["additional_special_tokens"] = [f"__{code}__" for code in codes]
    _write_json(directory / "special_tokens_map.json", tokens)
    return directory


def nllb(directory: Path, fast: bool = True, **config: Any) -> Path:
    """NLLB's files, as transformers saves them with a fast tokenizer, or a sentencepiece model alone."""
    (directory / "sentencepiece.bpe.model").write_bytes(bpe_model())
    if fast:
        _converted("nllb").save_pretrained(directory)
        _mask_after_languages(directory)
    _update_json(directory / "tokenizer_config.json", {"tokenizer_class": "NllbTokenizer", **config})
    return directory


def t5(directory: Path, fast: bool = True, **config: Any) -> Path:
    """T5's files, as transformers saves them with a fast tokenizer, or a sentencepiece model alone."""
    (directory / "spiece.model").write_bytes(unigram_model())
    if fast:
        _converted("t5").save_pretrained(directory)
    _update_json(directory / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", **config})
    return directory


def llama(directory: Path, **config: Any) -> Path:
    """PhiMoE's files without its `tokenizer.json`: added tokens that claim the white space after them."""
    (directory / "tokenizer.model").write_bytes(byte_model())
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    names = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
    added = {
        str(1000 + index): {"content": name, "rstrip": name != "<|endoftext|>", **flags}
        for index, name in enumerate(names)
    }
    for index, name in enumerate(("<unk>", "<s>", "</s>")):
        added[str(index)] = {"content": name, "rstrip": name == "</s>", **flags}
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    settings.update(tokenizer_class="LlamaTokenizer", added_tokens_decoder=added, legacy=False)
    _write_json(directory / "tokenizer_config.json", {**settings, **config})
    return directory


def llama_fast(directory: Path, **config: Any) -> Path:
    """The same with a `tokenizer.json`, as transformers makes it of the others."""
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(llama(directory, **config))
    tokenizer.save_pretrained(directory)
    return directory


def _mask_after_languages(directory: Path) -> None:
    """The order of the released files. transformers 4.56.2 puts `<mask>` before the languages when it converts."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    first = len(tokenizer["model"]["vocab"])
    added = [token for token in tokenizer["added_tokens"] if token["id"] >= first]
    added.sort(key=lambda token: token["content"] == "<mask>")
    for index, token in enumerate(added, start=first):
        token["id"] = index
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token not in added] + added
    _write_json(directory / "tokenizer.json", tokenizer)
    decoder = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    _update_json(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder})


@cache
def _converted(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        # What transformers and protobuf have to say about converting is not the subject.
        warnings.simplefilter("ignore")
        path = Path(name) / "model"
        path.write_bytes(bpe_model() if kind == "nllb" else unigram_model())
        if kind == "nllb":
            tokenizer = transformers.NllbTokenizerFast(vocab_file=str(path))
        else:
            # The released files begin a text with a space, which 4.56.2 leaves out unless told.
            tokenizer = transformers.T5TokenizerFast(vocab_file=str(path), add_prefix_space=True)
            del tokenizer.init_kwargs["add_prefix_space"]
    tokenizer.vocab_file = None
    return tokenizer


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _update_json(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write_json(path, {**content, **changes})
