"""`python -m cluster check`, and the other commands; each with `--help`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from stages.yaml_file import ConfigError

COMMANDS = ("check", "local", "plan", "render")


def main() -> int:
    """Run the command; return the status to exit with."""
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(sys.argv[1:2]).command
    module = import_module(f"cluster.{name}")  # alone: what the others need may not be installed
    command = argparse.ArgumentParser(
        prog=f"python -m cluster {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    try:
        return module.run(command.parse_args(sys.argv[2:])) or 0
    except ConfigError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
