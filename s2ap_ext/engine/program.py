"""From steps for single operations to a program: fused, laid out in slots, with what is needed when, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .arena import Arena
from .builder import Lowered
from .run import Run, Slot, Target
from .steps import Add, Affine, Conv, DenseConv, FromBlocks, Recorded, Relu, SparseConv, Step, ToBlocks, Weighted, WithRelu, weights_of
from .weights import PartSource, Source


@dataclass(frozen=True)
class Program:
    """Steps over slots. Slot 0 is the input, images; the output is no blocks.

    Attributes:
        halo: of all blocks.
        ends: the slots that nobody reads after each step.
        kept: the slots that the gradient reads.
        targets: for each step, where its part of the gradient goes; one for each of its sources.
    """

    steps: tuple[Step, ...]
    slots: tuple[Slot, ...]
    output: int
    halo: int
    ends: tuple[tuple[int, ...], ...]
    kept: frozenset[int]
    targets: tuple[tuple[Target, ...], ...]

    @classmethod
    def of(cls, steps: Sequence[Step], slots: Sequence[Slot], output: int) -> Program:
        """The program of these steps; everything else follows from them."""
        steps, slots = tuple(steps), tuple(slots)
        last = {slot: i for i, step in enumerate(steps) for slot in (step.out, *step.sources)}
        ends = tuple(tuple(s for s in sorted({step.out, *step.sources} - {0, output}) if last[s] == i) for i, step in enumerate(steps))
        relus = {step.out for step in steps if step.gates}
        kept = frozenset(relus | {slot for step in steps for slot in step.saves})
        halo = max((step.halo for step in steps if isinstance(step, SparseConv)), default=0)
        return cls(steps, slots, output, halo if _any_blocks(slots) else 0, ends, kept, _targets(steps, relus))

    def run(self, run: Run, x: Tensor) -> Tensor:
        """The output for images ``x``, a buffer of the arena. With ``run.graphs`` what the gradient needs is kept."""
        run.values[0] = x
        for step, ends in zip(self.steps, self.ends, strict=True):
            step.run(run)
            for slot in ends:
                if run.graphs is None or slot not in self.kept:
                    run.drop(slot)
        return run.values[self.output]

    def backward(self, run: Run, grad: Tensor) -> Tensor:
        """The gradient with respect to the input, a buffer of the arena, from that with respect to the output. Nothing is kept after it."""
        whole = Target(self.output, adds=False, gated=any(step.gates and step.out == self.output for step in self.steps))
        run.contribute(whole, run.take(self.output).copy_(grad))
        for step, targets in zip(reversed(self.steps), reversed(self.targets), strict=True):
            arrived = run.grads.pop(step.out)
            step.backward(run, arrived, targets)
            run.arena.drop(arrived)
            if step.out in self.kept:  # no earlier step reads it, and gradients take its place in the cache
                run.drop(step.out)
        return run.grads.pop(0)

    def start(self, weights: Sequence[Any], arena: Arena, n: int, lanes: int) -> Run:
        return Run(self.slots, weights, arena, n, lanes, self.halo)


def _any_blocks(slots: Sequence[Slot]) -> bool:
    return any(slot.blocked for slot in slots)


def _targets(steps: Sequence[Step], relus: set[int]) -> tuple[tuple[Target, ...], ...]:
    """Backward goes through the steps, and each step's sources, from the last to the first."""
    left = Counter(source for step in steps for source in step.sources)
    seen: set[int] = set()
    targets: list[tuple[Target, ...]] = []
    for step in reversed(steps):
        own: list[Target] = []
        for source in reversed(step.sources):
            left[source] -= 1
            own.insert(0, Target(source, source in seen, gated=not left[source] and source in relus))
            seen.add(source)
        targets.insert(0, tuple(own))
    return tuple(targets)


# ---- Fusion


