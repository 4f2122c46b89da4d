"""Forged headers: whatever JSON can say, behind right checksums. Each function changes a draft in place."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from random import Random
from typing import Any

from attack_seeds import Draft, cut, flipped, packed_header, spliced

from clipq_ray.codec import header, layers, varint

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 1.0, 0.5, -0.0, 1e308, 2**15, 2**31, 2**32, 2**48 - 1, 2**48, 2**63, 2**64, -(2**63), 10**31,
    10**33, "", "q", "a", "mh", "zz", "\0", "\ud800", "w" * 300, "\N{PILE OF POO}", [], {}, [[]], [{}], {"": []}, [1], [0], [-1],
    ["a", 1], ["a", [1]], [["a", 1]], [2**48], [2**24, 1], [1] * 33, [2**33, 2**33, 0], [True], [1.0], "source", "needs",
)  # fmt: skip


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in JSON: what holds it, and its key."""
    inside = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in inside] + [place for _, child in inside for place in _nodes(child)]


def _types(rng: Random, draft: Draft) -> None:
    """Wrong values anywhere in the JSON."""
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.02 or not (places := _nodes(draft.content)):
            draft.content = deepcopy(rng.choice(HOSTILE))
        else:
            holder, key = rng.choice(places)
            holder[key] = deepcopy(rng.choice(HOSTILE))


def _shapes(rng: Random, draft: Draft) -> list[Any]:
    """Every shape of the header, in a list that holds it."""
    content = draft.content
    if draft.version == 1:
        return [(row, 1) for row in content["t"]]
    listed = content.get("s", [])
    places = [(listed, at) for at in range(len(listed))]
    places += [(row, 1) for row in content.get("v", [])]
    return places + [(row, 1) for row in content.get("b", [])]


def _sides(rng: Random, draft: Draft) -> None:
    """Other sides: zero, negative, swapped, huge."""
    if not (places := _shapes(rng, draft)):
        return _types(rng, draft)
    holder, key = rng.choice(places)
    small = (0, 1, 2, 3, 5, 9, 30, 1025, 2**12)
    huge = (2**16, 2**20 + 1, 2**31, 2**47, 2**48, 2**64, -1, -(2**31), 10**31)
    side = rng.choice(small if rng.random() < 0.6 else huge)
    if not isinstance(holder[key], list):
        holder[key] = side
    else:
        shape = holder[key]
        for _ in range(rng.choice((1, 1, 2))):
            kind = rng.randrange(5)
            if kind == 0 and shape:
                shape[rng.randrange(len(shape))] = side
            elif kind == 1:
                shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 1, 2, side)))
            elif kind == 2:
                rng.shuffle(shape)
            elif kind == 3 and shape:
                shape.pop()
            else:
                shape += [1] * rng.choice((1, 26, 31, 64))
    return None


def _sizes(rng: Random, draft: Draft) -> None:
    """Sizes that overlap, leave holes, are negative or huge; with or without blobs that fit them."""
    sizes: list[Any] = [len(blob) for blob in draft.blobs]
    if not sizes:
        sizes = [rng.choice((0, 1, 2**47))]
    at, change = rng.randrange(len(sizes)), rng.choice((-4, -1, 1, 4, 8, 2**20, 2**31, 2**47, 2**62))
    sizes[at] += change
    if rng.random() < 0.5:
        sizes[rng.randrange(len(sizes))] -= change
    if draft.version > 1:
        sizes = [max(size, 0) for size in sizes]
    elif rng.random() < 0.1:
        sizes = [int("9" * rng.choice((40, 4300)))] * len(sizes)
    elif rng.random() < 0.3:
        sizes[at] = rng.choice(HOSTILE)
    draft.sizes = sizes


def _letters(rng: Random, draft: Draft) -> None:
    """Other coders, known or not."""
    names = (
        *layers.CODERS,
        "f2",
        "f4",
        "f8",
        "i1",
        "i8",
        "b1",
        "vq",
        "v",
        "",
        "h",
        "Q",
        "qq",
        "q\0",
        "ahh",
        "z" * 99,
    )
    content, letter = draft.content, rng.choice(names)
    if draft.version == 1 and content["t"]:
        rng.choice(content["t"])[2] = letter
    elif content.get("c") and rng.random() < 0.7:
        content["c"][rng.randrange(len(content["c"]))] = letter
    else:
        content["k"] = letter


