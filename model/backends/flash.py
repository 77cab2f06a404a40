"""The flash-attn packages: ``flash2`` (flash_attn), ``flash3`` (flash_attn_interface), ``flash4`` (flash_attn.cute).

Their functions for the backward of a block of keys are not public, and arguments change between versions. So a package
counts as available only if it imports and every argument that its functions require is known here.

Each call is one operator (model/backends/operator.py): the packages differ in what torch sees of them, flash4 shows it
nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.backends.interface import Needs, needs_cuda
from model.backends.operator import ATTENTION, key_of


class Generation(NamedTuple):
    """Where a package keeps its functions, and the major compute capabilities that it is built for."""

    package: str
    module: str  # of flash_attn_func
    inner: str  # of the function for the backward
    backward: str
    capabilities: tuple[int, ...]


GENERATIONS = {
    "flash2": Generation(
        "flash_attn", "flash_attn", "flash_attn.flash_attn_interface", "_flash_attn_backward", (8, 9, 10, 12)
    ),
    "flash3": Generation(
        "flash_attn_interface", "flash_attn_interface", "flash_attn_interface", "_flash_attn_backward", (9,)
    ),
    "flash4": Generation("flash_attn.cute", "flash_attn.cute", "flash_attn.cute.interface", "_flash_attn_bwd", (9, 10)),
}
# What a version may insist on of what we do not use: no dropout, mask, window, cap or variable lengths.
UNUSED: dict[str, Any] = {
    "dropout_p": 0.0, "causal": False, "is_causal": False, "window_size": (-1, -1), "window_size_left": -1,
    "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "rng_state": None, "cu_seqlens_q": None,
    "cu_seqlens_k": None, "sequed_q": None, "sequed_k": None, "seqused_q": None, "seqused_k": None,
    "max_seqlen_q": None, "max_seqlen_k": None,
}  # fmt: skip
LSE_FLAGS = ("return_attn_probs", "return_lse")  # one of them asks for the log-sum-exp; flash3 once gave it unasked
LSE_NAMES = ("softmax_lse", "lse")


class _Function(NamedTuple):
    """A package's function; `required`: whether each argument must be given."""

    call: Callable[..., Any]
    required: dict[str, bool]


class FlashPackage:
    """One generation of flash-attn."""

    def __init__(self, name: str, deterministic: bool = False) -> None:
        """`name`: of GENERATIONS; `deterministic`: ask for a backward without atomic additions."""
        self.name = name
        self._generation = GENERATIONS[name]
        self._deterministic = deterministic
        self._key = key_of(self)

    def obstacle(self, needs: Needs) -> str:
        """See Backend."""
        obstacle = needs_cuda(needs, self._generation.capabilities)
        if obstacle:
            return obstacle
        try:
            forward, backward = _load(self._generation)
        except _UnavailableError as error:
            return str(error)
        for function, known, wanted in (
            (forward, {"q", "k", "v"}, {"q", "k", "v"}),
            (backward, {"q", "k", "v", "out", "dout", *LSE_NAMES, "dq", "dk", "dv", "softmax_scale", "deterministic"},
             {"q", "k", "v", "out", "dout"}),
        ):  # fmt: skip
            obstacle = _objection(function, known, wanted | ({"deterministic"} if self._deterministic else set()))
            if obstacle:
                return obstacle
        if not any(name in backward.required for name in LSE_NAMES):
            return f"{_name(backward)} takes no log-sum-exp"
        return ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Backend."""
        out: Tensor = ATTENTION(q, k, v, self._key)[0]
        return out

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        out, lse = ATTENTION(q, k, v, self._key)
        return out.detach(), lse.detach()

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See KernelBackend."""
        forward, _ = _load(self._generation)
        flags = {name: True for name in LSE_FLAGS if name in forward.required}
        found = forward.call(q, k, v, **flags, **self._options(forward))
        lse = found[1] if isinstance(found, tuple | list) and len(found) > 1 else None
        if not isinstance(lse, Tensor) or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
            raise RuntimeError(f"attention backend {self.name} gives no log-sum-exp [B, H, L]; set another backend")
        return found[0].detach(), lse.detach()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Backend."""
        _, backward = _load(self._generation)
        given: dict[str, Any] = {"dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_scale": q.shape[-1] ** -0.5}
        given |= {name: lse.contiguous() for name in LSE_NAMES}
        # Either they are filled, or the function returns its own.
        filled = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
        given |= filled | {name: value for name, value in UNUSED.items() if backward.required.get(name)}
        given = {name: value for name, value in given.items() if name in backward.required}
        found = backward.call(**given, **self._options(backward))
        dq, dk, dv = filled.values() if "dq" in given else found[:3]
        return dq, dk, dv

    def _options(self, function: _Function) -> dict[str, bool]:
        return {"deterministic": self._deterministic} if "deterministic" in function.required else {}


class _UnavailableError(Exception):
    """The package or one of its functions is missing; the message names it."""


@cache
def _load(generation: Generation) -> tuple[_Function, _Function]:
    """flash_attn_func and the backward. Packages fail at import in any way: a missing module, a library that does not
    load, an assertion."""
    functions = []
    for module, name in ((generation.module, "flash_attn_func"), (generation.inner, generation.backward)):
        try:
            function = getattr(import_module(module), name)
            functions.append(_Function(function, _arguments(function)))
        except ModuleNotFoundError as error:
            if error.name and (generation.package == error.name or generation.package.startswith(f"{error.name}.")):
                raise _UnavailableError(f"the package {generation.package} is not installed") from error
            raise _UnavailableError(f"import of {module} fails: {_line(error)}") from error
        except AttributeError as error:
            raise _UnavailableError(f"{module} has no usable {name}: {_line(error)}") from error
        except Exception as error:
            raise _UnavailableError(f"import of {module} fails: {_line(error)}") from error
    return functions[0], functions[1]


def _arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of the arguments, and whether each must be given."""
    schema = getattr(getattr(function, "_opoverload", None), "_schema", None)
    if schema is not None:  # of torch.library.custom_op, whose Python signature says nothing
        return {argument.name: not argument.has_default_value() for argument in schema.arguments}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind in by_name}


def _objection(function: _Function, known: set[str], wanted: set[str]) -> str:
    """Why it cannot be called: an unknown argument that it requires, or a needed one that it lacks."""
    for name, required in function.required.items():
        if required and name not in known | UNUSED.keys():
            return f"{_name(function)} requires an argument {name!r} that is unknown here"
    missing = sorted(wanted - function.required.keys())
    return f"{_name(function)} has no argument {missing[0]!r}" if missing else ""


def _name(function: _Function) -> str:
    return str(getattr(function.call, "__name__", None) or getattr(function.call, "_name", "its function"))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
