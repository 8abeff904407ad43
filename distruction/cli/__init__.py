"""The command line: ``distruction train | plan | prepare | forget | evaluate | verify | demo | bench | doctor``."""

import typer

from ..terminal import Command, run
from . import bench, demo, doctor, evaluate, forget, plan, prepare, train, verify

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Machine unlearning without the retained data.

    While the training data is there: `train` (or bring your own model) and `prepare`. Later, with the forget set
    alone: `forget`. `demo` shows the whole on real data in a few minutes.""",
)

for command in (
    train.train,
    plan.plan,
    prepare.prepare,
    forget.forget,
    evaluate.evaluate,
    verify.verify,
    demo.demo,
    bench.bench,
    doctor.doctor,
):
    app.command(cls=Command)(command)


def main() -> None:
    """Run the command line: user errors end with one line and status 2, Ctrl-C with status 130."""
    run(app)
