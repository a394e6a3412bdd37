"""Drawing a token from each of several rows of logits, after temperature, top_k, top_p and min_p.

A token's key is the bits of its distance from the row's largest logit, in temperatures: nearer tokens have lesser keys, equal
ones the same. Its mass is exp(-distance) as a whole number, so sums are exact and the same in any order: "the nearest tokens
with that much mass" has one answer, which is found bit by bit, without sorting.
"""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant

ONE = tl.constexpr(1 << 40)
"""The mass of the likeliest token."""
FAR = tl.constexpr(0x7F800000)
"""The key of what cannot be drawn."""


@triton.jit
def mass_of(key):
    """exp(-distance) in units of 1 / ONE."""
    return (tl.exp(-key.to(tl.float32, bitcast=True)) * ONE).to(tl.int64)


@triton.jit
def keys_of(x, top, temperature, at, width):
    """The keys of a row of logits."""
    distance = (top - tl.load(x + at, at < width, float("-inf")).to(tl.float32)) / temperature
    return tl.where(distance >= 0, distance, float("inf")).to(tl.int32, bitcast=True)  # inf for NaN


@triton.jit
def nearest_with(keys, count, target, steps, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least key such that all keys up to it together have more than `target`, tokens or mass; steps: 31, or 0 for no key."""
    low = tl.zeros((), tl.int32)
    lane = tl.arange(0, BLOCK)
    for step in range(steps):
        half = tl.full((), 1, tl.int32) << (30 - step)
        found = tl.zeros((BLOCK,), tl.int64)
        for at in range(0, count, BLOCK):
            key = tl.load(keys + at + lane, at + lane < count, FAR)
            is_in = (key < low + half) & (at + lane < count)
            found += tl.where(is_in, mass_of(key), 0) if BY_MASS else is_in.to(tl.int64)
        low += tl.where(tl.sum(found, 0) > target, 0, half)
    return low


@triton.jit
def mass_until(keys, count, limit, least, BLOCK: tl.constexpr):
    """The mass of all keys below `limit`, of all up to it, and of those among the latter that have at least `least` each."""
    lane = tl.arange(0, BLOCK)
    below, until, likely = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for at in range(0, count, BLOCK):
        key = tl.load(keys + at + lane, at + lane < count, FAR)
        mass = mass_of(key)
        below += tl.where(key < limit, mass, 0)
        until += tl.where(key <= limit, mass, 0)
        likely += tl.where((key <= limit) & (mass >= least), mass, 0)
    return tl.sum(below, 0), tl.sum(until, 0), tl.sum(likely, 0)


@triton.jit
def candidates(x, top, temperature, top_k, top_p, least, keys, places, width, BLOCK: tl.constexpr):
    """Put the tokens that may be drawn, and some others, into `keys` and `places`, in order: (how many, mass of all tokens).

    Of BLOCK parts of the row as many have a nearest token within some key as top_k says: no token farther away is among the
    top_k. Without a top_k, what has less than the last 1 - top_p shared by all is not needed to reach top_p.
    """
    lane = tl.arange(0, BLOCK)
    total, nearest = tl.zeros((BLOCK,), tl.int64), tl.full((BLOCK,), FAR, tl.int32)
    for at in range(0, width, BLOCK):
        key = keys_of(x, top, temperature, at + lane, width)
        total += mass_of(key)
        nearest = tl.minimum(nearest, key)
    total = tl.sum(total, 0)
    bound = tl.zeros((), tl.int32)
    for step in range(31):
        half = tl.full((), 1, tl.int32) << (30 - step)
        bound += tl.where(tl.sum((nearest < bound + half).to(tl.int32), 0) < top_k, half, 0)
    bound = tl.where(top_k > 0, bound, FAR)
    least = tl.where(top_p < 1, 0, least)  # top_p looks at what min_p then takes away
    rest = ((1 - top_p) * total.to(tl.float64) / width).to(tl.int64)
    least = tl.maximum(tl.where((top_p < 1) & (top_k == 0), rest, least), 1)
    count = tl.zeros((), tl.int32)
    for at in range(0, width, BLOCK):
        key = keys_of(x, top, temperature, at + lane, width)
        is_in = (key <= bound) & (mass_of(key) >= least)
        place = count + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(keys + place, key, is_in)
        tl.store(places + place, at + lane, is_in)
        count += tl.sum(is_in.to(tl.int32), 0)
    tl.debug_barrier()  # all threads read what each has written
    return count, total


@triton.jit
def draw(x, highest, settings, keys, places, tokens, width, num_draws, x_stride, BLOCK: tl.constexpr):
    """tokens[row] of x [rows, width] for each column of settings [6, num_draws] (row, temperature, top_k, top_p, min_p, uniform).

    highest [rows]: the largest number of each row. keys and places [num_draws, width]: room. A number that is uniform in [0, 1)
    picks from the running sum of the masses: of tokens in descending order under a top_p, else in that of the vocabulary.
    """
    settings += tl.program_id(0)
    row = tl.load(settings).to(tl.int64)
    temperature, top_k = tl.load(settings + num_draws).to(tl.float32), tl.load(settings + 2 * num_draws).to(tl.int32)
    top_p, min_p = tl.load(settings + 3 * num_draws), tl.load(settings + 4 * num_draws)
    uniform = tl.load(settings + 5 * num_draws)
    top_k = tl.where((top_k > 0) & (top_k < width), top_k, 0)
    least = (min_p * ONE).to(tl.int64)
    keys += tl.program_id(0).to(tl.int64) * width
    places += tl.program_id(0).to(tl.int64) * width
    count, total = candidates(
        x + row * x_stride, tl.load(highest + row), temperature, top_k, top_p, least, keys, places, width, BLOCK
    )  # pyright: ignore[reportGeneralTypeIssues]

    farthest = nearest_with(keys, count, top_k - 1, tl.where(top_k > 0, 31, 0), False, BLOCK)
    farthest = tl.where(top_k > 0, farthest, FAR)
    _, kept, end = mass_until(keys, count, farthest, least, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    total = tl.where(top_k > 0, kept, total)

    steps = tl.where(top_p < 1, 31, 0)
    wanted = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
    last = nearest_with(keys, count, wanted - 1, steps, True, BLOCK)
    before, until, _ = mass_until(keys, count, last, least, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    each = tl.maximum(mass_of(last), 1)
    nucleus = tl.minimum(until, before + (wanted - before + each - 1) // each * each)  # of equals as many as are needed
    end = tl.where(top_p < 1, tl.minimum(end, nucleus), end)

    target = tl.minimum((uniform * end.to(tl.float64)).to(tl.int64), end - 1)
    nearest = nearest_with(keys, count, target, steps, True, BLOCK)
    before, _, _ = mass_until(keys, count, nearest, least, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    target -= tl.where(top_p < 1, before, 0)
    farthest = tl.where(top_p < 1, nearest, farthest)
    lane, passed, token = tl.arange(0, BLOCK), tl.zeros((), tl.int64), width - 1
    for at in range(0, count, BLOCK):
        key = tl.load(keys + at + lane, at + lane < count, FAR)
        mass = mass_of(key)
        mass = tl.where((key >= nearest) & (key <= farthest) & (mass >= least), mass, 0)
        is_behind = (passed + tl.cumsum(mass, 0) > target) & (mass > 0)
        place = tl.load(places + at + lane, at + lane < count, width)
        token = tl.minimum(token, tl.min(tl.where(is_behind, place, width), 0))
        passed += tl.sum(mass, 0)
    tl.store(tokens + row, token.to(tl.int64))


_TYPES = {"highest": "*fp32", "settings": "*fp64", "keys": "*i32", "places": "*i32", "tokens": "*i64"}
VARIANTS = [
    Variant(draw, kind, {"x": f"*{kind}", **_TYPES}, {"BLOCK": 4096}, num_warps=16, max_registers=128)
    for kind in ("bf16", "fp32")
]
