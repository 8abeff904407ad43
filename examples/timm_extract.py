"""The posterior that timm's train.py learnt with BGD (timm_train_bgd.py), out of its last checkpoint.

    python examples/timm_extract.py output/train/my-bgd posterior.safetensors means.safetensors

writes the posterior and the weights, which are its means. The optimizer's state goes by the order of the parameters.
"""

import argparse
from pathlib import Path

import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm_train_bgd import register

import distruction
from distruction.sources import SERVING, open_model, write_state


def main(run: str, posterior: str, weights: str) -> None:
    """Write both files."""
    register()
    args = yaml.safe_load(Path(run, "args.yaml").read_text())
    model = timm.create_model(args["model"], num_classes=args["num_classes"], **args["model_kwargs"])
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(argparse.Namespace(**args)), **args["opt_kwargs"])
    with torch.serialization.safe_globals([argparse.Namespace]):
        optimizer.load_state_dict(torch.load(Path(run, "last.pth.tar"), weights_only=True)["optimizer"])
    optimizer.eval()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    means, stds = ({name: s[key] for name, s in state.items()} for key in ("mean", "std"))
    facts = open_model(run).facts()
    distruction.Posterior(means, stds, {SERVING: facts}).save(posterior, compress=True)
    write_state(model, Path(weights), facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("run", "posterior", "weights"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
