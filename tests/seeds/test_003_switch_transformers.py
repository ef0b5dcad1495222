"""The examples of the Switch Transformers documentation page. Only what is imported and the checkpoint's path differ.

Left out are the examples that need a `pipeline`, the command line of transformers, or bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

#: The page's first GPU, where there is one.
DEVICE = 0 if torch.cuda.is_available() else "cpu"


def test_automodel(switch_base_8: Path) -> None:
    from moekernels.models import AutoModelForSeq2SeqLM
    from moekernels.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(switch_base_8)
    model = AutoModelForSeq2SeqLM.from_pretrained(switch_base_8, device_map="auto", dtype=torch.float16)

    input_text = "The capital of France is ."
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids.to(DEVICE)

    outputs = model.generate(input_ids)
    text = tokenizer.decode(outputs[0])

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(switch_base_8, dtype=torch.float16).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(switch_base_8)
    expected = theirs.generate(their_tokenizer(input_text, return_tensors="pt").input_ids)
    assert torch.equal(outputs.cpu(), expected)
    assert text == their_tokenizer.decode(expected[0]) and text.startswith("<pad>")


def test_switch_transformers_config() -> None:
    """What the page says of the defaults."""
    from moekernels.models import SwitchTransformersConfig, SwitchTransformersModel

    # Of the released size; on the meta device it has the same shapes.
    with torch.device("meta"):
        model = SwitchTransformersModel(SwitchTransformersConfig())
        theirs = transformers.SwitchTransformersModel(transformers.SwitchTransformersConfig())
    assert model.config.d_kv == model.config.d_model // model.config.num_heads
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(t.numel() for t in theirs.parameters())


def test_sentinel_prompts(switch_base_8: Path) -> None:
    """Masked spans, for which the page's models were trained: source and labels with sentinel tokens."""
    from moekernels.models import SwitchTransformersForConditionalGeneration
    from moekernels.tokenizers import T5Tokenizer

    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch_base_8)
    tokenizer = T5Tokenizer.from_pretrained(switch_base_8)
    source = tokenizer("The <extra_id_0> walks in <extra_id_1> park", return_tensors="pt")
    labels = tokenizer("<extra_id_0> cute dog <extra_id_1> the <extra_id_2>", return_tensors="pt").input_ids
    outputs = model(input_ids=source.input_ids, labels=labels)

    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(switch_base_8).eval()
    their_tokenizer = transformers.T5Tokenizer.from_pretrained(switch_base_8, legacy=True)
    their_labels = their_tokenizer("<extra_id_0> cute dog <extra_id_1> the <extra_id_2>", return_tensors="pt").input_ids
    assert torch.equal(labels, their_labels)
    expected = theirs(input_ids=source.input_ids, labels=labels, output_router_logits=False)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-5)
