"""What a request for forgetting ended in."""

from dataclasses import dataclass

from .damage import Forecast
from .loop import Step
from .posterior import Posterior


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting did.

    Attributes:
        posterior: q, the posterior of the unlearned model; its means are in the model. Its metadata says what has been
            forgotten, this request last.
        history: one `distruction.Step` per step: loss, KL(q || prior), forget accuracy of the samples. Empty where
            nothing had to be done.
        seconds: wall time of the unlearning alone, of this process.
        kl: KL(q || p) in nats, of all requests together.
        request: what was taken to be asked: ``class``, ``records`` or, of a language model, ``texts``.
        level: what the probability should be at most; ``None`` where ``kl_weight`` was given.
        probability: mean probability of the forgotten classes (of records: of their own labels) at the means.
        reached: whether that is at most the level; ``None`` without one.
        advice: what to do where it is not reached, or where nothing was done to records whose labels may be wrong.
        forecast: what it cost the retained classes, by the rehearsals of p; ``None`` without (`distruction.rehearse`),
            and for records.
        advantage: with ``target="unseen"``, and of records where p knows unseen data, an attacker's by the log-odds
            (`distruction.targets.Advantage`), which ``level`` then bounds in place of the probability; nothing is done
            where it is within chance.
        cosine: with ``depth="features"``, the mean cosine similarity of the forget set's penultimate features.
    """

    posterior: Posterior
    history: list[Step]
    seconds: float
    kl: float
    request: str
    level: float | None
    probability: float | None
    reached: bool | None
    advice: str = ""
    forecast: Forecast | None = None
    cosine: float | None = None
    advantage: float | None = None

    @property
    def outcome(self) -> str:
        """In a sentence, what became of the request."""
        if self.reached is None:
            return "lambda was given, and no level was to be reached"
        if not self.reached:
            return f"the level {self.level:.3g} is not reached: {self.advice}"
        if not self.history:
            than = "ones that it has not seen" if self.advantage is not None else f"the level {self.level:.3g} allows"
            done = f"nothing had to be done: the model knows these records no better than {than}, and stays as it was"
            return f"{done}; {self.advice}" if self.advice else done
        return f"the level {self.level:.3g} is reached"
