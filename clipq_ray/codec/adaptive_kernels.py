"""The loops of coder "a", compiled by numba: contexts, counters, the range coder. SPEC.md defines every number here.

`write` and `read` are one function, compiled twice with `decoding` as a constant; a decision has no branch on its outcome, since that is
what a processor cannot predict (this made it twice as fast). All values are integers, and 64 bits hold every intermediate one. Indices
are made unsigned so that numba does not look for negative ones; they are in bounds whatever the bytes are, since codes are held within
their sides as they are decoded. Not covered: what the arrays start with (`adaptive`).
"""

# numba compiles these functions; their types are those of the arguments, which the docstrings state.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment,call-overload,operator,attr-defined"
from __future__ import annotations

import numpy as np
from numba import literally, njit

# Where counters begin: zero? by bucket; positive? by three signs; above 1, 3, 7 ...? by step and bucket; the bits below by place.
ZERO, SIGN, ABOVE, REST, COUNTERS = 0, 32, 64, 320, 1344
SURE, NEVER, SEEN_MOST = (
    65520 << 8,
    16 << 8,
    255,
)  # the ends of a counter's probability in 2^-24, decisions that it counts
ROW, PLACE, CHANNEL, LEFT, UP, TWO_LEFT, TWO_UP, ACROSS = range(8)  # of the weights
FULL, DAMAGED = -1, -2
SLACK = 16  # words behind the most that are used: a code has at most 17 decisions of 12 bits


@njit(inline="always")
def _bit(bit, decoding, at, counters, steps, low, span, ahead, done, data):
    """One decision by counter `at`, written, or read and given; the coder's state as it is afterwards."""
    at = np.uintp(at)
    counter = np.int64(counters[at])
    value, seen = counter >> 8, counter & 255
    bound = (span >> 16) * (value >> 8)
    if decoding:
        bit = ahead < bound
        ahead = ahead if bit else ahead - bound
    else:
        low = low if bit else low + bound
    span = bound if bit else span - bound
    goal = np.int64(SURE) if bit else np.int64(NEVER)
    value += ((goal - value) * np.int64(steps[np.uintp(seen)])) >> 16
    counters[at] = (value << 8) | min(seen + 1, SEEN_MOST)
    if span < 1 << 32:
        span <<= 16
        if decoding:
            ahead = (ahead << 16) | np.int64(data[np.uintp(done)])
        else:
            _emit(data, done, low >> 32)
            low = (low & 0xFFFFFFFF) << 16
        done += 1
    return bit, low, span, ahead, done


@njit(no_cpython_wrapper=True)
def _emit(data, done, value):
    """One word; the seventeenth bit of `value` is a carry into those before."""
    data[done] = value & 0xFFFF
    if value > 0xFFFF:
        done -= 1
        while data[done] == 0xFFFF:
            data[done] = 0
            done -= 1
        data[done] += 1


@njit(inline="always")
def _size(size, largest, bucket, decoding, counters, steps, low, span, ahead, done, data):
    """The magnitude of a code that is not zero, written, or read and given; at most `largest` unless the bytes are damaged."""
    top, more = np.int64(0), True
    while more and largest >= 2 << top:
        at = ABOVE + (top << 5) + bucket
        more, low, span, ahead, done = _bit(
            size >= 2 << top, decoding, at, counters, steps, low, span, ahead, done, data
        )
        if more:
            top += 1
    found = np.int64(1)
    if top == 1 and largest == 2:
        found = np.int64(2)
    else:
        for place in range(top - 1, -1, -1):
            at = REST + (top << 7) + found
            bit, low, span, ahead, done = _bit(
                (size >> place) & 1 == 1, decoding, at, counters, steps, low, span, ahead, done, data
            )
            found = 2 * found + (1 if bit else 0)
    return found, low, span, ahead, done


@njit(no_cpython_wrapper=True)
def _near(places, kernel, width, weights):
    """int32 (places, 4): the weights of the neighbours left, up, two left, two up; 0 where the kernel has none."""
    result = np.zeros((places, 4), np.int32)
    for i in range(places):
        x, y = i % kernel % width, i % kernel // width
        if kernel == 1:  # two columns before stands in for up
            result[i, 0], result[i, 1] = weights[LEFT], weights[UP]
        else:
            result[i, 0] = weights[LEFT] if x > 0 else weights[ACROSS]
            result[i, 1] = weights[UP] if y > 0 else 0
            result[i, 2] = weights[TWO_LEFT] if x > 1 else 0
            result[i, 3] = weights[TWO_UP] if y > 1 else 0
    return result


