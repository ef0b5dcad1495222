#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and bitsandbytes 0.50.2: the usual way to adapt a model in 4 bits, load_in_4bit and then
# prepare_model_for_kbit_training, makes a sparse model larger than it was in bfloat16. Stacks of experts are not quantised,
# and preparing casts every 16-bit parameter that is not to float32, experts included, where its documentation speaks of the
# norms and the head. Nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import warnings

import bitsandbytes
import peft
import torch
import transformers

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_experts=16,
    num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
load = transformers.OlmoeForCausalLM.from_pretrained
sizes = {"bfloat16": load(sys.argv[1], dtype=torch.bfloat16).get_memory_footprint()}
model = load(sys.argv[1], dtype=torch.bfloat16, quantization_config=quantization)
sizes["load_in_4bit"] = model.get_memory_footprint()
model = peft.prepare_model_for_kbit_training(model)
sizes["prepared"] = model.get_memory_footprint()
experts = model.model.layers[0].mlp.experts.gate_up_proj
print(f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}, peft {peft.__version__}, "
      f"torch {torch.__version__}")
print({name: f"{size / sizes['bfloat16']:.2f}" for name, size in sizes.items()}, "experts are", experts.dtype)
assert experts.dtype == torch.float32
assert sizes["load_in_4bit"] > 0.8 * sizes["bfloat16"] and sizes["prepared"] > 1.7 * sizes["bfloat16"]
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 peft==0.21.2 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
