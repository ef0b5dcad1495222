#!/usr/bin/env bash
# transformers 5.24.0: with reentrant gradient checkpointing the load-balancing loss of a sparse model has no gradient. The loss
# has the same value as without checkpointing and is added to the total, but the routers' logits are picked up by hooks inside
# the checkpointed layers, where no graph is recorded. Nothing is said, and balancing is off. In 4.56.2 the logits are outputs of
# the layers, and the gradient is there. With use_reentrant=False it is there in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys
import warnings

import torch
import transformers

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
config = transformers.OlmoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
    num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, output_router_logits=True,
    router_aux_loss_coef=1.0,
)
ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
losses, gradients = {}, {}
for way in (None, False, True):
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config).train()
    if way is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way})
        model.enable_input_require_grads()
    out = model(ids, labels=ids)
    out.loss.backward()
    losses[way] = float(out.loss.detach())
    gradients[way] = model.model.layers[0].mlp.gate.weight.grad
    print(f"use_reentrant={way}: loss {losses[way]:.4f}, of which {float(out.aux_loss.detach()):.4f} for balance; "
          f"norm of a router's gradient {float(gradients[way].norm()):.5f}")
assert losses[None] == losses[False] == losses[True]
assert torch.allclose(gradients[None], gradients[False], atol=1e-6)
remains = float(gradients[True].norm() / gradients[None].norm())
assert remains < 0.1 if sys.argv[1] == "lost" else abs(remains - 1) < 1e-4
PY
python3 -m venv "$folder/venv"
for pair in 4.56.2:there 5.24.0:lost; do
  "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==${pair%:*}"
  "$folder/venv/bin/python" "$folder/check.py" "${pair#*:}"
done
