"""Both apps on 127.0.0.1 for what a finished run left, until Ctrl-C; prints three requests to try.

    python jobs/serve_run.py
    python jobs/serve_run.py run.root=/data/runs/shop serving.port=8001

`make serve` after `make demo` calls this. For deployments there is serve/app.yaml.
"""

import sys

from mim_ray.pipeline.cli import serve_main

if __name__ == "__main__":
    serve_main(__doc__, ["run.root=runs/demo", *sys.argv[1:]])
