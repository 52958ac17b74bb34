#!/usr/bin/env bash
# Trains a checkpoint like checkpoints/scenes from scratch: `training/scenes.sh RUN_DIRECTORY` writes it to
# RUN_DIRECTORY/checkpoint.
#
# Each program runs once, with the sizes and schedules of training/scenes.yaml. The weights in checkpoints/scenes cannot
# be reproduced by this script, because they were trained differently, as comments in that file say in detail: the
# decoder in three runs with different losses; `distilled` on two cores, on a sixteenth of the trajectories, and stopped
# early; `bridge` in two runs for an older plan, after which 40 % of its change by `training.tail` was added, for which
# there is no command here; and `finish` from an earlier student in three runs.
#
# If the script is started again, each program resumes from its last checkpoint, except that the trajectories are drawn
# anew.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: training/scenes.sh RUN_DIRECTORY" >&2
  exit 2
fi
mkdir -p "$1"
run=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

python -m training.vae training/scenes.yaml "$run/vae"
python -m training.decoder training/scenes.yaml "$run/vae/vae" "$run/decoder"
python -m training.init training/scenes.yaml "$run/decoder/vae" "$run/init"
python -m training.base training/scenes.yaml "$run/init" "$run/base"
python -m training.trajectories training/scenes.yaml "$run/base/pipeline" "$run/trajectories"
python -m training.distilled training/scenes.yaml "$run/base/pipeline" "$run/trajectories" "$run/distilled"
python -m training.bridge training/scenes.yaml "$run/base/pipeline" "$run/trajectories" "$run/distilled/lora" "$run/bridge"
python -m training.tail training/scenes.yaml "$run/base/pipeline" "$run/distilled/lora" "$run/bridge/lora" "$run/tail"
python -m training.export "$run/base/pipeline" "$run/checkpoint" \
  distilled="$run/distilled/lora" bridge="$run/tail/bridge" finish="$run/tail/finish"
