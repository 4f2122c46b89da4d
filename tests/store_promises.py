"""What every store promises, for tests of one that is good and of one that fails now and then."""

from __future__ import annotations

import os

from clipq_ray.storage import Store


def exercise(store: Store, objects: int) -> None:
    """What every store promises."""
    content = {
        f"part-{number % 3}/object-{number}": os.urandom(2_000 + 37 * number) for number in range(objects)
    }
    for name, data in content.items():
        store.write(name, data)
        assert store.read(name) == data
        assert store.size(name) == len(data)
        assert store.read_range(name, 10, 500) == data[10:500]
    assert store.names() == sorted(content)
    assert {name: entry.bytes for name, entry in store.entries().items()} == {
        name: len(data) for name, data in content.items()
    }
    for name in list(content)[: objects // 3]:
        store.remove(name)
        store.remove(name)
        assert not store.exists(name)
    assert store.names() == sorted(list(content)[objects // 3 :])
    for number in range(objects // 2):
        # an answer that is lost may leave False where this put it; what lies there is whole and this one's
        store.create(f"once-{number}", b"first")
        assert not store.create(f"once-{number}", b"second")
        assert store.read(f"once-{number}") == b"first"
    store.child("part-1").remove_tree()
    assert store.names("part-1/") == []