def _names(rng: Random, draft: Draft) -> None:
    """Names twice, those of a norm's tensors among them, or weird."""
    content = draft.content
    rows = [*content.get("t", []), *content.get("b", []), *content.get("v", [])]
    places = [(row, 0) for row in rows] + [
        (content.get("n", []), at) for at in range(len(content.get("n", [])))
    ]
    known = [holder[key] for holder, key in places]
    weird = [
        "",
        "\0",
        "(vectors)",
        "\ud83d",
        "\udc00",
        "../../etc",
        "\x1b[2J",
        "w" * 5000,
        "bn.weight",
        "bn.running_var",
        "bias",
        ".weight",
    ]
    if places:
        holder, key = rng.choice(places)
        holder[key] = rng.choice(weird + 2 * known)


def _text(rng: Random, draft: Draft) -> None:
    """JSON that is none, or that is dangerous: keys twice, NaN, infinities, other encodings, surrogates, long numbers."""
    text = draft.json()
    word = rng.choice(("NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" * 50, "9" * 5000, '"\\ud800"', '{"a":1,"a":2}', "1e99999999",
                       "0." + "1" * 3000, "+1", "01", "'x'", "\x01", '"\\udc00\\ud800"', "[,]", '"\\u0000"', "tru"))  # fmt: skip
    first = text.split(b":", 1)[0]
    twice = rng.choice((first + b":0,", b'"m":{},', b'"n":[],"n":[],', b'"\\u006d":{},'))
    twice = twice.lstrip(b"{")
    draft.text = rng.choice((
        text.replace(b'"m": {', b'"m": {"x": ' + word.encode() + b", ", 1), text[:-1] + b', "x": ' + word.encode() + b"}",
        b"{" + twice + text[1:], text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, text + text, text[:-1], text + b"\0", b"",
        flipped(rng, text), spliced(rng, text), text.replace(b'"w"', b'"\xed\xa0\x80"'), b"[" + text + b"]", cut(rng, text),
        text.replace(b"}", b"}" + b" " * 5000),
    ))  # fmt: skip


