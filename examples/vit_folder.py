"""Forget a class of a trained timm ViT whose images are in class folders, on a GPU or the CPU.

While the training data is there:

    python examples/vit_folder.py prepare --model vit_base_patch16_224 --weights vit.safetensors --classes classes.txt \
        --images photos/train --posterior posterior.safetensors

Later, with images of what is to be forgotten alone (to_forget/CLASS/*), and then to see what it did:

    python examples/vit_folder.py forget --model vit_base_patch16_224 --weights vit.safetensors --classes classes.txt \
        --images to_forget --posterior posterior.safetensors --out forgotten.safetensors
    python examples/vit_folder.py evaluate --model vit_base_patch16_224 --weights forgotten.safetensors \
        --classes classes.txt --images photos/val --forgotten dog

On several GPUs, for a model too large for one, each of them holds a part of every tensor:

    torchrun --nproc-per-node 2 examples/vit_folder.py prepare --shard --model vit_huge_patch14_224 \
        --weights vit.safetensors --classes classes.txt --images photos/train --posterior posterior.safetensors
    torchrun --nproc-per-node 2 examples/vit_folder.py forget --shard --model vit_huge_patch14_224 \
        --weights vit.safetensors --classes classes.txt --images to_forget --posterior posterior.safetensors \
        --out forgotten.safetensors

``classes.txt`` names the classes in the order of the model's head, one a line.
"""

from pathlib import Path

import timm
from class_folders import command_line, device_of_rank, evaluate, forget, images, prepare, save
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.distributed.fsdp import fully_shard

import distruction
from distruction import distributed


def shard(model: nn.Module) -> nn.Module:
    """Spread the tensors over the ranks of torchrun, block by block, each part on its rank's device."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def main() -> None:
    """Prepare, forget or evaluate."""
    parser, commands = command_line(__doc__, "prepare", "forget", "evaluate")
    for command in commands.values():
        command.add_argument("--model", required=True, help="timm's name")
        command.add_argument("--weights", required=True, help=".safetensors or .pth of the model")
        command.add_argument("--classes", type=Path, required=True, help="names, one a line, in the order of the head")
        command.add_argument("--images", required=True, help="folder with a folder of images for each class")
        command.add_argument("--shard", action="store_true", help="under torchrun: spread each tensor over the ranks")
    args = parser.parse_args()
    distributed.start()
    device = device_of_rank()
    labels = {name: label for label, name in enumerate(args.classes.read_text().splitlines())}
    model = timm.create_model(args.model, num_classes=len(labels), checkpoint_path=args.weights)
    data = images(args.images, labels, create_transform(**resolve_data_config(model=model)))
    model = shard(model) if args.shard else model.to(device)
    if args.command == "prepare":
        prepare(model, data, args).save(args.posterior)
    elif args.command == "forget":
        posterior = distruction.Posterior.load(args.posterior, model=model)
        forget(model, posterior, data, args)
        save(model, args.out)
    else:
        evaluate(model, data, args)


if __name__ == "__main__":
    main()
