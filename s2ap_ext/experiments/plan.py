"""Plans: what an experiment compares, as a TOML file that is checked as a whole before any work starts.

A plan names a base recipe, settings that all its runs share, and arms, each with the settings in which it differs::

    name = "finetune"
    question = "Does adversarial weight perturbation help while a found mask is finetuned?"
    recipe = "digits"
    seeds = 5
    baseline = "plain"

    [settings]
    pretrain.loss = "n_fgsm"

    [arms]
    plain = { finetune.awp = false }
    awp = { finetune.awp = true }

    [[across]]
    hydra = { prune.method = "hydra" }
    harp = { prune.method = "harp" }

Each table of ``[[across]]`` repeats all arms at each of its entries: here the arms are hydra-plain, hydra-awp, harp-plain and harp-awp, and
hydra-awp is compared with hydra-plain, harp-awp with harp-plain. Settings are those of recipes, nested as in a recipe or as dotted keys.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..pipeline import STAGES, Recipe, known_recipes, load_recipe, pick_device
from ..pipeline.extras import optional
from ..settings import key, nearest, shown, value_of

NAME = r"\w[\w.+-]{0,39}"  # of plans and arms: they are folders, and parts of the names of recipes
NESTED = ("settings", "arms", "across", "attacked")  # keys of plans that are tables
Settings = dict[str, str]  # recipe keys with dots, and their values as --set takes them


@dataclass(frozen=True)
class Plan:
    """A valid plan.

    Attributes:
        settings: of all runs.
        arms: by name, the settings of each arm, without those of ``across``.
        across: the tables of ``[[across]]``, each with settings by name.
        attacked: by name, further attacks on the last model of each run: settings of ``attack`` and ``evaluate`` for them.
    """

    name: str = key("experiment", "what the experiment is called", pattern=NAME)
    question: str = key("", "what the experiment is to answer, in one sentence")
    recipe: str = key("digits", "the recipe that all runs start from: its name or the path of a TOML file")
    seeds: int = key(5, "each arm is run with the seeds 0 to so many less one", low=1, high=10_000)
    baseline: tuple[str, ...] = key((), "the arms with which all others are compared")
    metric: tuple[str, ...] = key(
        ("robust",), "what is compared: columns of the table, of the last model of each arm or, as pruned.robust, of the named one"
    )
    settings: Settings = field(default_factory=dict)
    arms: dict[str, Settings] = field(default_factory=dict)
    across: tuple[dict[str, Settings], ...] = ()
    attacked: dict[str, Settings] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The names of the places at which all arms are run, one for each combination of the entries of ``across``; ``""`` without."""
        return ["-".join(names) for names in itertools.product(*self.across)]

    def all_arms(self) -> dict[str, Settings]:
        """Every arm at every cell, by full name, with the settings in which it differs from the others."""
        found = {}
        for entries in itertools.product(*(table.items() for table in self.across), self.arms.items()):
            names, settings = zip(*entries, strict=True)
            found["-".join(names)] = {name: text for table in settings for name, text in table.items()}
        return found

    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of full names, ``(arm, against)``: in each cell every arm against each baseline, and no pair twice."""
        pairs: dict[frozenset[str], tuple[str, str]] = {}
        for cell, against, arm in itertools.product(self.cells(), self.baseline, self.arms):
            if arm != against:
                pairs.setdefault(frozenset((f"{cell}-{arm}", f"{cell}-{against}")), (arm_in(cell, arm), arm_in(cell, against)))
        return list(pairs.values())

    def recipe_of(self, arm: str, seed: int = 0) -> Recipe:
        """The recipe of one run.

        Where the plan does not say otherwise it has no control of its own, since the arms are each other's, and on a CPU one thread, since
        runs are made side by side.

        Args:
            arm: a full name, as in :meth:`all_arms`.

        Raises:
            ValueError: as :func:`s2ap_ext.pipeline.load_recipe`, naming the arm.
        """
        changes = {"prune.control": "false"} | self.settings | self.all_arms()[arm] | {"seed": str(seed), "name": f"{self.name}-{arm}"}
        try:
            recipe = load_recipe(self.recipe, [f"{name}={text}" for name, text in changes.items()])
        except ValueError as error:
            raise ValueError(f"plan {self.name}: arm {arm}: {str(error).removeprefix('--set ')}") from None
        if recipe.threads == 0 and pick_device(recipe.device).type == "cpu":
            recipe = replace(recipe, threads=1)
        return recipe

    def runs(self) -> list[tuple[str, int, Recipe]]:
        """All runs, ``(arm, seed, recipe)``, arm by arm; errors as in :meth:`recipe_of`."""
        recipes = {arm: self.recipe_of(arm) for arm in self.all_arms()}
        return [(arm, seed, replace(recipe, seed=seed)) for arm, recipe in recipes.items() for seed in range(self.seeds)]

    def changed(self, overrides: Iterable[str] = (), seeds: int | None = None) -> Plan:
        """The plan with ``"section.key=value"`` added to the settings of all arms, and another number of seeds.

        Raises:
            ValueError: a setting that the arms have each for themselves; a number of seeds out of range.
        """
        added: Settings = {}
        for text in overrides:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set {text:.100}: expected section.key=value")
            added[name.strip()] = value.strip()
        for arm, own in self.all_arms().items():
            if both := added.keys() & own.keys():
                raise ValueError(f"--set {min(both)}: the arm {arm} sets it itself")
        return _checked(replace(self, settings=self.settings | added, seeds=self.seeds if seeds is None else seeds), "--seeds")


def arm_in(cell: str, arm: str) -> str:
    """The full name of ``arm`` in ``cell``."""
    return f"{cell}-{arm}" if cell else arm


def known_plans() -> list[str]:
    """The names of the plans that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in resources.files(__package__).iterdir() if entry.name.endswith(".toml"))


