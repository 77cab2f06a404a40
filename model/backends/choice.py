"""Chooses the attention backend of a run, once, before the model is built."""

from __future__ import annotations

from dataclasses import dataclass

from model.backends.flash import GENERATIONS, FlashPackage
from model.backends.interface import Backend, Needs
from model.backends.sdpa import Sdpa

BACKENDS = ("auto", "sdpa", "cudnn", "flash2", "flash3", "flash4")
FASTEST_FIRST = ("flash4", "flash3", "cudnn", "flash2", "sdpa")  # on CUDA; by what their authors report


@dataclass(frozen=True)
class Choice:
    """The chosen backend, and those that "auto" rejected: (name, why)."""

    backend: Backend
    passed_over: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """One line."""
        return "; ".join([self.backend.name, *(f"not {name}: {why}" for name, why in self.passed_over)])


def choose(requested: str, needs: Needs) -> Choice:
    """The requested backend, or for "auto" the first of FASTEST_FIRST that can do what is needed.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot run here; the message says why.
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention backend {requested!r} is not one of {', '.join(BACKENDS)}")
    candidates = (requested,) if requested != "auto" else FASTEST_FIRST if needs.device == "cuda" else ("sdpa",)
    passed_over: list[tuple[str, str]] = []
    for name in candidates:
        backend = make_backend(name, needs.deterministic)
        obstacle = backend.obstacle(needs)
        if not obstacle:
            return Choice(backend, tuple(passed_over))
        passed_over.append((name, obstacle))
    reasons = "; ".join(f"{name} {why}" for name, why in passed_over)
    remedy = (
        "set auto, or another backend" if requested != "auto" else "set compute_dtype=bfloat16, or ring=1 ulysses=1"
    )
    raise RuntimeError(f"attention backend {requested!r} cannot run here: {reasons}; {remedy}")


def make_backend(name: str, deterministic: bool) -> Backend:
    """A backend of BACKENDS other than "auto"."""
    return FlashPackage(name, deterministic) if name in GENERATIONS else Sdpa(name)
