"""Run one of the benchmarks, such as `python -m bench quality`; `python -m bench NAME --help` explains each."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from stages.yaml_file import ConfigError

# The package of each command's module, which has the command's name.
COMMANDS = {
    "quality": "bench.quality",
    "evaluate": "bench.quality",
    "grid": "bench.quality",
    "serving": "bench.serving",
    "handover": "bench.serving",
    "pools": "bench.serving",
    "trace": "bench.serving",
    "chaos": "bench.faults",
    "overload": "bench.faults",
    "rollout": "bench.faults",
    "soak": "bench.faults",
    "fuzz": "bench.faults",
    "latency": "bench.model",
    "prune": "bench.model",
    "ratios": "bench.model",
    "cases": "scenes",
    "embedding": "scenes",
}


def main() -> None:
    """Run the command that the command line names; a ConfigError becomes the exit message."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(sys.argv[1:2]).command
    # Only this module is imported, because others may need extras that are not installed.
    module = import_module(f"{COMMANDS[name]}.{name}")
    command = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    try:
        module.run(command.parse_args(sys.argv[2:]))
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
