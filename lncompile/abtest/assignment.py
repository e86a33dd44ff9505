"""Which arm a request goes to: by a coin, or by a hash of a key."""

from __future__ import annotations

import hashlib
import random

Key = str | int | bytes


def share_of(key: Key, salt: str) -> float:
    """A number in [0, 1) that depends on the key alone: the same in every process and on every machine.

    Args:
        key: a user, a session, a tenant.
        salt: tells one experiment from another, so that the same users do not share an arm in each.

    Raises:
        TypeError: for a key whose bytes would differ from process to process.
    """
    if not isinstance(key, (str, int, bytes)):
        raise TypeError(f"ab_key takes a str, an int or bytes, not {type(key).__name__}: pass str(key)")
    data = key if isinstance(key, bytes) else f"{type(key).__name__}:{key}".encode()
    digest = hashlib.blake2b(data, digest_size=8, key=hashlib.blake2b(salt.encode()).digest()).digest()
    # 53 bits, what a float in [0, 1) can hold.
    return float((int.from_bytes(digest, "big") >> 11) / 2**53)


class Assignment:
    """Chooses the candidate for a share of requests. Not thread-safe: call it under a lock.

    Args:
        ratio: the candidate's share.
        seed: of the coin, and of the hash that makes keys sticky.
    """

    def __init__(self, ratio: float, seed: str) -> None:
        self.ratio = ratio
        self._salt = seed
        self._coin = random.Random(seed)

    def is_candidate(self, key: Key | None) -> bool:
        """Whether the next request goes to the candidate; requests with one key always go the same way."""
        share = self._coin.random() if key is None else share_of(key, self._salt)
        return share < self.ratio

    def sampled(self, share: float) -> bool:
        """Throw a coin that falls on True in a share of cases."""
        return share > 0.0 and self._coin.random() < share
