"""A contender: one way to compute a case, as a zero-argument call that can be timed and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

DIRECTIONS = {
    "fwd": "forward alone, under no_grad",
    "bwd": "backward alone, the forward done once and kept",
    "both": "forward and backward, every gradient that the problem asks for",
    "call": "forward with gradients on, backward not run (host overhead)",
}


@dataclass(frozen=True)
class Peer:
    """How to get a contender's call, and in what its problem differs from the case's.

    build(operands, backend) -> call; call(*arguments of the op's page) -> out, or a tuple of outs.
    It raises ValueError where the peer cannot express the problem: that becomes its row.
    """

    what: str
    build: Callable[[object, str], Callable]
    change: dict | Callable = field(default_factory=dict)  # fields of the problem, or a function
    differs: str = ""  # what it computes instead, in words: printed beside its time
    threads: int | None = None
    compiled: bool = False
    checked: bool = True  # False: computes nothing that could be checked
    counted: bool = True  # False: it does less than the problem's FLOPs
    note: Callable[[object], str] | None = None  # of its operands: what the row has to add
    expected: Callable | None = None  # (problem, device): what is right, where it is not the page's

    def problem(self, problem):
        """The problem that this peer computes, which is also what it is checked against."""
        if callable(self.change):
            return self.change(problem)
        return problem.but(**self.change) if self.change else problem


@dataclass
class Contender:
    """A peer on one case: `run()` is the timed call, `result()` names what it returned."""

    name: str
    peer: Peer
    operands: object
    run: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[str, ...]

    def result(self) -> dict[str, Tensor]:
        return dict(zip(self.outputs, self.run(), strict=True))


def split_name(name: str) -> tuple[str, str]:
    """("ours", "triton") of "ours:triton"; the backend is "" where none is named."""
    peer, _, backend = name.partition(":")
    return peer, backend


def peer_of(page: ModuleType, name: str) -> Peer:
    """ValueError when the op has no such contender."""
    peer = split_name(name)[0]
    if peer not in page.PEERS:
        raise ValueError(f"{page.__name__.rpartition('.')[2]} has no contender {peer!r}")
    return page.PEERS[peer]


def contender(
    page: ModuleType, name: str, problem, direction: str, backend: str, draw: Callable
) -> Contender:
    """One contender. `draw` turns a problem into operands, and may give several peers the same."""
    own_backend = split_name(name)[1]
    peer = peer_of(page, name)
    operands = draw(peer.problem(problem))
    call = peer.build(operands, own_backend or backend)
    given = page.arguments(operands)
    if direction == "fwd":  # some peers look at requires_grad also under no_grad
        given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    leaves, grads = page.leaves(operands), page.grad_outs(operands)
    wanted = tuple(leaves.values())
    outs = page.OUTPUTS

    def tuple_of(result) -> tuple[Tensor, ...]:
        return result if isinstance(result, tuple) else (result,)

    def forward():
        with torch.no_grad():
            return tuple_of(call(*given))

    def forward_with_gradients_on():
        return tuple_of(call(*given))

    def both():
        results = tuple_of(call(*given))
        found = torch.autograd.grad(results, wanted, grads)
        return *(r.detach() for r in results), *found

    kept: list[tuple[Tensor, ...]] = []

    def backward():
        if not kept:
            kept.append(tuple_of(call(*given)))
        found = torch.autograd.grad(kept[0], wanted, grads, retain_graph=True)
        return *(r.detach() for r in kept[0]), *found

    run, outputs = {
        "fwd": (forward, outs),
        "call": (forward_with_gradients_on, outs),
        "both": (both, (*outs, *leaves)),
        "bwd": (backward, (*outs, *leaves)),
    }[direction]
    return Contender(name, peer, operands, run, outputs)


def captured(one: Contender, warm_up_calls: int = 3) -> Contender:
    """The same contender as a CUDA graph: `run` replays it, its results are the graph's own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up_calls):
            one.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = one.run()

    def replay():
        graph.replay()
        return results

    return Contender(one.name, one.peer, one.operands, replay, one.outputs)


def compiled(build: Callable) -> Callable:
    """torch.compile of a peer, one graph, static shapes."""
    return lambda operands, backend="": torch.compile(
        build(operands, backend), dynamic=False, fullgraph=True
    )


def with_compiled(name: str, what: str, build: Callable, **rest) -> dict[str, Peer]:
    """A peer and torch.compile of it."""
    return {
        name: Peer(what, build, **rest),
        f"{name}_compile": Peer(f"torch.compile of {name}", compiled(build), compiled=True, **rest),
    }
