#!/usr/bin/env bash
# transformers 5.24.0: Trainer.train(resume_from_checkpoint=...) of an MoE model goes on with new experts. A checkpoint is
# written with a name for each expert's matrix, from_pretrained joins them to stacks again, but the Trainer hands the file's
# names to load_state_dict, which knows none of them. All other weights are loaded, a log line speaks of unexpected keys,
# and training continues: here OLMoE, from a checkpoint of the same Trainer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments

config = OlmoeConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_experts=4, num_experts_per_tok=2, pad_token_id=0)
rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 16


def trainer(steps):
    torch.manual_seed(1)
    arguments = TrainingArguments(sys.argv[1], max_steps=steps, save_steps=2, learning_rate=0.0, use_cpu=True,
                                  per_device_train_batch_size=2, report_to=[], disable_tqdm=True)
    return Trainer(OlmoeForCausalLM(config), arguments, train_dataset=rows)


first, again = trainer(2), trainer(3)
with torch.no_grad():
    for parameter in first.model.parameters():
        parameter.add_(1.0)
first.train()
again.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
saved = first.model.state_dict()
others = {"resumed": again.model, "from_pretrained": OlmoeForCausalLM.from_pretrained(sys.argv[1] + "/checkpoint-2")}
lost = {
    way: [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]
    for way, model in others.items()
}
print(f"transformers {transformers.__version__}: weights that are not those of the checkpoint: {lost}")
assert lost["from_pretrained"] == []
assert len(lost["resumed"]) == 2 and all(".mlp.experts." in name for name in lost["resumed"])
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/check.py" "$folder/run"
