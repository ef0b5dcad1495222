#!/usr/bin/env bash
# transformers 4.56.2: apply_chat_template(return_assistant_tokens_mask=True), which says what a chat model is trained on,
#   - is all zeros where truncation on the left cut into the first answer, though the last one is there in full;
#   - counts only the first token of a last character that takes several (an emoji in byte-level BPE): the model never
#     learns to finish it.
# 5.24.0 marks what it should in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, truncation_side="left")
template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def learnt(*contents, **options):
    """The text of the tokens that the mask marks; questions and answers take turns."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    got = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, mask = got["input_ids"], got["assistant_masks"]
    return tokenizer.decode(ids), [i for i, bit in zip(ids, mask) if bit]


print("transformers", transformers.__version__)
whole, marked = learnt("one?", "yes", "two?", "no")
assert tokenizer.decode(marked) == "yesno"
text, marked = learnt("one?", "yes", "two?", "no", truncation=True, max_length=7)
print(f"the last 7 of {len(whole)} tokens, {text!r}: marked {tokenizer.decode(marked)!r}, where 'sno' is the assistant's")
assert text == "stwo?no" and tokenizer.decode(marked) == {"wrong": "", "right": "sno"}[sys.argv[1]]
text, marked = learnt("one?", "yes \U0001f680")
print(f"{text!r}: {len(marked)} tokens marked of the answer's {len('yes '.encode()) + 4}, which are {tokenizer.decode(marked)!r}")
assert len(marked) == len("yes ".encode()) + {"wrong": 1, "right": 4}[sys.argv[1]]
PY
python3 -m venv "$folder/venv"
for pair in 4.56.2:wrong 5.24.0:right; do
  "$folder/venv/bin/pip" install --quiet "transformers==${pair%:*}" jinja2==3.1.6
  "$folder/venv/bin/python" "$folder/check.py" "${pair#*:}"
done
