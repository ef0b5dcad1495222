#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: a LoRA adapter that was trained with transformers 4 on the experts' Linears is converted
# to the stacks of transformers 5 when it is loaded. One of rank, alpha and targets alike comes out right. But
#   - with use_rslora=True gate and up projection count sqrt(2) times: their ranks are added up and alpha is doubled, which
#     keeps alpha / rank, not alpha / sqrt(rank);
#   - alpha_pattern for one of the projections is not applied;
#   - an adapter of gate and up projection alone does nothing at all.
# There is no error. Warnings that keys of rank_pattern "were ignored" come with all four, the right one included; the last
# one also gets a warning of missing keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
projections = ["gate_proj", "up_proj", "down_proj"]
adapters = {
    "all three projections": {"target_modules": projections},
    "use_rslora=True": {"target_modules": projections, "use_rslora": True},
    "alpha_pattern={'up_proj': 32}": {"target_modules": projections, "alpha_pattern": {"up_proj": 32}},
    "gate and up projection": {"target_modules": projections[:2]},
}
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
    num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)
ids = torch.arange(3, 27).reshape(2, 12)
print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
errors = {}
for number, (name, options) in enumerate(adapters.items()):
    folder = f"{sys.argv[2]}/{number}"
    torch.manual_seed(0)
    if sys.argv[1] == "write":
        model = transformers.OlmoeForCausalLM(config).eval()
        model.save_pretrained(folder + "/model")
        base = model(ids).logits
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder + "/adapter")
        torch.save((base.detach(), model(ids).logits.detach()), folder + "/logits.pt")
    else:
        base, adapted = torch.load(folder + "/logits.pt")
        model = transformers.OlmoeForCausalLM.from_pretrained(folder + "/model").eval()
        assert torch.allclose(model(ids).logits, base, atol=1e-4)
        model = peft.PeftModel.from_pretrained(model, folder + "/adapter").eval()
        errors[name] = float((model(ids).logits - adapted).norm().detach() / (adapted - base).norm())
        print(f"{name}: of what the adapter does to the logits {errors[name]:.0%} is wrong")
if errors:
    right, rslora, pattern, gate_and_up = errors.values()
    assert right < 1e-4 and rslora > 0.1 and pattern > 0.1 and abs(gate_and_up - 1) < 1e-4
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.56.2 peft==0.21.2 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/check.py" write "$folder"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" "$folder/check.py" read "$folder"
