"""Exchanges of Ulysses: what arrives where, gradients that few need, and what is computed while tensors travel."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.backends.sdpa import Sdpa
from tests.distributed import run_cases
from train.parallel.sequence import ulysses
from train.parallel.sequence.cores import SequenceGroup, TokenShard, VideoCore
from train.parallel.sequence.ulysses import receive_heads, send_heads, tokens_for_heads, travelling

TOKENS, HEADS, WIDTH = [3, 2], [2, 1], 4  # of the two ranks
NEEDED = ["qkv", "k", "q", "v", "qv"]


def part(whole: Tensor, sizes: list[int], dim: int) -> Tensor:
    return whole.split(sizes, dim)[dist.get_rank()]


def exchanged(clips: int, needed: str) -> list[tuple[Tensor | None, Tensor | None]]:
    """Of q, k, v: (what is here, what belongs here), the same of their gradients, and of the way back."""
    g = torch.Generator().manual_seed(0)
    shape = (clips, sum(TOKENS), sum(HEADS), WIDTH)
    whole = {name: torch.randn(shape, generator=g) for name in "qkv"}
    slopes = {name: torch.randn(shape, generator=g) for name in "qkv"}
    mine = {name: part(x, TOKENS, 1).clone().requires_grad_(name in needed) for name, x in whole.items()}
    where = TOKENS, HEADS, dist.get_rank(), dist.group.WORLD.group_name
    v = send_heads(mine["v"], *where)
    q = send_heads(mine["q"], *where, v)
    found = dict(zip("qkv", receive_heads(q, mine["k"], v, *where), strict=True))
    torch.autograd.backward([*found.values()], [part(slopes[name], HEADS, 2).contiguous() for name in found])
    assert not travelling()
    results: list[tuple[Tensor | None, Tensor | None]] = []
    for name in "qkv":
        results.append((found[name].detach(), part(whole[name], HEADS, 2)))
        results.append((mine[name].grad, part(slopes[name], TOKENS, 1) if name in needed else None))
    results.append((tokens_for_heads(found["k"].detach(), *where), mine["k"].detach()))
    return results


def under_way() -> dict[str, int]:
    """Tensors that travel when each projection of an attention begins, and when its backward does."""
    everyone = dist.group.WORLD
    shard = TokenShard(SequenceGroup(everyone, everyone, everyone, ulysses=2, ring=1))
    mine = shard(sum(TOKENS))
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3, eps=1e-6)
    attention.core = VideoCore(shard, Sdpa())
    seen: dict[str, int] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, given: Any) -> None:
            seen[name] = len(ulysses._travelling)

        return note

    for name in "qkvo":
        linear = getattr(attention, name)
        linear.register_forward_pre_hook(noting(name))
        linear.register_full_backward_pre_hook(noting(f"backward of {name}"))
    x = torch.randn(1, sum(TOKENS), 12)[:, mine].requires_grad_()
    attention(x, x).sum().backward()
    return seen


def gradients_sent(is_compiled: bool) -> bool:
    """Whether what is being sent is memory of the gradients that were given, of one clip."""
    g = [torch.zeros(1, sum(TOKENS), HEADS[dist.get_rank()], WIDTH) for _ in range(3)]
    where = TOKENS, HEADS, dist.get_rank()
    q, _, v = ulysses.SEND_TOKENS(*g, *where, dist.group.WORLD.group_name, False, is_compiled, True, True)
    given = {x.data_ptr() for x in g}
    shared = any(one.sent.data_ptr() in given for one in ulysses._travelling.values())
    for ticket in (q, v):
        ulysses.RECEIVE_TOKENS(ticket, 1, WIDTH, *where, False)
    return shared


def graphs(heads: list[int]) -> dict[str, Any]:
    """Of a compiled attention that is computed again in backward: tensors that RECEIVE_HEADS holds; whether gradients
    of the answers leave after answers that were computed again."""
    found: dict[str, Any] = {}
    where = [2, 2], heads, dist.get_rank(), dist.group.WORLD.group_name

    def compiler(kind: str) -> Any:
        def look(module: torch.fx.GraphModule, _: Any) -> Any:
            for node in module.graph.nodes:
                if node.target == ulysses.RECEIVE_HEADS:
                    found[f"held in {kind}"] = len(node.args[3])
                if node.target == ulysses.HEADS_FOR_TOKENS:
                    after = node.args[1]
                    while after.target == torch.ops.aten.detach.default:
                        after = after.args[0]
                    found["after"] = after.target == ulysses.TOKENS_FOR_HEADS
            return make_boxed_func(module.forward)

        return look

    def attend(x: Tensor) -> Tensor:
        v = send_heads(x * 2, *where)
        q = send_heads(x * 3, *where, v)
        q, k, v = receive_heads(q, x, v, *where)
        return tokens_for_heads(q * k * v, *where)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    x = torch.ones(1, 2, sum(heads), WIDTH, requires_grad=True)
    torch.compile(lambda x: checkpoint(attend, x, use_reentrant=False), backend=backend, fullgraph=True)(
        x
    ).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 18))  # of 6 x^3
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    cases: dict[str, Any] = {f"{n} {needed}": (exchanged, (n, needed)) for n in (1, 2) for needed in NEEDED}
    cases |= {f"compiled {is_compiled}": (gradients_sent, (is_compiled,)) for is_compiled in (True, False)}
    cases |= {f"heads {heads}": (graphs, (heads,)) for heads in ([2, 1], [2, 2])}
    return run_cases(2, cases | {"under way": (under_way, ())})


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("clips", [1, 2])
def test_every_rank_has_its_heads_and_gradients_come_home(found: dict[str, Any], clips: int, needed: str) -> None:
    for rank in found[f"{clips} {needed}"]:
        for here, expected in rank:
            assert (here is None) == (expected is None)
            assert here is None or torch.equal(here, expected)


def test_v_and_q_travel_while_what_follows_is_projected(found: dict[str, Any]) -> None:
    forward = {"v": 0, "q": 1, "k": 2, "o": 0}
    backward = {"backward of o": 0, "backward of k": 2, "backward of q": 1, "backward of v": 0}
    assert found["under way"] == [forward | backward] * 2


def test_a_compiled_block_may_use_the_memory_of_gradients_at_once(found: dict[str, Any]) -> None:
    assert found["compiled True"] == [False, False]
    assert found["compiled False"] == [True, True]  # no copy


@pytest.mark.parametrize("heads", [[2, 1], [2, 2]])
def test_graphs_hold_what_is_sent_and_send_in_one_order(found: dict[str, Any], heads: list[int]) -> None:
    """Also where backward computes and sends again, which no data would put before the gradients of the answers."""
    assert found[f"heads {heads}"] == [{"held in forward": 2, "held in backward": 2, "after": True}] * 2
