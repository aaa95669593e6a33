"""What a calibrated profile says of copies and of the CPU's threads, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from sim.spec.profile import TO_DEVICE, Point, Profile, Transfers


def tables(profile: Profile) -> Iterator[Table]:
    """Copies by size and experts on the CPU by threads, as far as the profile has them."""
    if profile.transfers:
        yield _copies(profile)
    if profile.cpu_by_threads:
        yield _threads(profile)


def _copies(profile: Profile) -> Table:
    """A row a size, a column a direction and kind of memory: alone, and beside GPU work."""
    table = Table("bytes", title="copies, median GB/s, alone / beside GPU work", title_justify="left")
    alone = [one for one in profile.transfers if not one.beside_gpu]
    beside = {(one.direction, one.memory): one for one in profile.transfers if one.beside_gpu}
    for one in alone:
        way = "to the device" if one.direction == TO_DEVICE else "to the host"
        table.add_column(f"{way}\n{one.memory}", justify="right")
    pairs = [(one, beside.get((one.direction, one.memory))) for one in alone]
    for place, point in enumerate(alone[0].points):
        mark = ", an expert" if point.size == profile.model.expert_bytes else ""
        table.add_row(f"{shown_bytes(point.size)}{mark}", *(_pair(place, *pair) for pair in pairs))
    return table


def _threads(profile: Profile) -> Table:
    """A row a number of threads, a column a number of tokens; what the calibrated experts had is marked."""
    table = Table("threads", title="an expert on the CPU, ms (median)", title_justify="left")
    for point in profile.cpu_by_threads[0].points:
        table.add_column(f"{point.size} token{'s' if point.size > 1 else ''}", justify="right")
    for one in profile.cpu_by_threads:
        mark = ", as calibrated" if one.threads == profile.cpu_threads else ""
        table.add_row(f"{one.threads}{mark}", *(f"{point.median_s * 1e3:.3g}" for point in one.points))
    return table


def _pair(place: int, alone: Transfers, beside: Transfers | None) -> str:
    return " / ".join(_gb_per_s(one.points[place]) for one in (alone, beside) if one is not None)


def _gb_per_s(point: Point) -> str:
    return f"{point.size / point.median_s / 1e9:.3g}"


def shown_bytes(size_bytes: int) -> str:
    """A number of bytes to be read: in whole MiB or KiB, where it is that, and else in MB."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes / 1e6:.3g} MB"
