"""The command line: ``distruction``, with a module for each command."""

from ..extras import needed

with needed("cli", "the command line"):
    import typer

from ..terminal import Command, run
from . import attack, bench, demo, doctor, evaluate, forget, plan, prepare, train, verify

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
    attack.attack,
    verify.verify,
    demo.demo,
    bench.bench,
    doctor.doctor,
):
    app.command(cls=Command)(command)


def main() -> None:
    """Run the command line: user errors end with one line and status 2, Ctrl-C with status 130."""
    run(app)
