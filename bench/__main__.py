"""`python -m bench quality`, and the other commands; each with `--help`."""

from __future__ import annotations

import argparse

from bench import grid, latency, prune, quality, ratios, serving

COMMANDS = {
    "quality": quality,
    "latency": latency,
    "serving": serving,
    "grid": grid,
    "prune": prune,
    "ratios": ratios,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
