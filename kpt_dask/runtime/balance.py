"""Work cut into pieces and shared out, so that all workers end at about the same time."""

from collections.abc import Callable, Sequence

from atlas_store.arrays.boxes import Box


def cut(
    box: Box,
    unit: tuple[int, int, int],
    pieces: int,
    cost: Callable[[Box], float],
    fits: Callable[[Box], bool],
) -> list[Box]:
    """Cut a box at multiples of a unit, always the most costly piece, into halves of like cost.

    Parameters
    ----------
    unit : (int, int, int)
        A piece is never cut but at a multiple of this.
    pieces : int
        Least number of pieces, if the boxes can be split so often.
    cost : callable
        Function that estimates the cost of a piece.
    fits : callable
        A piece that does not is cut, if it can be.

    Returns
    -------
    list of Box
        The most costly first.
    """
    whole = [(cost(box), box)]
    done: list[tuple[float, Box]] = []
    while whole:
        enough = len(whole) + len(done) >= pieces
        wanted = [one for one in whole if not fits(one[1])] if enough else whole
        if not wanted:
            break
        largest = max(wanted, key=lambda one: one[0])
        whole.remove(largest)
        halves = _halves(largest[1], unit, cost)
        if halves:
            whole += halves
        else:
            done.append(largest)
    return [piece for _, piece in sorted(whole + done, key=lambda one: one[0], reverse=True)]


def _halves(
    box: Box, unit: tuple[int, int, int], cost: Callable[[Box], float]
) -> list[tuple[float, Box]]:
    """Cut a box once, so that the costlier half costs least; nothing if it cannot be cut."""
    best: list[tuple[float, Box]] = []
    for axis, ((a, b), u) in enumerate(zip(box, unit, strict=True)):
        for at in range((a // u + 1) * u, b, u):
            low, high = list(box), list(box)
            low[axis], high[axis] = (a, at), (at, b)
            halves = [(cost(h), h) for h in ((low[0], low[1], low[2]), (high[0], high[1], high[2]))]
            if not best or max(c for c, _ in halves) < max(c for c, _ in best):
                best = halves
    return best


def distribute(pieces: Sequence[Box], bins: int, cost: Callable[[Box], float]) -> list[list[Box]]:
    """Distribute pieces to bins of like cost, most of those in a bin one after the other.

    Returns
    -------
    list of list of Box
        Contents of at most `bins` bins, the costliest first; the pieces of each in their order.
    """
    costs = [cost(piece) for piece in pieces]
    total, behind = sum(costs) or 1.0, 0.0
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i, one in enumerate(costs):
        # Into the bin in which the middle of its cost falls.
        filled[min(int(bins * (behind + one / 2) / total), bins - 1)].append(i)
        behind += one

    def cost_of(one_bin: list[int]) -> float:
        return sum(costs[i] for i in one_bin)

    while True:
        filled.sort(key=cost_of, reverse=True)
        last = filled[-1]
        for one_bin in filled:
            excess = cost_of(one_bin) - cost_of(last)
            movable = [i for i in one_bin if 0 < costs[i] < excess]
            if movable:
                # The piece that leaves the two most alike.
                moved = min(movable, key=lambda i: abs(excess - 2 * costs[i]))
                one_bin.remove(moved)
                last.append(moved)
                break
        else:
            return [[pieces[i] for i in sorted(one_bin)] for one_bin in filled if one_bin]
