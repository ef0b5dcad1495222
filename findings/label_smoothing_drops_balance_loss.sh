#!/usr/bin/env bash
# transformers 4.56.2 and 5.24.0: Trainer with label_smoothing_factor > 0, which is usual for translation, trains a sparse model
# without its load-balancing loss. The labels are taken away from the model, and the loss is made of the logits alone; the model
# computes no loss to which it could add its own. Nothing is said. Here the router_aux_loss_coef changes no bit of the
# weights that come out of training; without smoothing it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (16, 12), generator=generator)]


def trained(smoothing, coefficient):
    """A router's weights after four steps."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    arguments = transformers.TrainingArguments(
        sys.argv[1], max_steps=4, label_smoothing_factor=smoothing, per_device_train_batch_size=4, learning_rate=1e-2,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
    )
    model = transformers.OlmoeForCausalLM(config)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    return model.model.layers[0].mlp.gate.weight.detach()


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
same = {}
for smoothing in (0.0, 0.1):
    without, strong = trained(smoothing, 0.0), trained(smoothing, 10.0)
    same[smoothing] = torch.equal(without, strong)
    print(f"label_smoothing_factor={smoothing}: the router's weights with coefficients of 0 and 10 differ by "
          f"{float((without - strong).abs().max()):.4f}")
assert same == {0.0: False, 0.1: True}
PY
python3 -m venv "$folder/venv"
for version in 4.56.2 5.24.0; do
  "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version" accelerate==1.15.0
  "$folder/venv/bin/python" "$folder/check.py" "$folder/run"
done
