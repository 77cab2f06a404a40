"""A rendezvous of one machine whose store listens on the loopback address only.

torch's own rendezvous handlers open their store on every network interface, where anyone who reaches the port can read
and write it.
"""

from __future__ import annotations

import errno
import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"


def bind(address: str, port: int) -> socket.socket:
    """A listening socket on this address only; on all addresses, if it is not one of this machine's own (NAT)."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port))


class LoopbackRendezvous(RendezvousHandler):
    """Holds the store in which the workers of one launch meet, on a free port of 127.0.0.1."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.create_server((LOOPBACK, 0))
        self.port: int = listener.getsockname()[1]
        # The store owns the socket from here on.
        self._store = TCPStore(
            LOOPBACK, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def get_backend(self) -> str:
        """Its name in torch's records."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """Workers join this store instead of opening one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """This machine is the only node."""
        store = PrefixStore("launch", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.port))

    def is_closed(self) -> bool:
        """Never: it lives as long as the launcher."""
        return False

    def set_closed(self) -> None:
        """Nothing to tell: no other node waits."""

    def num_nodes_waiting(self) -> int:
        """No other node can join."""
        return 0

    def get_run_id(self) -> str:
        """The run's id."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store goes with the process."""
        return True
