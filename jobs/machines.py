"""Parameter machines (paper Section 3.5, CMD): start them with the current release, switch them to it, or stop them.

    python jobs/machines.py --config tiny machines.state=/shared/machines.json           # start, or switch
    python jobs/machines.py --config tiny machines.state=/shared/machines.json --stop

They live in the Ray cluster that is running (RAY_ADDRESS, or a submitted job) and outlive this command. Lookups go on while they
are switched. Rankers and the new-item encoder use them where the same machines.state is set. Run it after each promotion, and after
jobs/refresh.py has built a newer snapshot: the machines then hold no more in memory than what came since.
"""

from mim_ray.pipeline.machines import main

if __name__ == "__main__":
    main(__doc__)
