"""The whole job as readable functions: recipes, stages, and the folder of a run."""

from .evaluation import attacked, gradients_checked
from .model_file import check_prunable, load_model, new_model, pick_device, recipe_to_evaluate, start_from
from .plan import STAGES, plan
from .progress import Stopped
from .recipe import load_recipe, override
from .recipe_files import known_recipes
from .run_folder import RunFolder
from .runner import describe_attack, evaluate, open_data, reproducible, run, take_over
from .sections import Recipe
from .stages import finetune, pretrain, prune
from .trainer import Session

__all__ = [
    "STAGES",
    "Recipe",
    "RunFolder",
    "Session",
    "Stopped",
    "attacked",
    "check_prunable",
    "describe_attack",
    "evaluate",
    "finetune",
    "gradients_checked",
    "known_recipes",
    "load_model",
    "load_recipe",
    "new_model",
    "open_data",
    "override",
    "pick_device",
    "plan",
    "pretrain",
    "prune",
    "recipe_to_evaluate",
    "reproducible",
    "run",
    "start_from",
    "take_over",
]
