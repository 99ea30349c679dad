"""On `PYTHONPATH` of a server: once the file named by VLCACHE_TEST_FULL exists, its output has no room left.

Every process of the server imports this at its start; from the switch on, each write to standard output and error fails
as on a full disk.
"""

import os
import threading
import time


def watch(switch: str) -> None:
    while not os.path.exists(switch):
        time.sleep(0.05)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


if "VLCACHE_TEST_FULL" in os.environ:
    threading.Thread(target=watch, args=(os.environ["VLCACHE_TEST_FULL"],), daemon=True).start()
