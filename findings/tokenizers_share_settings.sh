#!/usr/bin/env bash
# tokenizers 0.22.2 and 0.23.3: truncation and padding are settings of a Tokenizer, and encode_batch lets other threads run.
# Two threads that each set what they need and then encode, as a server does for two requests, get
#   0.22.2: "RuntimeError: Already borrowed" from the setters, while the other thread encodes;
#   0.23.3: no error, and rows truncated or padded as the other thread asked.
# A copy per thread is cheap: Tokenizer(other.model) shares the vocabulary.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import threading
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

sys.setswitchinterval(1e-6)
words = [f"w{i}" for i in range(1000)]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
text = [" ".join(words[:200])] * 8


def short(own):
    own.no_padding()
    own.enable_truncation(7)
    return {len(row.ids) for row in own.encode_batch(text)} == {7}


def long(own):
    own.no_truncation()
    own.enable_padding(length=300)
    return {len(row.ids) for row in own.encode_batch(text)} == {300}


def together(tokenizers_of_threads):
    """How often a call gave rows of another length than it asked for, and how often it raised."""
    wrong, raised = [], []

    def run(call, own):
        for _ in range(400):
            try:
                if not call(own):
                    wrong.append(call.__name__)
            except RuntimeError as error:
                raised.append(str(error))

    threads = [threading.Thread(target=run, args=pair) for pair in zip((short, long), tokenizers_of_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong), len(raised), raised[:1]


wrong, raised, message = together((tokenizer, tokenizer))
copy = Tokenizer(tokenizer.model)
copy.pre_tokenizer = tokenizer.pre_tokenizer
apart = together((tokenizer, copy))
print(f"tokenizers {tokenizers.__version__}: of 800 calls {wrong} gave wrong rows, {raised} raised {message}; with a copy per thread {apart}")
assert apart[:2] == (0, 0)
assert raised > 0 and "Already borrowed" in message[0] if sys.argv[1] == "raises" else wrong > 0 and raised == 0
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.22.2
"$folder/venv/bin/python" "$folder/check.py" raises
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" "$folder/check.py" silent
