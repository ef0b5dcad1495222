"""The examples of the NLLB-MoE documentation page. Only what is imported and the checkpoint's path differ.

Three of them call what transformers' NLLB tokenizer and model do not have: `lang_code_to_id`, `get_lang_id` and
`_shift_right`. Here they run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers


def translation(directory: Path, text: str, src_lang: str, tgt_lang: str, **kwargs: int) -> tuple[torch.Tensor, str]:
    """What transformers makes of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, src_lang=src_lang)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, forced_bos_token_id=tokenizer.convert_tokens_to_ids(tgt_lang), **kwargs)
    return tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]


def test_generating_with_nllb_moe(nllb_moe_54b: Path) -> None:
    from moekernels.models import AutoModelForSeq2SeqLM
    from moekernels.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nllb_moe_54b)
    model = AutoModelForSeq2SeqLM.from_pretrained(nllb_moe_54b)

    article = (
        "Previously, Ring's CEO, Jamie Siminoff, remarked the company started when his doorbell wasn't audible from "
        "his shop in his garage."
    )
    inputs = tokenizer(article, return_tensors="pt")

    translated_tokens = model.generate(
        **inputs, forced_bos_token_id=tokenizer.lang_code_to_id["fra_Latn"], max_length=50
    )
    text = tokenizer.batch_decode(translated_tokens, skip_special_tokens=True)[0]

    expected_tokens, expected = translation(nllb_moe_54b, article, "eng_Latn", "fra_Latn", max_length=50)
    assert torch.equal(translated_tokens, expected_tokens)
    assert text == expected and text
    assert translated_tokens[0, 1] == tokenizer.get_lang_id("fra_Latn")


def test_generating_from_any_other_language_than_english(nllb_moe_54b: Path) -> None:
    from moekernels.models import AutoModelForSeq2SeqLM
    from moekernels.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nllb_moe_54b, src_lang="ron_Latn")
    model = AutoModelForSeq2SeqLM.from_pretrained(nllb_moe_54b)

    article = "Şeful ONU spune că nu există o soluţie militară în Siria"
    inputs = tokenizer(article, return_tensors="pt")

    translated_tokens = model.generate(
        **inputs, forced_bos_token_id=tokenizer.lang_code_to_id["deu_Latn"], max_length=30
    )
    text = tokenizer.batch_decode(translated_tokens, skip_special_tokens=True)[0]

    expected_tokens, expected = translation(nllb_moe_54b, article, "ron_Latn", "deu_Latn", max_length=30)
    assert torch.equal(translated_tokens, expected_tokens)
    assert text == expected and text


def test_nllb_moe_config() -> None:
    from moekernels.models import NllbMoeConfig, NllbMoeModel

    # The defaults are a model of 9 billion parameters; on the meta device it has the same shapes.
    with torch.device("meta"):
        # Initializing a NllbMoe facebook/nllb-moe-54b style configuration
        configuration = NllbMoeConfig()

        # Initializing a model from the facebook/nllb-moe-54b style configuration
        model = NllbMoeModel(configuration)

        # Accessing the model configuration
        configuration = model.config

    assert (configuration.num_experts, configuration.encoder_sparse_step) == (128, 4)
    with torch.device("meta"):
        theirs = transformers.NllbMoeModel(transformers.NllbMoeConfig())
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(t.numel() for t in theirs.parameters())


def test_nllb_moe_model(random_nllb_moe_2_experts: Path) -> None:
    # The page imports one class and calls another, of another model.
    from moekernels.models import NllbMoeModel as SwitchTransformersModel
    from moekernels.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_nllb_moe_2_experts)
    model = SwitchTransformersModel.from_pretrained(random_nllb_moe_2_experts)

    input_ids = tokenizer(
        "Studies have been shown that owning a dog is good for you", return_tensors="pt"
    ).input_ids  # Batch size 1
    decoder_input_ids = tokenizer("Studies show that", return_tensors="pt").input_ids  # Batch size 1

    # preprocess: Prepend decoder_input_ids with start token which is pad token for NllbMoeModel
    decoder_input_ids = model._shift_right(decoder_input_ids)

    # forward pass
    outputs = model(input_ids=input_ids, decoder_input_ids=decoder_input_ids)
    last_hidden_states = outputs.last_hidden_state

    assert decoder_input_ids[0, 0] == model.config.decoder_start_token_id
    theirs = transformers.NllbMoeModel.from_pretrained(random_nllb_moe_2_experts).eval()
    expected = theirs(input_ids=input_ids, decoder_input_ids=decoder_input_ids).last_hidden_state
    torch.testing.assert_close(last_hidden_states, expected, rtol=1e-5, atol=1e-5)


def test_nllb_moe_for_conditional_generation(nllb_moe_54b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels.models import NllbMoeForConditionalGeneration
    from moekernels.tokenizers import AutoTokenizer

    model = NllbMoeForConditionalGeneration.from_pretrained(nllb_moe_54b)
    tokenizer = AutoTokenizer.from_pretrained(nllb_moe_54b)

    text_to_translate = "Life is like a box of chocolates"
    model_inputs = tokenizer(text_to_translate, return_tensors="pt")

    # translate to French
    gen_tokens = model.generate(**model_inputs, forced_bos_token_id=tokenizer.get_lang_id("eng_Latn"))
    print(tokenizer.batch_decode(gen_tokens, skip_special_tokens=True))

    expected_tokens, expected = translation(nllb_moe_54b, text_to_translate, "eng_Latn", "eng_Latn")
    assert torch.equal(gen_tokens, expected_tokens)
    assert capsys.readouterr().out == f"{[expected]}\n"
