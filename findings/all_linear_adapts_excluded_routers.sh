#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: LoraConfig(target_modules="all-linear") on OLMoE adapts the routers too, whose weight is a
# parameter and no Linear, and exclude_modules does not keep them out, neither as a list nor as an expression. The same
# exclude_modules leaves out a Linear (q_proj). There is no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import peft
import torch
import transformers

print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
    num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
for excluded in (None, ["gate", "q_proj"], r".*\.(gate|q_proj)"):
    model = transformers.OlmoeForCausalLM(config)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
    )
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    print(f"exclude_modules={excluded!r}: adapted {', '.join(sorted(adapted))}")
    assert "gate" in adapted and ("q_proj" in adapted) == (excluded is None)
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" "$folder/check.py"