def _nested(rng: Random, draft: Draft) -> None:
    """Thousands of levels, anywhere."""
    depth = rng.choice((5, 61, 62, 63, 64, 65, 66, 500, 900, 980, 990, 1000, 3000, 9000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = "1" if opened != "[" else ""
    value = (opened * depth + inner + closed * rng.choice((depth, depth, depth, depth - 1))).encode()
    places = _nodes(draft.content)
    holder, key = rng.choice(places)
    if rng.random() < 0.3:
        holder, key = draft.content["m"], "deep"
    holder[key] = "HERE"
    draft.text = draft.json().replace(b'"HERE"', value)


BOMBS = (
    "blank",
    "n",
    "v",
    "b",
    "keys",
    "emoji",
    "digits",
    "[],",
    '{"a":0},',
    "0,",
    '"",',
    "9" * 30 + ",",
    "9" * 4300 + ",",
    "1.5,",
)


@cache
def _packed_bomb(kind: str, size: int, version: int) -> bytes:
    return packed_header(bomb(kind, size), version)


def bomb(kind: str, size: int) -> bytes:
    """JSON of about `size` bytes that packs well."""
    if kind == "blank":
        return b'{"m":{}' + b" " * size + b"}"
    if kind in "nvb":
        one = {"n": b'"",', "v": b'["",[]],', "b": b'["",0],'}[kind]
        return b'{"m":{},"k":"q","%s":[%s]}' % (kind.encode(), (one * (size // len(one)))[:-1])
    if kind == "keys":
        return b'{"m":{%s}}' % b",".join(b'"%d":0' % number for number in range(size // 10))
    if kind in ("emoji", "digits"):
        value = (
            b'"' + b"a" * size + "\N{PILE OF POO}".encode() + b'"' if kind == "emoji" else b"0." + b"7" * size
        )
        return b'{"m":{"a":%s}}' % value
    return b'{"m":{"a":[%s]}}' % (kind.encode() * (size // len(kind)) + b"0")


def _bombed(rng: Random, draft: Draft) -> None:
    """A small header that unpacks to a large one; one in 512 as large as it may be, and some larger."""
    kind, sizes = rng.choice(BOMBS), (1 << 9, 1 << 11)
    if rng.random() < 1 / 512:
        sizes = (header.JSON_LIMIT - 64,) if rng.random() < 0.8 else (header.JSON_LIMIT + 64,)
    draft.packed = _packed_bomb(kind, rng.choice(sizes), draft.version)


def _tables(rng: Random, draft: Draft) -> None:
    """Norms, vectors, needs and columns of other lengths."""
    content = draft.content
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("needs", "b", "v", "k", "n", "s", "c", "t", "m"))
        rows = content.get(kind)
        if isinstance(rows, list) and rows and rng.random() < 0.6:
            rng.choice((rows.pop, lambda rows=rows: rows.append(rows[0]), rows.reverse, rows.clear))()
        elif rng.random() < 0.3:
            content.pop(kind, None)
        else:
            count = rng.choice((0, 1, 3, 2**20, 2**24, 2**46))
            content[kind] = rng.choice(
                (
                    [],
                    {},
                    ["x"],
                    [["bn2", count]],
                    [["y", [count]]],
                    [["y", [2, 0]]],
                    [["", 1]] * 2,
                    "q",
                    "a",
                    None,
                    5,
                )
            )


def _tails(rng: Random, draft: Draft) -> None:
    """What stands behind the stream: sizes as LEB128, the hash."""
    tail = b"".join(varint.write(len(blob)) for blob in draft.blobs) + draft.source
    longer = b"".join(bytes((len(blob) & 127 | 128, len(blob) >> 7 | 128, 0)) for blob in draft.blobs)
    draft.tail = rng.choice((
        flipped(rng, tail), cut(rng, tail), spliced(rng, tail), tail + bytes(rng.choice((1, 31, 32, 33))), b"\xff" * 9 + tail,
        b"\x80" * 6 + b"\1" + tail, longer + draft.source, b"", b"\xff" * 6 + b"\x7f", tail[: -len(draft.source) or None],
    ))  # fmt: skip


def _huge(rng: Random, draft: Draft) -> None:
    """Few bytes that ask for many elements: constants, and blobs that pay nothing for a code; one in 256 up to the limit and above."""
    bits = rng.choice((20, 21, 23, 24)) if rng.random() < 1 / 256 else rng.randrange(10, 15)
    coder = rng.choice(("q", "qh", "a", "m", "vq", "va", "vm", "b"))
    if bits > 20 and coder in ("a", "m", "va", "vm"):
        bits = 20
    count, levels = (1 << bits) + rng.choice((-1, 0, 1)), b"\1\1" + bytes(4 if coder == "qh" else 8)
    shape = rng.choice(
        (
            [count],
            [1, count],
            [count, 1],
            [1 << bits // 2, 1 << bits - bits // 2],
            [1, 1, count],
            [1, 1 << bits - 4, 4, 4],
        )
    )
    words = rng.choice((b"\0", b"\xff", b"\x80", b"\0\1")) * rng.choice((1, 2, 40, 1000))
    codes = (
        rng.choice((b"\x80\x80\1\0", b"\0\x80\x80\1", b"\0\0"))
        if coder.strip("vh") in "qb"
        else b"\0\1" + words
    )
    draft.version, draft.source, draft.content = 3, b"", {"m": {}}
    if coder == "b":
        draft.content |= {"b": [["x", count // 4]], "k": "q"}
        draft.blobs = [bytes(6)]
    elif coder.startswith("v"):
        draft.content |= {"v": [["x", shape]], "k": coder[1]}
        draft.blobs = [rng.choice((b"\0\0", b"\xff\xff\xff\x3f")) + b"\1\1" + codes]
    else:
        draft.content |= {"n": ["x"], "s": [shape], "c": [coder]}
        draft.blobs = [levels + codes]


HEADERS: dict[str, Callable[[Random, Draft], None]] = {
    "types": _types, "sides": _sides, "sizes": _sizes, "letters": _letters, "names": _names, "text": _text, "nested": _nested,
    "bombs": _bombed, "tables": _tables, "tails": _tails, "huge": _huge,
}  # fmt: skip
