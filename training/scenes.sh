#!/usr/bin/env bash
# Makes a checkpoint like checkpoints/scenes from nothing: `training/scenes.sh RUN_DIRECTORY`, result in its checkpoint/.
#
# Sizes and schedules are those of training/scenes.yaml, from one run of each program. The shipped files had another
# history, which comments there tell in full: the decoder came of three runs, not always of the same loss; `distilled`
# learned on two cores, from a sixteenth of the trajectories, and was ended early; `bridge` learned in two runs for an
# older plan, and then went four tenths of the way to what `training.tail` made of it, by no command that is here; and
# `finish` is a former student after three rounds of its own. Their weights will not come out of this again.
#
# Started again, a program goes on from its last checkpoint, but the trajectories are drawn anew.
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