def fuse(lowered: Lowered) -> tuple[list[Step], list[Source | PartSource]]:
    """The steps that the output needs, BatchNorm, sums and ReLUs taken into the steps before them; and where their weights come from."""
    steps, sources = _needed(lowered.steps, lowered.output), list(lowered.sources)
    uses = Counter(source for step in steps for source in step.sources)
    uses[lowered.output] += 1
    done: dict[int, Step] = {}  # by the value they write, in order

    def before(value: int) -> WithRelu | None:
        """The step that wrote a value that only the present step reads, if it takes a ReLU and has none yet."""
        step = done.get(value)
        return step if isinstance(step, WithRelu) and uses[value] == 1 and not step.relu else None

    def put(step: Step, instead: Step | None = None, *, here: bool = False) -> None:
        """Adds a step: in the place of another, or at the end (``here``) where it needs what was made since."""
        if instead is not None and not here:
            items = [(step.out, step) if s is instead else (v, s) for v, s in done.items()]
            done.clear()
            done.update(items)
            return
        if instead is not None:
            del done[instead.out]
        done[step.out] = step

    first: WithRelu | None
    for step in steps:
        if isinstance(step, Affine) and isinstance(first := before(step.sources[0]), Weighted) and len(first.sources) == 1:
            source, norm = sources[first.weights], sources[step.weights]
            assert isinstance(source, Source)
            assert isinstance(norm, Source)
            sources.append(source.followed_by(norm))
            put(replace(first, out=step.out, weights=len(sources) - 1), instead=first)
        elif isinstance(step, Relu) and (first := before(step.sources[0])):
            put(replace(first, out=step.out, relu=True), instead=first)
        elif isinstance(step, Add) and (first := _summand(step, before, list(done))):
            other = step.sources[1] if step.sources[0] == first.out else step.sources[0]
            put(replace(first, sources=(*first.sources, other), out=step.out), instead=first, here=True)
        else:
            put(step)
    used = sorted({weights for step in done.values() if (weights := weights_of(step)) is not None})
    steps = [_with_weights(step, used.index) for step in done.values()]
    return steps, [sources[i] for i in used]


def joined(
    sources: Sequence[Source | PartSource], steps: Sequence[Step], own: Sequence[Source | PartSource]
) -> tuple[list[Step], list[Source | PartSource]]:
    """``steps`` with weights from ``sources`` and after them, instead of from their ``own``; and all these sources."""
    sources = list(sources)
    at = []
    for source in own:
        if source not in sources:
            sources.append(source)
        at.append(sources.index(source))
    return [_with_weights(step, at.__getitem__) for step in steps], sources


def _with_weights(step: Step, number: Callable[[int], int]) -> Step:
    """The step with other numbers for its weights, if it has any."""
    weights = weights_of(step)
    changes: dict[str, Any] = {} if weights is None else {"weights": number(weights)}
    return replace(step, **changes)


def _summand(add: Add, before: Callable[[int], WithRelu | None], order: list[int]) -> Conv | None:
    """Of the convolutions that a sum could be taken into, a sparse one before a dense one, and the later one."""
    convs = [conv for value in add.sources if isinstance(conv := before(value), Conv) and len(conv.sources) == 1]
    return max(convs, key=lambda conv: (isinstance(conv, SparseConv), order.index(conv.out)), default=None)


def _needed(steps: Sequence[Step], output: int) -> list[Step]:
    needed, kept = {output}, []
    for step in reversed(steps):
        if step.out in needed:
            needed.update(step.sources)
            kept.append(step)
    return kept[::-1]


# ---- Layout


def lay_out(steps: Sequence[Step], shapes: Sequence[tuple[int, ...]], output: int, *, blocks: bool) -> Program:
    """The program of steps over values. With ``blocks`` sparse convolutions and what is between them run on blocks."""
    slots: list[Slot] = [Slot(shapes[0], False)]
    at: dict[tuple[int, bool], int] = {(0, False): 0}  # the slot of a value, in blocks or not
    placed: list[Step] = []

    def new(value: int, blocked: bool) -> int:
        slots.append(Slot(shapes[value], blocked))
        at[value, blocked] = len(slots) - 1
        return len(slots) - 1

    def place(value: int, blocked: bool) -> int:
        if (value, blocked) not in at:
            source = at[value, not blocked]
            placed.append((ToBlocks if blocked else FromBlocks)((source,), new(value, blocked)))
        return at[value, blocked]

    for step in steps:
        image_in, image_out = (len(shapes[value]) == 3 for value in (step.sources[0], step.out))
        if isinstance(step, SparseConv):
            blocked = blocks
        elif isinstance(step, (DenseConv, Recorded)) or not image_in:
            blocked = False
        else:  # as what it reads
            blocked = any((value, True) in at for value in step.sources)
        sources = tuple(place(value, blocked) for value in step.sources)
        placed.append(replace(step, sources=sources, out=new(step.out, blocked and image_out)))
    return Program.of(placed, slots, place(output, False))


def describe(program: Program, sources: Sequence[Source | PartSource]) -> Iterator[str]:
    """A line for each step, to be read by people."""
    for step in program.steps:
        names = ", ".join(str(s) for s in step.sources)
        weights = getattr(step, "weights", None)
        source = sources[weights] if weights is not None else None
        layer = f" {source.layer}" if isinstance(source, Source) and source.layer else ""
        relu = ", relu" if getattr(step, "relu", False) else ""
        yield f"{step.out} = {type(step).__name__}({names}){layer}{relu}"
