#!/usr/bin/env bash
# transformers 4.56.2 with bitsandbytes 0.50.2: a 4-bit model saved with bnb_4bit_quant_storage=bfloat16 loads with other
# weights, and nothing is said. The packed codes lie in the file as bfloat16 numbers; from_pretrained without a dtype casts
# what is a floating-point tensor to float16, codes included. With dtype=torch.bfloat16 the weights come back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import warnings
import bitsandbytes
import torch
import transformers

warnings.simplefilter("ignore")
folder = sys.argv[1]
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=None, bos_token_id=None,
)
torch.manual_seed(0)
transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{folder}/whole")
options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}
quantization = transformers.BitsAndBytesConfig(**options)
load = transformers.OlmoeForCausalLM.from_pretrained
model = load(f"{folder}/whole", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu")
model.save_pretrained(f"{folder}/packed")


def values(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()


without, with_dtype = (values(load(f"{folder}/packed", device_map="cpu", **k)) for k in ({}, {"dtype": torch.bfloat16}))
error = (without - values(model)).norm() / values(model).norm()
same = torch.equal(with_dtype, values(model))
versions = f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
print(f"{versions}: relative error of a weight without dtype {error:.2f}; with dtype=bfloat16 the same bits: {same}")
assert error > 0.5 and same
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.56.2 bitsandbytes==0.50.2 accelerate
"$folder/venv/bin/python" "$folder/check.py" "$folder"
