#!/usr/bin/env bash
# transformers 4.56.2: generate(position_ids=...) gives every new token the last position of the prompt again, and says
# nothing. 5.24.0 counts on. A call that passes the positions of a plain prompt therefore writes another text than one that
# leaves them out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import json
import sys
import torch
import transformers

config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
)
torch.manual_seed(0)
model = transformers.OlmoeForCausalLM(config).eval()
seen = []


def look(module, arguments, keywords):
    positions = keywords["position_ids"] if "position_ids" in keywords else arguments[1]
    seen.append(positions.flatten().tolist())


model.model.rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
ids = torch.tensor([[5, 6, 7]])
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
model.generate(ids, position_ids=torch.tensor([[0, 1, 2]]), **options)
print(f"transformers {transformers.__version__}: positions of the prompt and of three new tokens: {seen}")
assert seen == json.loads(sys.argv[1])
PY
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip torch==2.13.0
pip transformers==4.56.2
"$folder/venv/bin/python" "$folder/check.py" "[[0, 1, 2], [2], [2], [2]]"
pip transformers==5.24.0
"$folder/venv/bin/python" "$folder/check.py" "[[0, 1, 2], [3], [4], [5]]"
