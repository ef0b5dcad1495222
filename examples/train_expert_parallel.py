"""Train a tiny NLLB-MoE to translate written-out numbers, its experts divided among processes. Copy it and change it.

torchrun --nproc-per-node 2 examples/train_expert_parallel.py            # experts on two processes
torchrun --nproc-per-node 4 examples/train_expert_parallel.py --fsdp 2   # beside FSDP2: 2 x 2
python examples/train_expert_parallel.py                                 # one process

Every --save-every steps a checkpoint is written. Started again, with any number of processes, it goes on from the last.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import NllbMoeLearner
from moekernels.distributed import clip_grad_norm_, expert_parallel, parameter_groups, reduce_gradients

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=128, help="pairs in a step, of all processes together")
parser.add_argument("--fsdp", type=int, default=1, help="processes along the other dimension of the mesh")
parser.add_argument("--directory", type=Path, default=Path("numbers-checkpoint"))
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

# One process is a group too.
alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
dist.init_process_group("nccl" if device == "cuda" else "gloo", **alone)
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device, (args.fsdp, size // args.fsdp), mesh_dim_names=("fsdp", "ep"))
everyone = init_device_mesh(device, (size,))

torch.manual_seed(0)
random.seed(0)
corpus = Corpus(seed=0)
learner = NllbMoeLearner.create(corpus)
model = learner.model.to(device).train()
expert_parallel(model, mesh["ep"])
if args.fsdp > 1:
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        if layer.is_sparse:
            fully_shard(layer.ffn.experts, mesh=mesh["fsdp"])
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3, betas=(0.9, 0.98))

done = 0
# A checkpoint is whole once it has its metadata, which is written last.
if saves := sorted(path.parent for path in args.directory.glob("step-*/.metadata")):
    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states, "done": 0}
    dcp.load(saved, checkpoint_id=saves[-1])
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    done = saved["done"]
    if rank == 0:
        print(f"going on after step {done}", flush=True)

for step, pairs in enumerate(corpus.batches(args.batch, seed=0), start=1):
    if step <= done:
        continue  # the same pairs as if it had never stopped
    if step > args.steps:
        break
    # Every process pads its own rows. The loss is the mean over the labels of all, and gradients are averaged.
    batch = learner.batch(pairs[rank::size])
    labels = (batch["labels"] != -100).sum()
    dist.all_reduce(labels)
    loss = size * model(**batch, num_items_in_batch=labels).loss
    optimizer.zero_grad()
    loss.backward()
    reduce_gradients(model)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    dist.all_reduce(total := loss.detach() / size)
    if rank == 0 and step % 10 == 0:
        print(f"step {step}: loss {total.item():.4f}", flush=True)
    if step % args.save_every == 0 or step == args.steps:
        weights, states = get_state_dict(model, optimizer)
        where = args.directory / f"step-{step:06d}"
        dcp.save({"model": weights, "optimizer": states, "done": step}, checkpoint_id=where)

model.eval()
model.save_pretrained(args.directory / "model")
if rank == 0:
    learner.tokenizer.save_pretrained(args.directory / "model")
    print(f"try: moekernels translate --model {args.directory / 'model'} --src-lang eng_Latn --tgt-lang fra_Latn")
dist.barrier()
dist.destroy_process_group()
