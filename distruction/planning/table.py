"""A plan in words."""

from rich.table import Table

from .estimate import Plan


def table(found: Plan) -> Table:
    """The plan's bytes, a column for each phase."""
    o = found.options
    title = (
        f"{found.model}, {found.parameters / 1e6:.1f} M parameters, batch of {o.batch_size}, K = {o.mc_samples}, "
        f"on {found.device}"
    )
    shown = Table("", *(phase.name for phase in found.phases), title=title, title_justify="left")
    rows: dict[str, list[int | None]] = {}
    for i, phase in enumerate(found.phases):
        parts = {
            **phase.resident,
            "activations and gradients of a pass": phase.passing,
            "gradients and buffers of an update": phase.updating,
            "peak": phase.peak,
            "in the CPU's memory": phase.host or None,
        }
        for what, size in parts.items():
            rows.setdefault(what, [None] * len(found.phases))[i] = size
    # A part that the first phase lacks stands after the parts of both.
    order = [*found.phases[1].resident, *(what for what in rows if what not in found.phases[1].resident)]
    for what in order:
        if any(rows[what]):
            cells = ["" if size is None else _readable(size) for size in rows[what]]
            shown.add_row(what, *cells, style="bold" if what == "peak" else None)
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def verdict(found: Plan) -> list[str]:
    """Whether it fits, and the advice, a line each."""
    if found.available is None:
        return [f"Needs {_readable(found.peak)}; what is free on {found.device} is not known here (--free GIB)."]
    needs = f"{_readable(found.peak)} of {_readable(found.available)} free on {found.device}"
    if found.fits:
        return [f"Fits: {needs}."]
    lines = [f"Does not fit: {needs}. One change after another:"]
    lines += [f"  {change}: {_readable(peak)}" for change, peak in found.advice]
    if not found.advice or found.advice[-1][1] > found.available:
        lines.append("It does not fit even so: shard the model over several devices (fully_shard).")
    return lines


def _readable(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
