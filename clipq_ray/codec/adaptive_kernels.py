"""The loops of coder "a", compiled by numba: contexts, counters, the range coder. SPEC.md defines every number here.

`write` knows all codes, so it goes through a row several times: neighbours (vectors), buckets and a list of decisions, then the range coder
over the list, all without a branch on what a code is, since that is what a processor cannot predict. `read` is its mirror code by code; it
branches on zero or not, so that what follows a zero does not wait for it, and nowhere else on a decision. All values are integers, and 64
bits hold every intermediate one. Indices are made unsigned so that numba does not look for negative ones; they are in bounds whatever the
bytes are, since codes are held within their sides as they are decoded. Loops fill arrays where numpy's functions would take numba a second
to compile. Not covered: where D and T are kept, and when a blob ends as it should (`adaptive`).
"""

# numba compiles these functions; their types are those of the arguments, which the docstrings state.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment,call-overload,operator,attr-defined"
from __future__ import annotations

import numpy as np
from numba import njit

from clipq_ray.compiled import cached

# Where counters begin: zero? by bucket; positive? by three signs; above 1, 3, 7 ...? by step and bucket; the bits below by place.
ZERO, SIGN, ABOVE, REST, COUNTERS = 0, 32, 64, 320, 1344
SURE, NEVER = 65520 << 8, 16 << 8  # the ends of a counter's probability in 2^-24
SEEN_MOST = 255  # decisions that a counter counts
ROW, PLACE, CHANNEL, LEFT, UP, TWO_LEFT, TWO_UP, ACROSS = range(8)  # of the weights
DAMAGED = -1
SLACK = 16  # words behind the most that are used: a code has at most 17 decisions of 12 bits
YES = 1 << 15  # a listed decision is the number of its counter, and this if it is a yes
LINE = 16  # numbers per code in what is asked: four words of four decisions, four for where buckets are added, how many
LISTED = 1 << 11  # decisions that are listed, and stay in the first cache, before they are coded

