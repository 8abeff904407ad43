"""Forget what lies in a folder: any model that the command line takes, in Python.

    python examples/any_model.py --model my-vit --images photos/train --posterior posterior.safetensors
    python examples/any_model.py --model my-vit --images to_forget --posterior posterior.safetensors \
        --out my-vit-forgotten

The first prepares, while the training data is there; the second, later, needs the images to forget alone.
"""

import argparse
from pathlib import Path

import torch

import distruction
from distruction.data.inputs import batches


def main() -> None:
    """Prepare, or forget."""
    parser = argparse.ArgumentParser()
    for name in ("model", "images", "posterior", "out"):
        parser.add_argument(f"--{name}", required=name != "out")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    model = distruction.sources.open_model(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    found = model.select(args.images)
    print(found)
    loader = batches(found.read(model.inputs), batch_size=64, shuffle=True, workers=4)
    if args.out is None:
        distruction.prepare(model.network, loader, steps=args.steps).save(args.posterior)
    else:
        posterior = distruction.Posterior.load(args.posterior, model=model.network)
        distruction.forget(model.network, posterior, loader, steps=args.steps)
        model.write(model.network, Path(args.out), model.facts())


if __name__ == "__main__":
    main()
