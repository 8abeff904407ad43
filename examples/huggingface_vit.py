"""Forget a class of a Hugging Face ViT, whose images are in folders named as its labels, on a GPU or the CPU.

While the training data is there:

    python examples/huggingface_vit.py prepare --model my-vit --images photos/train --posterior posterior.safetensors

Later, with images of what is to be forgotten alone (to_forget/LABEL/*), to a new model for ``from_pretrained``:

    python examples/huggingface_vit.py forget --model my-vit --images to_forget --posterior posterior.safetensors \
        --out my-vit-forgotten
    python examples/huggingface_vit.py evaluate --model my-vit-forgotten --images photos/val --forgotten dog

``--model`` is a folder that ``save_pretrained`` wrote, or a name on the hub. Needs ``pip install transformers``.
"""

from functools import partial

from class_folders import command_line, device_of_rank, evaluate, forget, images, prepare
from PIL.Image import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

import distruction


def pixels(processor: BaseImageProcessor, image: Image) -> Tensor:
    """An image as the model takes it, (channels, height, width)."""
    return processor(image, return_tensors="pt")["pixel_values"][0]


def main() -> None:
    """Prepare, forget or evaluate."""
    parser, commands = command_line(__doc__, "prepare", "forget", "evaluate")
    for command in commands.values():
        command.add_argument("--model", required=True, help="folder of save_pretrained, or a name on the hub")
        command.add_argument("--images", required=True, help="folder with a folder of images for each label")
    args = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(args.model).to(device_of_rank())
    processor = AutoImageProcessor.from_pretrained(args.model)
    data = images(args.images, model.config.label2id, partial(pixels, processor))
    if args.command == "prepare":
        prepare(model, data, args).save(args.posterior)
    elif args.command == "forget":
        posterior = distruction.Posterior.load(args.posterior, model=model)
        forget(model, posterior, data, args)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    else:
        evaluate(model, data, args)


if __name__ == "__main__":
    main()