_WEIGHTS = np.array((104, 35, 68, 60, 39, 10, 4, 17))
"""Of the means of row, place and channel, then of neighbours: left, up, two left, two up, and left in the kernel before. Fitted to
one-shot codes of ResNet-20 and ResNet-56 and to those of the trained ResNet-20."""
_BOUNDS = (
    3, 6, 10, 14, 19, 25, 32, 39, 48, 59, 72, 86, 103, 123, 146, 173, 204, 240, 283, 333, 391, 459, 537, 630, 737, 862, 1008,
)  # fmt: skip
"""An expected magnitude is in the bucket of as many bounds as it reaches; in 1/64 of the typical magnitude, about 4.5 buckets per octave."""
_BUCKETS = np.searchsorted(_BOUNDS, np.arange(1024), side="right").astype(np.uint8)
_STEPS = (655360 // (10 * np.arange(256) + 16)).astype(np.int32)
"""How far a counter moves at its n-th decision, in 1/65536."""


@njit(no_cpython_wrapper=True)
def _filled(count, value):
    """int32 (count,), all `value`."""
    result = np.empty(count, np.int32)
    for i in range(count):
        result[i] = value
    return result


@njit(no_cpython_wrapper=True)
def _models(density, typical):
    """Weights, the mean to start with, counters: their values, then how many decisions each has seen."""
    weights = np.empty(8, np.int64)
    for i in range(8):
        weights[i] = (_WEIGHTS[i] << 6) // typical
    counters = _filled(2 * COUNTERS, 1)
    for i in range(COUNTERS):
        counters[i] = (2 * density + 1) << 15 if i < SIGN else 1 << 23
    return weights, (2 * density + 1) * typical >> 1, counters


@njit(no_cpython_wrapper=True)
def _near(columns, kernel, width, weights):
    """int32 (4 * places,): the weights of the neighbours left, up, two left, two up; 0 where the kernel has none."""
    places = columns * kernel
    result = _filled(4 * places, 0)
    for k in range(kernel):
        x, y = k % width, k // width
        left = weights[LEFT] if x > 0 or kernel == 1 else weights[ACROSS]
        up = weights[UP] if y > 0 or kernel == 1 else 0  # without a kernel it is of two columns before
        left_2, up_2 = weights[TWO_LEFT] if x > 1 else 0, weights[TWO_UP] if y > 1 else 0
        for i in range(k, places, kernel):
            at = np.uintp(i)
            result[at] = left
            result[at + np.uintp(places)] = up
            result[at + np.uintp(2 * places)] = left_2
            result[at + np.uintp(3 * places)] = up_2
    return result


@njit(no_cpython_wrapper=True)
def _learn(sizes, row, kernel, place_means, column_means, base, weights):
    """Moves the means towards a row's magnitudes; fills what they say of the next row's."""
    shift = 2 + (1 if row > 1 else 0) + (1 if row > 5 else 0) + (1 if row > 15 else 0)
    for i in range(len(base)):
        place_means[i] += ((sizes[i] << 8) - place_means[i]) >> shift
    start, share, place, channel = np.int64(0), 65536 // kernel, weights[PLACE], weights[CHANNEL]
    for column in range(len(column_means)):
        total = np.int64(0)
        for i in range(start, start + kernel):
            total += sizes[np.uintp(i)]
        column_means[column] += ((total * share >> 8) - column_means[column]) >> 4
        shared = channel * column_means[column]
        for i in range(start, start + kernel):
            base[np.uintp(i)] = shared
        start += kernel
    for i in range(len(base)):
        base[i] += place * place_means[i]


@njit(no_cpython_wrapper=True)
def _memory(columns, kernel, width, weights, mean):
    """How far back neighbours are; magnitudes and signs of a row, 0 in front of it; means of places and of columns; what those say."""
    places = columns * kernel
    up, channel = (width, kernel) if kernel > 1 else (np.int64(2), np.int64(3))
    pad = max(2 * up, channel)
    sizes, signs = np.zeros(pad + places, np.int32), np.zeros(pad + places, np.uint8)
    place_means, column_means = _filled(places, mean), _filled(columns, mean)
    base = _filled(places, (weights[PLACE] + weights[CHANNEL]) * mean)
    return (pad, up, channel), sizes, signs, (place_means, column_means, base)


@njit(forceinline=True)
def _moved(span, ahead, done, data):
    """The decoder's state with the next word where it is due; without a branch, since one in twenty decisions is too rare to predict."""
    word, due = np.int64(data[np.uintp(done)]), span < 1 << 32
    ahead = (ahead << 16) | word if due else ahead
    span = span << 16 if due else span
    return span, ahead, done + (1 if due else 0)


@njit(forceinline=True)
def _seen(at, counters):
    """Counts a decision; a counter's value and how far it moves. Apart from values, so that these need not wait for it."""
    at = np.uintp(at)
    count = np.int64(counters[at + np.uintp(COUNTERS)])
    counters[at + np.uintp(COUNTERS)] = min(count + 1, SEEN_MOST)
    return np.int64(counters[at]), np.int64(_STEPS[np.uintp(count)])


@njit(forceinline=True)
def _decide(at, counters, span, ahead, done, data):
    """One decision by counter `at`, read without a branch; the coder's state as it is afterwards."""
    value, step = _seen(at, counters)
    bound = (span >> 16) * (value >> 8)
    bit = ahead < bound
    goal = np.int64(SURE) if bit else np.int64(NEVER)
    counters[np.uintp(at)] = value + (((goal - value) * step) >> 16)
    ahead = ahead if bit else ahead - bound
    span = bound if bit else span - bound
    span, ahead, done = _moved(span, ahead, done, data)
    return bit, span, ahead, done


@njit(forceinline=True)
def _size(largest, bucket, counters, span, ahead, done, data):
    """The magnitude of a code that is not zero; at most `largest` unless the bytes are damaged."""
    top, more = np.int64(0), True
    while more and largest >= 2 << top:
        at = ABOVE + (top << 5) + bucket
        more, span, ahead, done = _decide(at, counters, span, ahead, done, data)
        if more:
            top += 1
    found = np.int64(1)
    if top == 1 and largest == 2:
        return np.int64(2), span, ahead, done
    for _ in range(top):
        bit, span, ahead, done = _decide(REST + (top << 7) + found, counters, span, ahead, done, data)
        found = 2 * found + (1 if bit else 0)
    return found, span, ahead, done


@njit(no_cpython_wrapper=True)
def _read_row(line, data, sides, weight, near, base, mean, sizes, signs, back, counters, state):
    """Reads a row into `line`; the mean behind it, below 0 where a code is damaged or the data are at an end."""
    negative, positive = sides
    pad, up, channel = back
    both, places = negative > 0 and positive > 0, len(base)
    here, up_1, left_2, up_2 = sizes[pad:], sizes[pad - up :], sizes[pad - 2 :], sizes[pad - 2 * up :]
    signs_here, signs_up, signs_channel = signs[pad:], signs[pad - up :], signs[pad - channel :]
    near_0, near_1, near_2, near_3 = near, near[places:], near[2 * places :], near[3 * places :]
    span, ahead, done = state
    left, sign_left, most = np.int64(0), np.int64(0), len(data) - SLACK
    for i in range(places):
        around = near_0[i] * left + near_1[i] * np.int64(up_1[i])
        around += near_2[i] * np.int64(left_2[i]) + near_3[i] * np.int64(up_2[i])
        expected = np.int64(base[i]) + weight * mean + (around << 8)
        bucket = np.int64(_BUCKETS[np.uintp(min(expected >> 16, 1023))])
        value, step = _seen(bucket, counters)
        bound = (span >> 16) * (value >> 8)
        if ahead < bound:
            counters[np.uintp(bucket)] = value + (((SURE - value) * step) >> 16)
            span, ahead, done = _moved(bound, ahead, done, data)
            sign = positive > 0
            if both:
                at = SIGN + sign_left + 3 * np.int64(signs_up[i]) + 9 * np.int64(signs_channel[i])
                sign, span, ahead, done = _decide(at, counters, span, ahead, done, data)
            largest = positive if sign else negative
            size, span, ahead, done = _size(largest, bucket, counters, span, ahead, done, data)
            if size > largest:
                return np.int64(DAMAGED), (span, ahead, done)
            sign_left = np.int64(1) if sign else np.int64(2)
            line[i] = size if sign else -size
        else:
            counters[np.uintp(bucket)] = value + (((NEVER - value) * step) >> 16)
            span, ahead, done = _moved(span - bound, ahead - bound, done, data)
            size, sign_left = np.int64(0), np.int64(0)
            line[i] = 0
        if done > most:
            return np.int64(DAMAGED), (span, ahead, done)
        here[i], signs_here[i], left = size, sign_left, size
        mean += ((size << 8) - mean) >> 5
    return mean, (span, ahead, done)


@cached(nogil=True)
def read(codes, data, shape, density, typical):
    """The mirror of `write`: fills `codes`; gives the words read, those behind the end among them, or `DAMAGED`.

    data: uint16, `SLACK` zeros and the words that the decoder is ahead behind what was written; the rest as in `write`
    """
    rows, columns, kernel, width, negative, positive = shape
    weights, mean, counters = _models(density, typical)
    near = _near(columns, kernel, width, weights)
    back, sizes, signs, means = _memory(columns, kernel, width, weights, mean)
    place_means, column_means, base = means
    places = columns * kernel
    ahead = np.int64(0)
    for i in range(3):
        ahead = (ahead << 16) | np.int64(data[i])
    state = (np.int64(1) << 48, ahead, np.int64(3))
    for row in range(rows):
        line = codes[row * places : (row + 1) * places]
        row_mean, state = _read_row(
            line, data, (negative, positive), weights[ROW], near, base, mean, sizes, signs, back, counters, state,
        )  # fmt: skip
        if row_mean < 0:
            return np.int64(DAMAGED)
        _learn(sizes[back[0] :], row, kernel, place_means, column_means, base, weights)
        mean += (row_mean - mean) >> 3
    # an encoder ends with the first value in its span that has no lower words
    return state[2] if state[1] < 1 << 32 else np.int64(DAMAGED)


@njit(no_cpython_wrapper=True)
def _asked(negative, positive):
    """What is asked about each code from -negative on, `LINE` numbers each: four decisions of 16 bits in a word, the first lowest."""
    asked = np.zeros((negative + positive + 1) * LINE, np.int64)
    for code in range(-negative, positive + 1):
        line = (code + negative) * LINE
        asked[line] = YES if code != 0 else 0
        asked[line + 4], count = 1, 1
        size, largest = abs(code), positive if code > 0 else negative
        if code != 0 and negative > 0 and positive > 0:
            asked[line] |= (SIGN | (YES if code > 0 else 0)) << 16
            count = 2
        top, more = 0, code != 0
        while more and largest >= 2 << top:
            more = size >= 2 << top
            asked[line + (count >> 2)] |= (ABOVE + (top << 5) | (YES if more else 0)) << (16 * (count & 3))
            asked[line + 4 + (count >> 2)] |= 1 << (16 * (count & 3))
            count += 1
            top += 1 if more else 0
        if top > 1 or largest > 2:
            for place in range(top - 1, -1, -1):
                at = REST + (top << 7) + (size >> (place + 1))
                asked[line + (count >> 2)] |= (at | ((size >> place) & 1) * YES) << (16 * (count & 3))
                count += 1
        asked[line + 8] = count
    return asked


@njit(no_cpython_wrapper=True)
def _look(line, both, sizes, signs, back, near, base, expected, context):
    """Magnitudes and signs of a row, what to expect without the row's mean, contexts of signs where they are asked."""
    pad, up, channel = back
    here, signs_here = sizes[pad:], signs[pad:]
    for i in range(len(line)):
        code = line[i]
        here[i] = abs(code)
        signs_here[i] = 1 if code > 0 else (2 if code < 0 else 0)
    left, left_2, up_1, up_2 = sizes[pad - 1 :], sizes[pad - 2 :], sizes[pad - up :], sizes[pad - 2 * up :]
    near_0, near_1, near_2, near_3 = near, near[len(line) :], near[2 * len(line) :], near[3 * len(line) :]
    for i in range(len(line)):
        around = near_0[i] * left[i] + near_1[i] * up_1[i] + near_2[i] * left_2[i] + near_3[i] * up_2[i]
        expected[i] = base[i] + (around << 8)
    if both:
        sign_left, sign_up, sign_channel = signs[pad - 1 :], signs[pad - up :], signs[pad - channel :]
        for i in range(len(line)):
            context[i] = (sign_left[i] + 3 * sign_up[i] + 9 * sign_channel[i]) << 16


@njit(forceinline=True)
def _put(decisions, at, word):
    """Four decisions, one store once compiled; those that a code does not have are overwritten by the next code's."""
    at = np.uintp(at)
    decisions[at] = word
    decisions[at + np.uintp(1)] = word >> 16
    decisions[at + np.uintp(2)] = word >> 32
    decisions[at + np.uintp(3)] = word >> 48


@njit(no_cpython_wrapper=True)
def _list(line, sizes, first, asked, most, expected, context, weight, mean, decisions, at):
    """Lists the decisions of a row from `at` on; gives where they end and the row's mean."""
    for i in range(len(line)):
        bucket = np.int64(_BUCKETS[np.uintp(min((expected[i] + weight * mean) >> 16, 1023))])
        what = np.uintp((np.int64(line[i]) + first) * LINE)
        _put(decisions, at, asked[what] + bucket * asked[what + np.uintp(4)] + np.int64(context[i]))
        if most > 4:
            _put(decisions, at + 4, asked[what + np.uintp(1)] + bucket * asked[what + np.uintp(5)])
        if most > 8:
            _put(decisions, at + 8, asked[what + np.uintp(2)] + bucket * asked[what + np.uintp(6)])
            _put(decisions, at + 12, asked[what + np.uintp(3)] + bucket * asked[what + np.uintp(7)])
        at += asked[what + np.uintp(8)]
        mean += ((np.int64(sizes[i]) << 8) - mean) >> 5
    return at, mean


@njit(no_cpython_wrapper=True)
def _code(decisions, counters, state, words):
    """Codes what is listed; a word's seventeenth bit is a carry into those before."""
    low, span, done = state
    for i in range(len(decisions)):
        decision = np.int64(decisions[i])
        at, bit = np.uintp(decision & (YES - 1)), decision >= YES
        value, step = _seen(at, counters)
        bound = (span >> 16) * (value >> 8)
        low = low if bit else low + bound
        span = bound if bit else span - bound
        goal = np.int64(SURE) if bit else np.int64(NEVER)
        counters[at] = value + (((goal - value) * step) >> 16)
        words[np.uintp(done)] = low >> 32
        due = span < 1 << 32
        low = (low & 0xFFFFFFFF) << 16 if due else low
        span = span << 16 if due else span
        done += 1 if due else 0
    return low, span, done


@njit(no_cpython_wrapper=True)
def _ended(words, low, done):
    """The words with what ends them, carries added."""
    last = (low + 0xFFFFFFFF) >> 32  # the only value of one word that the span behind low must hold
    words[done] = last
    carry = np.int64(0)
    data = np.empty(done + 1, np.uint16)
    for i in range(done, -1, -1):
        carry += np.int64(words[i])
        data[i] = carry & 0xFFFF
        carry >>= 16
    return data[: done + (1 if last & 0xFFFF else 0)]


@cached(nogil=True)
def survey(codes):
    """The least and the greatest code, how many are not zero, the sum of magnitudes."""
    least, greatest, used, total = np.int16(0), np.int16(0), np.int64(0), np.int64(0)
    for i in range(len(codes)):
        code = codes[i]
        least, greatest = min(least, code), max(greatest, code)
        used += code != 0
        total += abs(code)
    return least, greatest, used, total


@cached(nogil=True)
def write(codes, shape, density, typical):
    """The words of `codes`, uint16.

    codes: int16 (rows * columns * kernel,), each within its side; shape: rows, columns, kernel, its width, most negative, most positive;
    density and typical: D and T
    """
    rows, columns, kernel, width, negative, positive = shape
    weights, mean, counters = _models(density, typical)
    near = _near(columns, kernel, width, weights)
    back, sizes, signs, means = _memory(columns, kernel, width, weights, mean)
    place_means, column_means, base = means
    places = columns * kernel
    expected, context = np.zeros(places, np.int32), np.zeros(places, np.int32)
    asked = _asked(negative, positive)
    most = max(asked[8], asked[len(asked) - LINE + 8])
    decisions = np.empty(LISTED + places * most + LINE, np.uint16)
    words = np.empty((codes.size >> 3) + len(decisions), np.uint32)
    at, state = np.int64(0), (np.int64(0), np.int64(1) << 48, np.int64(0))
    for row in range(rows):
        line = codes[row * places : (row + 1) * places]
        _look(line, negative > 0 and positive > 0, sizes, signs, back, near, base, expected, context)
        at, row_mean = _list(
            line, sizes[back[0] :], negative, asked, most, expected, context, weights[ROW], mean, decisions, at,
        )  # fmt: skip
        if at >= LISTED or row == rows - 1:
            if len(words) - state[2] <= at:  # a decision takes at most a word
                more = np.empty(2 * len(words) + at, np.uint32)
                for i in range(state[2]):
                    more[i] = words[i]
                words = more
            state = _code(decisions[:at], counters, state, words)
            at = np.int64(0)
        _learn(sizes[back[0] :], row, kernel, place_means, column_means, base, weights)
        mean += (row_mean - mean) >> 3
    return _ended(words, state[0], state[2])
