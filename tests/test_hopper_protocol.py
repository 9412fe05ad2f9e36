"""The protocol of attention's kernels for Hopper, as a model of which every interleaving is tried.

The simulator lacks the products of these kernels, so nothing else without a GPU sees their waiting.
Three warpgroups are here three threads (of a barrier that a warpgroup joins, its warps are alike):
the `Copier` of csrc/cuda/attention_hopper_copier.cuh and the two `Worker`s of
attention_hopper_worker.cuh, with what they wait for, arrive at, read and write. The model is
written after them by hand: change both together.
"""

import pytest

TURNS = 2  # arrivals that end a phase of a turn's barrier: a warpgroup that waits, one that goes on


def copier(works, stages):
    """(operation, arguments) for each step; a tile is known by its number over all works."""
    for tile in range(sum(works)):
        stage, phase = tile % stages, tile // stages % 2
        yield "wait", ("empty", stage), phase ^ 1
        yield "write", stage, tile
        yield "arrive", ("full", stage), None


def worker(group, works, stages, turns_across_works=True):
    """As `Worker::run`, and with the turns of each work for themselves as it was first."""

    def take(tile):
        return "wait", ("full", tile % stages), tile // stages % 2

    def done(tile):  # its last products have been waited for
        yield "read", tile % stages, tile
        yield "arrive", ("empty", tile % stages), None

    tile = 0
    if turns_across_works and group == 1:
        yield "arrive", ("turn", 0), None
    for tiles in works:
        if not turns_across_works and group == 1 and tiles > 1:
            yield "arrive", ("turn", 0), None
        if tiles:
            yield take(tile)
        for _ in range(tiles - 1):
            yield "sync", ("turn", group), None
            yield take(tile + 1)
            yield "arrive", ("turn", 1 - group), None
            yield from done(tile)
            tile += 1
        if not turns_across_works and group == 0 and tiles > 1:
            yield "sync", ("turn", 0), None
        if tiles:
            yield from done(tile)
            tile += 1
    if turns_across_works and group == 0:
        yield "sync", ("turn", 0), None


def explore(programs, stages):
    """Every state that can be reached; fails where nobody can go on before all are through, where a
    tile is overwritten that is still read, and where a barrier is left with an arrival."""
    names = [(kind, i) for kind in ("full", "empty") for i in range(stages)]
    names += [("turn", 0), ("turn", 1)]
    needed = {name: {"full": 1, "empty": 2, "turn": TURNS}[name[0]] for name in names}
    index = {name: i for i, name in enumerate(names)}
    # Where each thread is, whether it has arrived where it waits; arrivals and phases; the tiles.
    start = ((0,) * 3, (False,) * 3, ((0, 0),) * len(names), (None,) * stages)
    seen, todo = {start}, [start]
    while todo:
        places, waiting, barriers, tiles = todo.pop()
        moved = False
        for thread, program in enumerate(programs):
            if places[thread] == len(program) or waiting[thread]:
                continue
            operation, where, what = program[places[thread]]
            next_places, next_waiting = [*places], [*waiting]
            next_barriers, next_tiles = [*barriers], [*tiles]
            if operation == "wait" and barriers[index[where]][1] % 2 == what:
                continue  # the phase of this parity has not ended
            if operation == "write":
                next_tiles[where] = what
            if operation == "read":
                assert tiles[where] == what, "a tile was overwritten"
            if operation in ("arrive", "sync"):
                arrived, phase = barriers[index[where]]
                next_waiting[thread] = operation == "sync"
                if arrived + 1 < needed[where]:
                    next_barriers[index[where]] = arrived + 1, phase
                else:
                    next_barriers[index[where]] = 0, phase + 1
                    for i, other in enumerate(programs):  # who waits here goes on
                        if next_waiting[i] and other[places[i]][1] == where:
                            next_waiting[i] = False
                            next_places[i] += i != thread
            if not next_waiting[thread]:
                next_places[thread] += 1
            moved = True
            state = tuple(map(tuple, (next_places, next_waiting, next_barriers, next_tiles)))
            if state not in seen:
                seen.add(state)
                todo.append(state)
        if not moved:
            assert [*places] == [*map(len, programs)], "nobody can go on"
            assert all(arrived == 0 for arrived, _ in barriers), "an arrival is left"
    return len(seen)


WORKS = [(1,), (2,), (5,), (3, 2), (1, 3, 1, 2), (0, 2, 0), (2, 2, 2), (7, 1, 4), (9, 8)]


@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("works", WORKS, ids=str)
def test_nobody_waits_for_ever_and_no_tile_is_lost(works, stages):
    programs = [[*copier(works, stages)], *([*worker(i, works, stages)] for i in (0, 1))]
    assert explore(programs, stages) > sum(map(len, programs)) / 3


def test_turns_of_each_work_for_itself_stop():
    """The model sees what was wrong with them: one warpgroup's arrivals ended a phase alone."""
    programs = [[*copier((3, 2), 3)], *([*worker(i, (3, 2), 3, False)] for i in (0, 1))]
    with pytest.raises(AssertionError, match="nobody can go on"):
        explore(programs, 3)


def test_a_stage_that_is_given_back_too_early_is_seen():
    programs = [[*copier((4,), 3)], *([*worker(i, (4,), 3)] for i in (0, 1))]
    for program in programs[1:]:
        read = next(i for i, step in enumerate(program) if step[0] == "read")
        program[read], program[read + 1] = program[read + 1], program[read]
    with pytest.raises(AssertionError, match="a tile was overwritten"):
        explore(programs, 3)
