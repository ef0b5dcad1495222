"""The examples of the M2M100 documentation page. Only what is imported and the checkpoint's path differ."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

HI_TEXT = "जीवन एक चॉकलेट बॉक्स की तरह है।"


def reference(directory: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer of a directory."""
    return (
        transformers.M2M100ForConditionalGeneration.from_pretrained(directory).eval(),
        transformers.M2M100Tokenizer.from_pretrained(directory),
    )


def translation(directory: Path, text: str, src_lang: str, tgt_lang: str) -> list[str]:
    model, tokenizer = reference(directory)
    tokenizer.src_lang = src_lang
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, forced_bos_token_id=tokenizer.get_lang_id(tgt_lang))
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_usage_supervised_training(m2m100_418m: Path) -> None:
    from moekernels.models import M2M100ForConditionalGeneration
    from moekernels.tokenizers import M2M100Tokenizer

    model = M2M100ForConditionalGeneration.from_pretrained(m2m100_418m, device_map="auto")
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100_418m, src_lang="en", tgt_lang="fr")

    src_text = "Life is like a box of chocolates."
    tgt_text = "La vie est comme une boîte de chocolat."

    model_inputs = tokenizer(src_text, text_target=tgt_text, return_tensors="pt").to(model.device)

    loss = model(**model_inputs).loss  # forward pass

    their_model, their_tokenizer = reference(m2m100_418m)
    their_tokenizer.src_lang, their_tokenizer.tgt_lang = "en", "fr"
    inputs = their_tokenizer(src_text, text_target=tgt_text, return_tensors="pt")
    torch.testing.assert_close(loss.cpu(), their_model(**inputs).loss, rtol=1e-5, atol=1e-5)
    loss.backward()


def test_usage_generation(m2m100_418m: Path) -> None:
    from moekernels.models import M2M100ForConditionalGeneration
    from moekernels.tokenizers import M2M100Tokenizer

    hi_text = "जीवन एक चॉकलेट बॉक्स की तरह है।"
    chinese_text = "生活就像一盒巧克力。"

    model = M2M100ForConditionalGeneration.from_pretrained(m2m100_418m, device_map="auto")
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100_418m)

    # translate Hindi to French
    tokenizer.src_lang = "hi"
    encoded_hi = tokenizer(hi_text, return_tensors="pt").to(model.device)
    generated_tokens = model.generate(**encoded_hi, forced_bos_token_id=tokenizer.get_lang_id("fr"))
    french = tokenizer.batch_decode(generated_tokens, skip_special_tokens=True)

    assert generated_tokens[0, :2].tolist() == [model.config.decoder_start_token_id, tokenizer.get_lang_id("fr")]
    assert french == translation(m2m100_418m, hi_text, "hi", "fr") and french[0]

    # translate Chinese to English
    tokenizer.src_lang = "zh"
    encoded_zh = tokenizer(chinese_text, return_tensors="pt").to(model.device)
    generated_tokens = model.generate(**encoded_zh, forced_bos_token_id=tokenizer.get_lang_id("en"))
    english = tokenizer.batch_decode(generated_tokens, skip_special_tokens=True)

    assert english == translation(m2m100_418m, chinese_text, "zh", "en") and english[0]


def test_m2m100_config() -> None:
    from moekernels.models import M2M100Config, M2M100Model

    # A model of the released size takes 2 GB and a minute to fill; on the meta device it has the same shapes.
    with torch.device("meta"):
        # Initializing a M2M100 facebook/m2m100_418M style configuration
        configuration = M2M100Config()

        # Initializing a model (with random weights) from the facebook/m2m100_418M style configuration
        model = M2M100Model(configuration)

        # Accessing the model configuration
        configuration = model.config

    assert configuration.d_model == 1024
    assert sum(parameter.numel() for parameter in model.parameters()) == 483_905_536


def test_m2m100_tokenizer(m2m100_418m: Path) -> None:
    from moekernels.models import M2M100ForConditionalGeneration
    from moekernels.tokenizers import M2M100Tokenizer

    model = M2M100ForConditionalGeneration.from_pretrained(m2m100_418m)
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100_418m, src_lang="en", tgt_lang="ro")
    src_text = " UN Chief Says There Is No Military Solution in Syria"
    tgt_text = "Şeful ONU declară că nu există o soluţie militară în Siria"
    model_inputs = tokenizer(src_text, text_target=tgt_text, return_tensors="pt")
    outputs = model(**model_inputs)  # should work

    their_model, their_tokenizer = reference(m2m100_418m)
    their_tokenizer.src_lang, their_tokenizer.tgt_lang = "en", "ro"
    expected = their_model(**their_tokenizer(src_text, text_target=tgt_text, return_tensors="pt"))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_m2m100_tokenizer_token_types(m2m100_418m: Path) -> None:
    from moekernels.tokenizers import M2M100Tokenizer

    tokenizer = M2M100Tokenizer.from_pretrained(m2m100_418m)
    # All zeros pattern (default, used by RoBERTa, BART, etc.)
    tokenizer.token_type_ids_pattern = "all_zeros"
    # Returns: [0, 0, 0, ...] for both sequences
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7, 8]) == [0, 0, 0, 0, 0, 0]

    # BERT-style pattern (first sequence gets 0s, second gets 1s)
    tokenizer.token_type_ids_pattern = "bert_style"
    # Returns: [0, 0, 0, ..., 1, 1, 1, ...] for sequence pairs
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7, 8]) == [0, 0, 0, 0, 1, 1]


def test_m2m100_for_conditional_generation(m2m100_418m: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels.models import M2M100ForConditionalGeneration
    from moekernels.tokenizers import AutoTokenizer

    model = M2M100ForConditionalGeneration.from_pretrained(m2m100_418m)
    tokenizer = AutoTokenizer.from_pretrained(m2m100_418m)

    text_to_translate = "Life is like a box of chocolates"
    model_inputs = tokenizer(text_to_translate, return_tensors="pt")

    # translate to French
    gen_tokens = model.generate(**model_inputs, forced_bos_token_id=tokenizer.get_lang_id("fr"))
    print(tokenizer.batch_decode(gen_tokens, skip_special_tokens=True))

    assert capsys.readouterr().out == f"{translation(m2m100_418m, text_to_translate, 'en', 'fr')}\n"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_using_flash_attention_2(m2m100_418m: Path) -> None:
    """Where the package is missing, the example says what to install."""
    from moekernels.models import M2M100ForConditionalGeneration

    with pytest.raises(ImportError, match="flash-attn"):
        M2M100ForConditionalGeneration.from_pretrained(
            m2m100_418m, attn_implementation="flash_attention_2", device_map="auto"
        ).eval()


def test_using_scaled_dot_product_attention(m2m100_418m: Path) -> None:
    from moekernels.models import M2M100ForConditionalGeneration
    from moekernels.tokenizers import M2M100Tokenizer

    model = M2M100ForConditionalGeneration.from_pretrained(m2m100_418m, attn_implementation="sdpa", device_map="auto")

    tokenizer = M2M100Tokenizer.from_pretrained(m2m100_418m, src_lang="hi")
    tokens = model.generate(
        **tokenizer(HI_TEXT, return_tensors="pt").to(model.device), forced_bos_token_id=tokenizer.get_lang_id("fr")
    )
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == translation(m2m100_418m, HI_TEXT, "hi", "fr")
