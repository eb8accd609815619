"""The whole chain on a synthetic shop, on one machine: from a catalogue and raw events to a ranked HTTP answer.

    python jobs/demo.py
    python jobs/demo.py synthetic.num_items=10000 run.root=/tmp/larger

`make demo` installs what it needs and calls this. Leaves runs/demo/report.html and report.json.
"""

import sys

from mim_ray.pipeline.cli import run_all_main

if __name__ == "__main__":
    run_all_main(__doc__, ["run.root=runs/demo", *sys.argv[1:]])
