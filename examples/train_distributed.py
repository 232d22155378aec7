"""Train a model of mvmodels on scikit-learn's digits with several processes, and go on after an interruption.

    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint digits.pt

The same script runs on many machines: started on each with ``torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d
--rdzv-endpoint first-machine:29400 --max-restarts 3``, and with a checkpoint that all of them see. The batch is the
whole job's: each process takes its share of it. A checkpoint is written every --save-every steps by the first
process, under another name first, so that it is whole at any moment; a run that finds one goes on from it, through
the same batches, to the same weights. The model is wrapped by DistributedDataParallel, or with --fsdp sharded by
fully_shard (FSDP2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F

import mvmodels
from mvkernels.commands.command import run
from mvmodels import checkpoint
from mvmodels.data import Digits


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobile_former_26m", choices=mvmodels.list_models())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=32, help="side of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters instead of copying them")
    parser.add_argument("--checkpoint", type=Path, help="file to write, and to go on from")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--losses", type=Path, help="file of the losses, a JSON document a line")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.save_every < 1 or options.size < 1:
        parser.error("--steps, --save-every and --size want at least 1")
    return options


def batch_of(step: int, count: int, options: argparse.Namespace) -> Tensor:
    """The pictures of a step: a function of the step alone, so that nothing of it needs saving."""
    per_epoch = count // options.batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed + epoch))
    return order[place * options.batch : (place + 1) * options.batch]


def wrap(model: nn.Module, options: argparse.Namespace, device: torch.device) -> nn.Module:
    if options.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All processes call it: a sharded model is gathered by all. The first one writes."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        checkpoint.save({"step": step, "model": weights, "optimizer": state}, path)


def resume(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with."""
    if path is None or not path.exists():
        return 0
    saved = checkpoint.read(path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True, cpu_offload=True),
    )
    return int(saved["step"])


def train(options: argparse.Namespace, device: torch.device) -> float:
    """The loss of the last step, the mean over all processes. Needs a process group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = Digits(held_out=False, size=options.size)
    pictures, labels = torch.stack([data[i][0] for i in range(len(data))]), torch.tensor(data.labels)
    torch.manual_seed(options.seed)
    model = mvmodels.create_model(options.model, num_classes=10, in_chans=1).to(device)
    parallel = wrap(model, options, device)
    optimizer = torch.optim.AdamW(parallel.parameters(), options.lr, weight_decay=0.05)
    first = resume(options.checkpoint, parallel, optimizer)
    if rank == 0 and first:
        print(f"going on from step {first}", flush=True)
    loss = torch.zeros(())
    parallel.train()
    for step in range(first, options.steps):
        mine = batch_of(step, len(labels), options).chunk(world)[rank]
        loss = F.cross_entropy(parallel(pictures[mine].to(device)), labels[mine].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        loss = loss / world
        if rank == 0 and options.losses is not None:
            with options.losses.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": float(loss)}) + "\n")
        if options.checkpoint is not None and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            save(options.checkpoint, step + 1, parallel, optimizer)
    return float(loss)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if "RANK" not in os.environ:
        print("train_distributed: start it with torchrun", file=sys.stderr)
        return 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        if options.batch < 2 * dist.get_world_size() or options.batch % dist.get_world_size():
            print("train_distributed: --batch is no multiple of the processes, two pictures each", file=sys.stderr)
            return 2
        loss = train(options, device)
        if dist.get_rank() == 0:
            print(f"step {options.steps}: loss {loss:.6f} on {dist.get_world_size()} processes")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run("train_distributed", main))
