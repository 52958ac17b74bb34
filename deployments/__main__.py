"""Check a config, serve it, say when it is ready, and stop when asked to: `python -m deployments serve_config.yaml`.

Ends with status 1 and one sentence if the server cannot start. SIGTERM and Ctrl-C refuse what comes, answer what is in
flight for at most the ingress' `graceful_shutdown_timeout_s`, and end with status 0; a second one waits no longer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deployments import PROXY_CALLBACK

# Ray and Serve read these when they are imported, here and in every process that they start.
ENVIRONMENT = {
    **PROXY_CALLBACK,
    "RAY_SERVE_LOG_TO_STDERR": "0",  # into files alone, which the dashboard shows; see `deployments.console`
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # lines of the console name the deployment, and may be JSON
}


def main() -> int:
    """Run the command; return the status to exit with."""
    parser = argparse.ArgumentParser(prog="python -m deployments", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="in Serve's own schema")
    parser.add_argument("--check", action="store_true", help="check the config and what it names, and start nothing")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)

    from deployments.check import StartError, check

    try:
        config = check(arguments.config)
        if not arguments.check:
            from deployments.launch import Server

            Server(config).run()
        else:
            print(f"{arguments.config}: nothing is wrong")
    except StartError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
