"""Scenarios: what can be set (scenario.py), and how it is read (load.py)."""

from mim_ray.config.load import load_scenario, scenario_from_cli, scenario_names
from mim_ray.config.scenario import Scenario

__all__ = ["Scenario", "load_scenario", "scenario_from_cli", "scenario_names"]