@njit(no_cpython_wrapper=True)
def _learn(sizes, shift, kernel, place_means, column_means, base, weights):
    """Moves the means towards a row's magnitudes; fills what they say of the next row's."""
    for column in range(len(column_means)):
        total = 0
        for place in range(column * kernel, (column + 1) * kernel):
            total += sizes[place]
            place_means[place] += ((sizes[place] << 8) - place_means[place]) >> shift
        column_means[column] += ((total * (65536 // kernel) >> 8) - column_means[column]) >> 4
        shared = weights[CHANNEL] * column_means[column]
        for place in range(column * kernel, (column + 1) * kernel):
            base[place] = weights[PLACE] * place_means[place] + shared


@njit(no_cpython_wrapper=True)
def _row(
    line,
    data,
    decoding,
    sides,
    weights,
    near,
    base,
    mean,
    sizes,
    signs,
    back,
    counters,
    steps,
    buckets,
    state,
):
    """One row, written, or read and given in `line`; the mean behind it, below 0 where a code is damaged or the data are full."""
    literally(decoding)
    negative, positive = sides
    pad, up, channel = back
    both = negative > 0 and positive > 0
    here, up_1, left_2, up_2 = sizes[pad:], sizes[pad - up :], sizes[pad - 2 :], sizes[pad - 2 * up :]
    signs_here, signs_up, signs_channel = signs[pad:], signs[pad - up :], signs[pad - channel :]
    low, span, ahead, done = state
    left, sign_left, most = np.int64(0), np.int64(0), len(data) - SLACK
    for i in range(len(base)):
        around = near[i, 0] * left + near[i, 1] * np.int64(up_1[i])
        around += near[i, 2] * np.int64(left_2[i]) + near[i, 3] * np.int64(up_2[i])
        expected = np.int64(base[i]) + weights[ROW] * mean + (around << 8)
        bucket = np.int64(buckets[np.uintp(min(expected >> 16, 1023))])
        code = np.int64(line[i])
        size = abs(code)
        bit, low, span, ahead, done = _bit(
            size > 0, decoding, bucket, counters, steps, low, span, ahead, done, data
        )
        if bit:
            sign = code > 0
            if both:
                at = SIGN + sign_left + 3 * np.int64(signs_up[i]) + 9 * np.int64(signs_channel[i])
                sign, low, span, ahead, done = _bit(
                    sign, decoding, at, counters, steps, low, span, ahead, done, data
                )
            elif decoding:
                sign = positive > 0
            largest = positive if sign else negative
            size, low, span, ahead, done = _size(
                size, largest, bucket, decoding, counters, steps, low, span, ahead, done, data
            )
            if size > largest or done > most:
                return np.int64(-1), (low, span, ahead, done)
            sign_left = np.int64(1) if sign else np.int64(2)
            if decoding:
                line[i] = size if sign else -size
        else:
            size, sign_left = np.int64(0), np.int64(0)
            if decoding:
                line[i] = 0
        here[i], signs_here[i], left = size, sign_left, size
        mean += ((size << 8) - mean) >> 5
    return (np.int64(-1) if done > most else mean), (low, span, ahead, done)


@njit(no_cpython_wrapper=True)
def _layer(codes, data, decoding, shape, weights, counters, steps, buckets):
    """All rows, then what ends the words; gives the words used, below 0 where the data are full or damaged."""
    literally(decoding)
    rows, columns, kernel, width = shape[0], shape[1], shape[2], shape[3]
    mean = shape[6]
    places = columns * kernel
    up, channel = (width, kernel) if kernel > 1 else (np.int64(2), np.int64(3))
    pad = max(2 * up, channel)
    sizes, signs = np.zeros(pad + places, np.int32), np.zeros(pad + places, np.uint8)
    place_means, column_means = np.full(places, mean, np.int32), np.full(columns, mean, np.int32)
    base = np.full(places, (weights[PLACE] + weights[CHANNEL]) * mean, np.int32)
    near = _near(places, kernel, width, weights)
    ahead, done = np.int64(0), np.int64(0)
    if decoding:
        for done in range(3):
            ahead = (ahead << 16) | np.int64(data[done])
        done = np.int64(3)
    state = (np.int64(0), np.int64(1) << 48, ahead, done)
    for row in range(rows):
        line = codes[row * places : (row + 1) * places]
        row_mean, state = _row(
            line, data, decoding, (shape[4], shape[5]), weights, near, base, mean, sizes, signs, (pad, up, channel), counters,
            steps, buckets, state,
        )  # fmt: skip
        if row_mean < 0:
            return DAMAGED if decoding else FULL
        shift = 2 + (1 if row > 1 else 0) + (1 if row > 5 else 0) + (1 if row > 15 else 0)
        _learn(sizes[pad:], shift, kernel, place_means, column_means, base, weights)
        mean += (row_mean - mean) >> 3
    low, done = state[0], np.int64(state[3])
    if decoding:  # an encoder ends with the first value in its span that has no lower words
        return done if state[2] < 1 << 32 else DAMAGED
    last = (low + 0xFFFFFFFF) >> 32  # the only value of one word that the span behind low must hold
    if last > 0:
        _emit(data, done, last)
        done += 1 if last & 0xFFFF else 0
    return done


@njit(nogil=True, cache=True)
def write(codes, data, shape, weights, counters, steps, buckets):
    """Writes `codes` as words into `data`; gives the words used, or `FULL`.

    codes: int16 (rows * columns * kernel,); data: uint16; shape: int64 (7,), rows, columns, kernel, its width, most negative, most
    positive, the mean magnitude in 1/256; the rest as `adaptive` makes it
    """
    return _layer(codes, data, 0, shape, weights, counters, steps, buckets)


@njit(nogil=True, cache=True)
def read(codes, data, shape, weights, counters, steps, buckets):
    """The mirror of `write`: fills `codes`; gives the words read, those behind the end among them, or `DAMAGED`."""
    return _layer(codes, data, 1, shape, weights, counters, steps, buckets)
