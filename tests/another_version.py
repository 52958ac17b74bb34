"""What another version of the project sends and reads: `python tests/another_version.py DIRECTORY FIELDS`.

PYTHONPATH begins with that version. FIELDS is JSON of fields that only it has. It writes a call, a reply and a packet
to the directory, once as `plain` and once with those fields as `used`, and reads those that it finds there as `ours`:
it writes them anew as `again`, or to `refused.txt` why it cannot.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_messages import CALL
from test_packet import make_packet

from deployments.messages import Call, PacketReply, read_reply
from stages.packet import LatentPacket
from stages.wire import OtherVersion


def write(directory: Path, name: str, call: Call, reply: PacketReply, packet: LatentPacket) -> None:
    """Write what travels between deployments."""
    (directory / f"{name}.call").write_text(call.to_json())
    (directory / f"{name}.reply").write_text(reply.to_json())
    (directory / f"{name}.packet").write_bytes(packet.to_bytes())


def main() -> None:
    """Run the program."""
    directory, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    write(directory, "plain", CALL, PacketReply(), make_packet())
    hop: Any = CALL.hop.model_copy(update=fields)
    packet: Any = replace(make_packet(), **fields)
    write(directory, "used", CALL.model_copy(update={"hop": hop}), PacketReply().model_copy(update=fields), packet)
    refused = []
    for reader, name in ((Call.from_json, "ours.call"), (read_reply, "ours.reply")):
        try:
            (directory / name.replace("ours", "again")).write_text(reader((directory / name).read_text()).to_json())
        except OtherVersion as error:
            refused.append(str(error))
    try:
        again = LatentPacket.from_bytes((directory / "ours.packet").read_bytes())
        (directory / "again.packet").write_bytes(again.to_bytes())
    except OtherVersion as error:
        refused.append(str(error))
    (directory / "refused.txt").write_text("\n".join(refused))


if __name__ == "__main__":
    main()
