"""The paper's Tables 1-7 and Figures 5 and 6 on one's own data (without data.root: the synthetic shop), beside the paper's numbers.

    python jobs/reproduce.py --tables 2,3,5 --figures 6 --seeds 3 --config movietweetings data.root=/path/to/folder
    python jobs/reproduce.py --tables 3 --figures 5 --vision resnet50=/models/resnet50 --config tiny

Every experiment is the scenario with a few settings changed, run by the same code as the other jobs, in a folder below
<run.root>/reproduce. What is there is reused, an interrupted command goes on, and each line says how long is left. Ends with
tables.md, tables.html (plots) and tables.json in that folder. Choose recipes on validation, not on these test figures.
"""

from mim_ray.pipeline.reproduce.cli import main

if __name__ == "__main__":
    main(__doc__)