def load_plan(source: str | Path) -> Plan:
    """Reads a plan.

    Args:
        source: the name of a plan of the package (:func:`known_plans`), or the path of a TOML file.

    Raises:
        ValueError: an unknown plan; a file that is not TOML; an unknown key; a value that does not fit; no arms; a baseline that is no arm.
    """
    name = str(source)
    if name in known_plans():
        text, where = (resources.files(__package__) / f"{name}.toml").read_text(encoding="utf-8"), f"plan {name}"
    elif Path(source).is_file():
        text, where = Path(source).read_text(encoding="utf-8", errors="replace"), name
    else:
        known = known_plans()
        raise ValueError(f"plan: expected one of {', '.join(known)} or the path of a TOML file, got {shown(name)}{nearest(name, known)}")
    try:
        table = optional("tomllib", or_else="tomli").loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a TOML file ({error})") from None
    plan = from_table(table, where)
    if plan.recipe not in known_recipes() and Path(source).is_file():
        plan = replace(plan, recipe=str((Path(source).parent / plan.recipe).absolute()))  # relative to the plan, not to where it is run
    return plan


def from_table(table: Mapping[str, Any], where: str = "plan") -> Plan:
    """The plan that parsed TOML describes; errors as in :func:`load_plan`, starting with ``where``."""
    known = [f.name for f in fields(Plan)]
    if unknown := [name for name in table if name not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]}{nearest(unknown[0], known)}; a plan has {', '.join(known)}")
    values = {name: value_of(Plan, name, value, f"{where}: {name}") for name, value in table.items() if name not in NESTED}
    across = table.get("across", [])
    if not isinstance(across, list):
        raise ValueError(f"{where}: across: expected [[across]], a list of tables, got {shown(across)}")
    settings, arms = _flat(table.get("settings", {}), f"{where}: settings"), _named(table.get("arms", {}), f"{where}: arms")
    repeated = tuple(_named(entry, f"{where}: across") for entry in across)
    attacked = _named(table.get("attacked", {}), f"{where}: attacked")
    return _checked(Plan(**values, settings=settings, arms=arms, across=repeated, attacked=attacked), where)


def to_toml(plan: Plan) -> str:
    """The plan as TOML; :func:`from_table` reads it back."""
    table = {f.name: getattr(plan, f.name) for f in fields(plan)}
    table |= {"baseline": list(plan.baseline), "metric": list(plan.metric), "across": list(plan.across)}
    return str(optional("tomli_w").dumps(table))


def _checked(plan: Plan, where: str) -> Plan:
    value_of(Plan, "seeds", plan.seeds, where if where.startswith("--") else f"{where}: seeds")
    if not plan.arms:
        raise ValueError(f"{where}: arms: expected at least one")
    for name in plan.baseline:
        if name not in plan.arms:
            raise ValueError(f"{where}: baseline: expected names of arms, got {shown(name)}{nearest(name, plan.arms)}")
    for name in [*plan.arms, *(name for table in plan.across for name in table)]:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{where}: arms: expected names that match {NAME}, got {shown(name)}")
    if unfit := [name for name in plan.attacked if "." in name or not re.fullmatch(NAME, name) or name in STAGES.values()]:
        raise ValueError(f"{where}: attacked: expected names that match {NAME}, without a dot and none of a model, got {shown(unfit[0])}")
    if not all(plan.across):
        raise ValueError(f"{where}: across: expected tables with at least one entry")
    count = len(plan.arms)
    for table in plan.across:
        count *= len(table)
    if len(plan.all_arms()) < count:
        raise ValueError(f"{where}: arms: two of them have the same name once those of across are put before them")
    return plan


def _named(table: Any, where: str) -> dict[str, Settings]:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table, got {shown(table)}")
    return {name: _flat(settings, f"{where}.{name}") for name, settings in table.items()}


def _flat(table: Any, where: str, prefix: str = "") -> Settings:
    """Nested tables as one, with dotted keys and the values as ``--set`` takes them."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table of settings, got {shown(table)}")
    found: Settings = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, where, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found[f"{prefix}{name}"] = str(value).lower()
        elif isinstance(value, list):
            found[f"{prefix}{name}"] = ",".join(map(str, value))
        else:
            found[f"{prefix}{name}"] = str(value)
    if owned := found.keys() & {"seed", "name"}:
        raise ValueError(f"{where}: {min(owned)}: the experiment gives each run its own")
    return found
