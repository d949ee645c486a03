"""How fast products are, beside torch and other libraries, and what share of the machine's limits.

Calls of all layers take turns, A B A B; copies of a weight exceed the cache, codes are random.
"""

from .contenders import cache_bytes, copies_for, random_packed
from .measure import Failed, How, Result, bench, check_device
from .peers import PEERS, Peer
from .timing import Timing, host_seconds, interleaved

__all__ = [
    "PEERS", "Failed", "How", "Peer", "Result", "Timing", "bench", "cache_bytes", "check_device",
    "copies_for", "host_seconds", "interleaved", "random_packed",
]  # fmt: skip
