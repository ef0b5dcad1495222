#!/usr/bin/env bash
# accelerate 1.15.0: load_checkpoint_and_dispatch(device_map={"": "cpu"}, or "auto") into a model with tied weights loses the
# loaded one, and says nothing. A file holds a tied weight under one of its names. Loading puts a new parameter there, and
# to tie the names again accelerate takes the one that comes first in the alphabet: the random weight of the constructor,
# where that is another name. "lm_head" stands before "model.shared", so that an M2M100 runs with random embeddings. Without a
# device_map, or with names in the other order, everything is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import accelerate
import torch
import transformers
from safetensors.torch import load_file
from torch import nn


class Tied(nn.Module):
    def __init__(self, embedding: str, head: str):
        super().__init__()
        self.add_module(embedding, nn.Embedding(8, 4))
        self.add_module(head, nn.Linear(4, 8, bias=False))
        self.get_submodule(head).weight = self.get_submodule(embedding).weight


def lost(make, folder, **options):
    """The names in the file, and what differs after loading it into another model of the same kind."""
    model = make()
    save = getattr(model, "save_pretrained", lambda folder: accelerate.Accelerator(cpu=True).save_model(model, folder))
    save(folder)
    state = accelerate.load_checkpoint_and_dispatch(make(), folder, **options).state_dict()
    wrong = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    return sorted(load_file(folder + "/model.safetensors")), wrong


config = transformers.M2M100Config(vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                                   decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)
print(f"accelerate {accelerate.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
makers = {
    "embedding, head": lambda: Tied("embedding", "head"),
    "words, head": lambda: Tied("words", "head"),
    "M2M100": lambda: transformers.M2M100ForConditionalGeneration(config),
}
found = {}
for number, (name, make) in enumerate(makers.items()):
    for options in ({}, {"device_map": {"": "cpu"}}):
        names, wrong = lost(make, f"{sys.argv[1]}/{number}", **options)
        tied = [n for n in names if n in ("embedding.weight", "head.weight", "words.weight") or "shared" in n]
        print(f"{name}, {options}: the file has {tied}; wrong after loading: {wrong}")
        found[name, bool(options)] = len(wrong)
assert [found[name, False] for name in makers] == [0, 0, 0]
assert found["embedding, head", True] == 0 and found["words, head", True] == 2 and found["M2M100", True] == 4
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/check.py" "$folder"
