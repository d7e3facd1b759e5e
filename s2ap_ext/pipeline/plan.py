"""Which stages a run has, and which model each leaves."""

from __future__ import annotations

from .sections import Recipe

# Every training stage, in order, and the name of the model that it leaves.
STAGES = {"pretrain": "dense", "prune": "pruned", "finetune": "finetuned"}


def plan(recipe: Recipe) -> tuple[str, ...]:
    """The training stages of a run of ``recipe``: its method may leave some out."""
    stages = recipe.prune.method.make().stages
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"method {recipe.prune.method.name}: expected stages of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return tuple(stage for stage in STAGES if stage in stages)


def stage_before(recipe: Recipe, stage: str) -> str | None:
    """The stage whose model ``stage`` starts from; None if it starts from an untrained one."""
    earlier = [s for s in plan(recipe) if list(STAGES).index(s) < list(STAGES).index(stage)]
    return earlier[-1] if earlier else None


def number_of(stage: str) -> int:
    """A number of the stage's own: the stages draw their random numbers each in its own way."""
    return 1 + list(STAGES).index(stage)
