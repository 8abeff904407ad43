"""The Merkle tree of Certificate Transparency (RFC 6962, section 2.1), with SHA-256.

    MTH({})     = SHA-256()
    MTH({d})    = SHA-256(0x00 || d)
    MTH(D[0:n]) = SHA-256(0x01 || MTH(D[0:k]) || MTH(D[k:n])),  k the largest power of two below n

The first byte keeps a leaf from being taken for a node. An inclusion proof is the list of the log2(n) hashes with which
one leaf leads to the root; it tells nothing of the other leaves but these hashes.
"""

import hashlib
from collections.abc import Sequence


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 || data)."""
    return hashlib.sha256(b"\0" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """The hashes of all subtrees, from the leaves' to the root's: an odd one out rises as it is.

    Pairing neighbours level by level gives the same tree as RFC 6962's splits at powers of two.
    """
    found = [list(leaves)]
    while len(row := found[-1]) > 1:
        found.append([_node(*row[i : i + 2]) if i + 1 < len(row) else row[i] for i in range(0, len(row), 2)])
    return found


def root(leaves: Sequence[bytes]) -> bytes:
    """MTH of the data whose `leaf_hash` values are given."""
    return levels(leaves)[-1][0] if leaves else hashlib.sha256().digest()


def proof(tree: Sequence[Sequence[bytes]], index: int) -> list[bytes]:
    """The inclusion proof of a leaf (RFC 6962, section 2.1.1), of the tree's `levels`."""
    path = []
    for row in tree[:-1]:
        if (sibling := index ^ 1) < len(row):
            path.append(row[sibling])
        index //= 2
    return path


def leads_to(root_hash: bytes, leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bool:
    """Whether the proof shows that ``leaf`` is number ``index`` of the ``size`` leaves under the root.

    RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        return False
    number, last, value = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if number & 1 or number == last:
            value = _node(sibling, value)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            value = _node(value, sibling)
        number, last = number >> 1, last >> 1
    return last == 0 and value == root_hash
