"""A ViT that fits on no GPU: each rank of torchrun holds a part of every tensor.

    torchrun --nproc-per-node 2 examples/sharded_vit.py --model vit_huge_patch14_224 --weights vit.safetensors \
        --classes classes.txt --images photos/train --posterior posterior.safetensors
    torchrun --nproc-per-node 2 examples/sharded_vit.py --model vit_huge_patch14_224 --weights vit.safetensors \
        --classes classes.txt --images to_forget --posterior posterior.safetensors --out forgotten.safetensors

Without torchrun the same runs on one device.
"""

import argparse
from pathlib import Path

from torch.distributed.fsdp import fully_shard

import distruction
from distruction.data.inputs import batches


def main() -> None:
    """Prepare, or forget."""
    parser = argparse.ArgumentParser()
    for name in ("model", "weights", "classes", "images", "posterior", "out"):
        parser.add_argument(f"--{name}", type=Path, required=name != "out")
    parser.add_argument("--method", default="gauss-newton")
    parser.add_argument("--std-init", type=float)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    distruction.distributed.start()
    names = distruction.sources.read_classes(args.classes)
    model = distruction.sources.open_model(args.model, weights=args.weights, classes=names)
    if distruction.distributed.size() > 1:
        for block in model.network.blocks:
            fully_shard(block)
        fully_shard(model.network)
    loader = batches(model.select(args.images).read(model.inputs), batch_size=64, shuffle=True)
    if args.out is None:
        std = args.std_init or "auto"
        posterior = distruction.prepare(model.network, loader, steps=args.steps, method=args.method, std_init=std)
        posterior.save(args.posterior)
    else:
        posterior = distruction.Posterior.load(args.posterior, model=model.network)
        distruction.forget(model.network, posterior, loader, steps=args.steps, kl_weight=0.1)
        model.write(model.network, args.out, model.facts())


if __name__ == "__main__":
    main()
