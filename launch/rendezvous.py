"""The store in which the ranks of a run meet, on one address only.

torch's own rendezvous handlers open their store on every network interface, where anyone who reaches the port can read
and write it.
"""

from __future__ import annotations

import errno
import socket

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"


def bind(address: str, port: int) -> socket.socket:
    """A listening socket on this address only; on all addresses, if it is not one of this machine's own (NAT)."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port))


def hold_store(listener: socket.socket, address: str) -> TCPStore:
    """The store behind a socket that listens on this address, in this process; it owns the socket from here on."""
    port: int = listener.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
