"""Make and revoke API keys, and read the ledger: `python -m deployments.access create NAME`, each with `--help`.

The commands work on the database that `access.database` of the config names, also while servers run. A revoked key is
refused from the next request on.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from deployments.access.keys import SCOPES, Limits
from deployments.access.settings import AccessSettings
from deployments.access.store import AccessStore, Charge, Key, NameTaken
from deployments.database import OldTables
from stages.yaml_file import ConfigError, read_mapping, validate

_LEDGER = (
    "time", "key", "key_id", "id", "request_id", "state", "asked_images", "images", "megapixels", "evaluations"
)  # fmt: skip
_TIME = "day or time in UTC, as 2026-01-31 or 2026-01-31T12:00"
_TOTALS = ("key", "key_id", "requests", "images", "megapixels", "evaluations")


def main() -> int:
    """Run the command; return the status to exit with."""
    arguments = _parser().parse_args()
    try:
        store = AccessStore(_read_settings(arguments.config).database)
        status: int = arguments.run(store, arguments)
        sys.stdout.flush()
        return status
    except (ConfigError, OldTables, SQLAlchemyError, ImportError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
    except OSError as error:
        if error.filename is None:  # of the output, of which nothing more is to be written at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever reads has read enough
            print(f"{error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.access", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("serve_config.yaml"), help="in Serve's own schema")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    create = commands.add_parser("create", help="make a key and print it, this once")
    create.add_argument("name", type=_name, help="whose key it is, in listings and in the ledger")
    create.add_argument("--scope", action="append", choices=SCOPES, help="what it is for; again for more, all if none")
    create.add_argument("--requests-per-minute", type=_whole, metavar="N")
    create.add_argument("--megapixels-per-minute", type=_positive, metavar="X")
    create.add_argument("--concurrent-images", type=_whole, metavar="N", help="images in the making at once")
    create.set_defaults(run=_create)

    commands.add_parser("list", help="print all keys, without their secrets").set_defaults(run=_list)

    revoke = commands.add_parser("revoke", help="make a key useless")
    revoke.add_argument("name")
    revoke.set_defaults(run=_revoke)

    ledger = commands.add_parser("ledger", help="print what was served to keys, as CSV")
    ledger.add_argument(
        "--since", type=_time, default=0.0, metavar="TIME", help=f"first {_TIME}; the first row if left out"
    )
    ledger.add_argument(
        "--until", type=_time, default=None, metavar="TIME", help=f"end, not included, a {_TIME}; now if left out"
    )
    ledger.add_argument("--totals", action="store_true", help="a row for each key, in place of each request and job")
    ledger.set_defaults(run=_ledger)

    prune = commands.add_parser("prune", help="delete rows of the ledger; print them first, where they are needed")
    prune.add_argument("--until", type=_time, required=True, metavar="TIME", help=f"first row that stays, a {_TIME}")
    prune.set_defaults(run=_prune)
    return parser


def _read_settings(config: Path) -> AccessSettings:
    """Read `access` of the one application that has it; raises ConfigError or OSError."""
    applications = read_mapping(config).get("applications")
    named = [
        (f"{config}: applications.{application.get('name')}.args.access", application["args"]["access"])
        for application in (applications if isinstance(applications, list) else [])
        if isinstance(application, dict)
        and isinstance(application.get("args"), dict)
        and application["args"].get("access")
    ]
    if len(named) != 1:
        raise ConfigError(f"{config}: applications: one must have args.access, which names the database of keys")
    return validate(named[0][0], AccessSettings, named[0][1])


def _create(store: AccessStore, arguments: argparse.Namespace) -> int:
    limits = Limits(arguments.requests_per_minute, arguments.megapixels_per_minute, arguments.concurrent_images)
    try:
        print(store.create(arguments.name, list(dict.fromkeys(arguments.scope or SCOPES)), limits))
    except NameTaken:
        print(f"there is a key {arguments.name!r} already, or was one: names are not used twice", file=sys.stderr)
        return 1
    return 0


def _list(store: AccessStore, arguments: argparse.Namespace) -> int:
    row = "{:<24} {:<14} {:<20} {:>12} {:>14} {:>10}  {:<20} {}".format
    print(row("NAME", "ID", "SCOPES", "REQUESTS/MIN", "MEGAPIXELS/MIN", "CONCURRENT", "CREATED", "REVOKED"))
    for key in store.all_keys():
        limits = (key.requests_per_minute, key.megapixels_per_minute, key.concurrent_images)
        told = ("-" if limit is None else f"{limit:g}" for limit in limits)
        revoked = "" if key.revoked_at is None else _iso(key.revoked_at)
        print(row(key.name, key.id, ",".join(key.scopes), *told, _iso(key.created_at), revoked).rstrip())
    return 0


def _revoke(store: AccessStore, arguments: argparse.Namespace) -> int:
    if not store.revoke(arguments.name):
        print(f"no key {arguments.name!r} is of use", file=sys.stderr)
        return 1
    return 0


def _ledger(store: AccessStore, arguments: argparse.Namespace) -> int:
    now = time.time()
    rows = store.ledger(arguments.since, now if arguments.until is None else arguments.until)
    writer = csv.writer(sys.stdout)
    if arguments.totals:
        writer.writerow(_TOTALS)
        writer.writerows(_totals(rows, store.all_keys()))
    else:
        writer.writerow(_LEDGER)
        writer.writerows(_entry(charge, name, now) for charge, name in rows)
    return 0


def _prune(store: AccessStore, arguments: argparse.Namespace) -> int:
    print(f"rows deleted: {store.prune(arguments.until)}")
    return 0


def _entry(charge: Charge, name: str, now: float) -> tuple[object, ...]:
    if charge.settled_at is None:
        state = "lost" if 0.0 < charge.making_until < now else "open"
    else:
        state = "served" if charge.images else "void"
    served = (charge.images, _megapixels(charge.pixels), f"{charge.evaluations:.12g}")
    told = (_iso(charge.created_at), name, charge.key_id, charge.id, charge.request_id, state, charge.asked_images)
    return (*map(_harmless, told), *served)


def _totals(rows: Iterable[tuple[Charge, str]], keys: Iterable[Key]) -> Iterable[tuple[object, ...]]:
    requests: dict[str, int] = defaultdict(int)
    images: dict[str, int] = defaultdict(int)
    pixels: dict[str, int] = defaultdict(int)
    evaluations: dict[str, float] = defaultdict(float)
    for charge, _ in rows:
        requests[charge.key_id] += 1
        images[charge.key_id] += charge.images
        pixels[charge.key_id] += charge.pixels
        evaluations[charge.key_id] += charge.evaluations
    for key in keys:
        served = (images[key.id], _megapixels(pixels[key.id]), f"{evaluations[key.id]:.12g}")
        yield (_harmless(key.name), key.id, requests[key.id], *served)


def _harmless(value: object) -> object:
    """Keep a spreadsheet from running what a client named its request."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _megapixels(pixels: int) -> str:
    """Write pixels as millions of them, in full."""
    return f"{pixels // 1_000_000}.{pixels % 1_000_000:06}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _name(text: str) -> str:
    name = text.strip()
    if not re.fullmatch(r"\w[\w.@:/ -]{0,63}", name):
        raise argparse.ArgumentTypeError(f"must be at most 64 letters, digits, spaces and .@:/-_, not {text!r}")
    return name


def _time(text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be as 2026-01-31 or 2026-01-31T12:00, not {text!r}") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1e9:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
