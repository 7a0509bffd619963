"""Best-fit-decreasing bin packing (Johnson 1973): at most 11/9 of the fewest possible bins, in practice within 1 %."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity` in all; an item longer than that is a bin by itself.

    Longest first, each into the fullest bin that still holds it; equal lengths in the order given.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> bins
    rooms = 0  # bit r is set when some bin has room r: the fullest fitting bin is one shift and one lowest bit away
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, target = max(capacity, length), len(bins)
            bins.append([])
        bins[target].append(index)
        left = room - length
        if left:
            by_room[left].append(target)
            rooms |= 1 << left
    return bins
