"""Recipes: a merge of checkpoints in one YAML file, read, checked and forecast. Imports no torch.

``read_recipe`` takes nlm's own form (:mod:`nlm.recipe.read`) and mergekit's
(:mod:`nlm.recipe.mergekit`); ``check`` finds what is wrong with the files before any work, and
``forecast`` says what the work will be.
"""

from nlm.recipe.check import check
from nlm.recipe.forecast import Forecast, forecast
from nlm.recipe.opened import Opened, open_all
from nlm.recipe.rates import Rates, available_memory, measure_rates
from nlm.recipe.read import read_recipe
from nlm.recipe.recipe import Alignment, Correction, Expert, Output, Recipe, RecipeError
from nlm.recipe.values import Rule, Values

__all__ = [
    "Alignment",
    "Correction",
    "Expert",
    "Forecast",
    "Opened",
    "Output",
    "Rates",
    "Recipe",
    "RecipeError",
    "Rule",
    "Values",
    "available_memory",
    "check",
    "forecast",
    "measure_rates",
    "open_all",
    "read_recipe",
]
