"""A model of transformers that divides its experts among processes itself, with the kernels of moekernels. Copy it.

torchrun --nproc-per-node 2 examples/transformers_expert_parallel.py --model DIRECTORY --prompt "Bread is made of"

Needs transformers 5.24 or newer.
"""

from __future__ import annotations

import argparse
import os

import torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from moekernels.integrations.transformers import register

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--prompt", default="Bread is made of")
parser.add_argument("--max-new-tokens", type=int, default=20)
args = parser.parse_args()

register()
size = int(os.environ["WORLD_SIZE"])
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype="auto",
    experts_implementation="moekernels",
    distributed_config=DistributedConfig(tp_size=size, ep_size=size),
)
tokenizer = AutoTokenizer.from_pretrained(args.model)
inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
if os.environ["RANK"] == "0":
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
torch.distributed.destroy_process_group()  # none leaves while another still sends
