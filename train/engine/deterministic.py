"""parallel.deterministic: the same step, from the same state in the same layout, gives the same bits on GPUs too.

Otherwise these differ from run to run on a GPU: attention kernels that add up gradients of q in the order in which
thread blocks finish, cuBLAS with several workspaces, cuDNN's choice of algorithms by timing, and index_add_.
"""

from __future__ import annotations

import os

import torch

from core.errors import RunError

WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its results repeat; the first costs 24 MiB and no time


def make_deterministic() -> None:
    """For this process, before it touches a GPU. An operator without a deterministic kernel raises from then on.

    RunError if CUBLAS_WORKSPACE_CONFIG has a value that is not reproducible.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise RunError(
            f"parallel.deterministic=true with CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: cuBLAS is "
            f"reproducible with {' or '.join(WORKSPACES)} only; unset it"
        )
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
