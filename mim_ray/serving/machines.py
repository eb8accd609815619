"""The current release on the parameter machines: ID tables and networks beside the MM embeddings (paper Section 3.5, CMD).

    machines = load_current(scenario)      # starts the machines of scenario.machines.state, or switches those that run

Rankers with the same machines.state follow what the machines hold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mim_ray import artifacts
from mim_ray.ciubm.export import load_ranker
from mim_ray.ciubm.machine_export import NEWER_TABLE, networks_of, write_for_machines, write_newer_categories
from mim_ray.config import Scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.representation_center.machine_release import MachineRelease
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.release import read_release
from mim_ray.representation_center.snapshot_line import newer_state
from mim_ray.serving.loaded import newer_categories
from mim_ray.serving.served import Served


def current_release(scenario: Scenario) -> MachineRelease:
    """The release that was promoted last, as machines hold it: on the newest state of its line of snapshots, which has the same
    rows, so that they hold no more in memory than what came since. The model is opened and tried once, so that what rankers
    would refuse never gets to the machines.

    Raises:
        ArtifactError: nothing was promoted, or something is missing or damaged. VersionMismatchError: versions differ.
    """
    served = Served.of(scenario)
    release = read_release(served.center)
    if release is None or release.number != served.release:
        raise ArtifactError(f"{served.center} has no release yet. Promote one first: jobs/promote.py … promote.")
    model = load_ranker(served.ctr, encoder_version=release.encoder_version)
    if not np.isfinite(model.predict(model.request("", ["", ""], ["", "a", "b"]).batch())).all():
        raise ArtifactError(f"{served.ctr} gives probabilities that are no numbers. Train it again.")
    state = artifacts.fingerprint([artifacts.source_fingerprint(uri) for uri in networks_of(served.ctr).values()])
    tables, dense = write_for_machines(served.ctr, f"{served.ctr}/machines/{state}")
    newer = newer_categories(served, model)
    tables[NEWER_TABLE] = write_newer_categories(f"{served.ctr}/machines/{NEWER_TABLE}", newer, model.items.categories)
    release = replace(release, snapshot=newer_state(release.snapshot) or release.snapshot)
    return MachineRelease.of(served.center, release, id_tables=tables, dense=dense)


def load_current(scenario: Scenario) -> ParameterMachines:
    """Start the machines with the current release, or switch those that run to it. Lookups go on meanwhile.

    Raises:
        ConfigError: machines.state is not set, or the machines that run have another shape.
        ArtifactError: as of `current_release`, or a machine cannot open it; the machines stay as they were.
    """
    state = scenario.machines.state
    if state is None:
        raise ConfigError("machines.state is not set. Give the URI of a small file that every node reaches.")
    return ParameterMachines.start(state, current_release(scenario), scenario.machines)
