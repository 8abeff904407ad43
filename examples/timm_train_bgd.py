"""Run timm's own train.py, unedited, with BGD among its optimizers: fine-tuning then ends with a posterior.

    python examples/timm_train_bgd.py train.py --data-dir photos --model vit_large_patch16_224 --pretrained \
        --num-classes 3 --output output/train --experiment my-bgd --epochs 20 \
        --opt bgd --lr 1 --weight-decay 0 --opt-kwargs data_per_step=50000 std_init=0.02

Under ``torchrun --nproc-per-node 8`` it trains with DDP, as train.py does. ``data_per_step`` is how many data points
one step's mean loss stands for; with ``learn_mean=False`` the weights of ``--initial-checkpoint`` stay, and the stds
alone are learnt. train.py validates a sample of the posterior, and saves it as the model; the means and stds are in the
optimizer's state in its last checkpoint, from which ``examples/timm_extract.py`` takes them.
"""

import runpy
import sys
from pathlib import Path

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

import distruction


class TrainScriptBGD(distruction.BGD):
    """BGD for a script that never calls ``train()``: it draws the first sample at the first ``zero_grad``.

    By then DistributedDataParallel has given every rank the same weights, which become the means.
    """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; the parameters hold a sample from here on."""
        super().zero_grad(set_to_none)
        if not self.param_groups[0]["training"]:
            self.train()


def register() -> None:
    """Give timm the optimizer ``bgd``, for `create_optimizer_v2` and train.py's ``--opt``."""
    summary = "Bayesian Gradient Descent (arXiv 1803.10123)"
    default_registry.register(OptimInfo("bgd", TrainScriptBGD, summary, has_eps=False))


if __name__ == "__main__":
    register()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
