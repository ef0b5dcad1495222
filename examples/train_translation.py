"""Train a tiny NLLB-MoE to translate written-out numbers, in about a minute on two cores. Copy it and change it.

python examples/train_translation.py
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import sentencepiece
import torch

from moekernels import NllbMoeConfig, NllbMoeForConditionalGeneration, NllbTokenizer
from moekernels.demo.numbers import LANGUAGES, LIMIT  # {"eng_Latn": 407 -> "four hundred and seven", ...}

STEPS, BATCH, LEARNING_RATE = 450, 128, 3e-3
random.seed(0)
torch.manual_seed(0)
numbers = random.sample(range(LIMIT), LIMIT)
train, held_out = numbers[500:], numbers[:500]

# A tokenizer for the task.
directory = Path(tempfile.mkdtemp(prefix="numbers-"))
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(spell(n) for n in train for spell in LANGUAGES.values()),
    model_prefix=directory / "sentencepiece.bpe",
    model_type="bpe",
    vocab_size=160,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    minloglevel=2,
)
tokenizer = NllbTokenizer(directory / "sentencepiece.bpe.model", additional_special_tokens=list(LANGUAGES))
pad, eos, code = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.lang_code_to_id

# A model: every second layer sends each token to two of eight experts.
model = NllbMoeForConditionalGeneration(
    NllbMoeConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=8,
        expert_capacity=None,  # in training: twice an even share of the batch
        router_aux_loss_coef=0.01,
        output_router_logits=True,  # which adds the load-balancing loss
        dropout=0.0,
        attention_dropout=0.0,
        moe_token_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        decoder_start_token_id=eos,
    )
)


def ids(number: int, language: str) -> list[int]:
    """[language] text [eos], of a source and of a target."""
    return [code[language], *tokenizer(LANGUAGES[language](number), add_special_tokens=False).input_ids, eos]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
model.train()
for step in range(1, STEPS + 1):
    pairs = [(random.choice(train), *random.sample(list(LANGUAGES), 2)) for _ in range(BATCH)]
    source = padded([ids(n, a) for n, a, _ in pairs], pad)
    labels = padded([ids(n, b) for n, _, b in pairs], -100)
    loss = model(input_ids=source, attention_mask=(source != pad).long(), labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

model.eval()
source = padded([ids(n, "eng_Latn") for n in held_out], pad)
out = model.generate(
    input_ids=source,
    attention_mask=(source != pad).long(),
    forced_bos_token_id=code["deu_Latn"],
    max_new_tokens=32,
)
translations = tokenizer.batch_decode(out, skip_special_tokens=True)
right = sum(text == LANGUAGES["deu_Latn"](n) for text, n in zip(translations, held_out, strict=True))
print(f"{right} of {len(held_out)} numbers it has never seen are right; for instance:")
print(f"  {LANGUAGES['eng_Latn'](held_out[0])} -> {translations[0]}")
model.save_pretrained(directory)
tokenizer.save_pretrained(directory)
print(f"saved to {directory}; try: moekernels translate --model {directory} --src-lang eng_Latn --tgt-lang fra_Latn")
