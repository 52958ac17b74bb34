"""Render a config of Serve and the pools that it is placed on as manifests.

`python -m cluster render kuberay | kubectl apply --filename -`
`python -m cluster render ray-up --provider type=aws region=eu-west-1 > cluster.yaml`
`python -m cluster render containers --output containers`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from cluster.manifests import containers, kuberay, ray_up
from cluster.manifests.layout import Layout
from deployments.check import StartError, read_config
from stages.yaml_file import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("target", choices=("kuberay", "ray-up", "containers"))
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="in Serve's own schema")
    parser.add_argument("--name", default="images", help="name of the service or cluster")
    parser.add_argument(
        "--provider",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="cloud provider of ray-up, as its own documentation has it; type=... at least",
    )
    parser.add_argument("--output", type=Path, default=Path("containers"), help="directory for container files")


def run(arguments: argparse.Namespace) -> None:
    """Print a manifest, or write container files and print their paths.

    Raises:
        ConfigError: the config or its pools are wrong, or say too little; the error names the file and the key.
    """
    try:
        layout = Layout.of(read_config(arguments.config))
    except StartError as error:
        raise ConfigError(str(error)) from error
    if arguments.target == "containers":
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name, content in containers.render(layout).items():
            (arguments.output / name).write_text(content)
            print(arguments.output / name)
        return
    if arguments.target == "kuberay":
        manifest = kuberay.render(layout, arguments.name)
    else:
        provider = dict(entry.partition("=")[::2] for entry in arguments.provider)
        if not provider.get("type"):
            raise ConfigError("--provider: must name the cloud provider, as type=aws region=eu-west-1")
        manifest = ray_up.render(layout, arguments.name, provider)
    print(yaml.dump(manifest, Dumper=_Dumper, sort_keys=False), end="")


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which keeps the lines of texts that have several."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
