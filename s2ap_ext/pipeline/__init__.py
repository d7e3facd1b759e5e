"""The whole job as readable functions: recipes, stages, and the folder of a run."""

from .recipe import Recipe, known_recipes, load_recipe
from .run_folder import RunFolder
from .stages import STAGES, Session, Stopped, evaluate, finetune, load_model, new_model, open_data, pretrain, prune, run

__all__ = [
    "STAGES",
    "Recipe",
    "RunFolder",
    "Session",
    "Stopped",
    "evaluate",
    "finetune",
    "known_recipes",
    "load_model",
    "load_recipe",
    "new_model",
    "open_data",
    "pretrain",
    "prune",
    "run",
]
