#!/usr/bin/env bash
# The experiments of the MSST-ConvLSTM paper: motion prior, coarse labels, the configurations OS, ST
# and full with and without the CRF and coarse labels, scored on DAVIS-2016, and the time of a window.
#
#   SCALE=paper DAVIS=DIR FBMS=DIR SEGTRACK=DIR bash recipes/msst.sh OUT [ablation] [coarse] [times]
#   SCALE=small DAVIS=DIR BACKBONE=FILE bash recipes/msst.sh OUT [ablation] [coarse] [times]
#
# paper: VGG16, 51 sequences in our reading of the paper's counts, three stages of 10,000 iterations,
# one seed; ERASE=FILE is a person's list of wrong coarse regions.  small: MobileNetV2, 192 pixels,
# DAVIS train, three stages of 400, two seeds; coarse labels stand in for half of DAVIS train, and the
# ground truth plays the person.  All configurations have the same number of iterations.
# BACKBONE: ImageNet weights, a file or torchvision's name.  SEEDS="0 1 2" says which.
# STAGE: iterations of a stage, PRIOR: options of `vsod prior train`, for a trial.
# Ends in OUT/msst.md and OUT/figures; what is there already is kept.
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

[ $# -gt 0 ] || set -- ablation coarse times
parts=" $* "
need DAVIS DAVIS-2016
same=(data.roots.davis16="$DAVIS" data.prior="$out/prior" data.prior_cache="$out/cache/vsod/priors")
prior=(--weights "$weights")
if [ "$scale" = paper ]; then
  need FBMS FBMS-59
  need SEGTRACK SegTrack-V2
  stage=${STAGE:-10000} recipe=msst test=msst-val
  same+=(data.roots.fbms59="$FBMS" data.roots.segtrackv2="$SEGTRACK")
  window=() half=msst-train
else
  stage=${STAGE:-400} recipe=small-msst test=val
  prior+=(--backbone mobilenet_v2 --frames 200)
  window=(--backbone mobilenet_v2 --size 192x192) half=train
fi
[ -z "${PRIOR:-}" ] || read -ra prior <<<"$PRIOR"
same+=(optimizer.halve_every=$((stage / 2)))

# stages NAME SEED CONFIGURATION KEY=VALUE...: the configurations up to this one, each trained for
# three stages in all, as runs NAME-os-SEED, NAME-st-SEED and NAME-full-SEED
stages() {
  local name=$1 seed=$2 last=$3
  local begin=("${same[@]}" "${@:4}" seed="$seed" iterations="$stage")
  local after=("${begin[@]}" backbone_weights=null)
  local os=$out/runs/$name-os-$seed-first/model st=$out/runs/$name-st-$seed-first/model
  train "$name-os-$seed-first" $recipe-os "${begin[@]}" backbone_weights="$weights"
  train "$name-os-$seed" $recipe-os "${after[@]}" initial="$os" iterations=$((2 * stage)) \
    optimizer.halve_every="$stage"
  [ "$last" = os ] && return
  train "$name-st-$seed-first" $recipe-st "${begin[@]}" initial="$os" backbone_weights="$weights"
  train "$name-st-$seed" $recipe-st "${after[@]}" initial="$st"
  train "$name-full-$seed" $recipe-full "${after[@]}" initial="$st"
}

# score NAME TITLE=RUN...: maps of the runs, raw and refined, and their numbers and figures together
score() {
  local name=$1 pair title run preds=()
  local data=(--dataset davis16 --data "$DAVIS" --split $test)
  shift
  for pair in "$@"; do
    title=${pair%%=*} run=${pair#*=}
    preds+=(--pred "$title=$out/maps/$run" --pred "$title+CRF=$out/maps/$run-crf")
    if [ ! -f "$out/results/$name.json" ]; then
      predict "$run" "$run" "${data[@]}"
      predict "$run-crf" "$run" "${data[@]}" --crf dss
    fi
  done
  made "$out/results/$name.json" vsod eval "${preds[@]}" "${data[@]}" --protocol frame \
    --curves "$out/figures/$name-curves.png" --bars "$out/figures/$name-bars.png" \
    --grid "$out/figures/$name-grid.jpg" --json "$out/results/$name.json"
}

# labels NAME OPTION...: a folder of coarse labels
labels() {
  made "$out/labels/$1" vsod label coarse -o "$out/labels/$1" "${@:2}"
}

# OS, ST and full, with the ConvLSTM at the size of the frames as in the paper, and at the branches'.
ablation() {
  local seed titles=()
  made "$out/prior" vsod prior train davis16 "$DAVIS" --split $half -o "$out/prior" \
    --level-classifiers "${prior[@]}"
  for seed in $seeds; do
    stages ablation "$seed" full "$@"
    train "ablation-branch-$seed" $recipe-full "${same[@]}" "$@" seed="$seed" iterations="$stage" \
      backbone_weights=null initial="$out/runs/ablation-st-$seed-first/model" \
      model.full_resolution=false
    titles+=("OS-$seed=ablation-os-$seed" "ST-$seed=ablation-st-$seed")
    titles+=("full-$seed=ablation-full-$seed" "branch-$seed=ablation-branch-$seed")
  done
  score msst-ablation "${titles[@]}"
}

# In small: half of DAVIS train as if it had no masks, and coarse labels in their place.
coarse_small() {
  local halves=$out/halves split name rest seed=0
  local maps=(--maps minimum-barrier --maps flow-contrast --maps "$out/maps/own" --weights 1,1,2)
  mkdir -p "$halves/ImageSets/480p"
  ln -sfn "$(realpath "$DAVIS/JPEGImages")" "$halves/JPEGImages"
  ln -sfn "$(realpath "$DAVIS/Annotations")" "$halves/Annotations"
  for split in 'fine p;n' 'rest n;p'; do # every second sequence
    sed 's|^/*JPEGImages/[^/]*/||; s|/.*||' "$DAVIS/ImageSets/480p/train.txt" | sort -u |
      sed -n "${split#* }" >"$halves/ImageSets/480p/${split%% *}.txt"
  done
  rest=$(paste -sd, "$halves/ImageSets/480p/rest.txt")
  local data=(davis16 "$halves" --split all --sequences "$rest")
  stages fine $seed os data.roots.davis16="$halves" data.train='[{dataset: davis16, split: fine}]'
  # Two maps without training, and what the model of the fine half says.
  [ -d "$out/labels/coarse" ] || predict own fine-os-$seed --dataset davis16 --data "$halves" \
    --split rest --crf dss
  labels coarse "${data[@]}" "${maps[@]}"
  made "$out/labels/wrong.json" python "$here/played_person.py" "$out/labels/coarse" davis16 "$halves" \
    all "$out/labels/wrong.json"
  labels person "${data[@]}" "${maps[@]}" --erase "$out/labels/wrong.json"
  for name in coarse person; do
    stages $name $seed os data.roots.davis16="$halves" data.train="[{dataset: davis16, split: fine},
      {dataset: davis16, split: rest, labels: $out/labels/$name}]"
    # MAE of labels is the share of their pixels that is wrong.
    made "$out/results/msst-labels-$name.json" vsod eval --pred "$out/labels/$name" --dataset davis16 \
      --data "$halves" --split rest --protocol frame --allow-missing \
      --json "$out/results/msst-labels-$name.json"
  done
  score msst-coarse fine-0=fine-os-0 coarse-0=coarse-os-0 person-0=person-os-0
}

# At full size: the same three configurations without the coarse labels.
coarse_paper() {
  local seed titles=()
  for seed in $seeds; do
    stages fine "$seed" full
    titles+=("OS-fine-$seed=fine-os-$seed" "ST-fine-$seed=fine-st-$seed")
    titles+=("full-fine-$seed=fine-full-$seed")
  done
  score msst-coarse "${titles[@]}"
}

# The time of a window of four frames; half a minute to some minutes, on a machine that is idle.
measure() {
  [ ! -f "$out/times/msst.md" ] || return 0
  mkdir -p "$out/times"
  (cd "$here/.." && python -m benchmarks msst --full-resolution "${window[@]}" --out "$out/times") |
    tee "$out/times/msst.part"
  mv "$out/times/msst.part" "$out/times/msst.md"
}

if [[ $parts == *" ablation "* ]]; then
  if [ "$scale" = paper ]; then
    labels coarse fbms59 "$FBMS" --split msst-train --unlabelled --frames 3326 --fit \
      ${ERASE:+--erase "$ERASE"}
    ablation data.train.1.labels="$out/labels/coarse"
  else
    ablation
  fi
fi
[[ $parts != *" coarse "* ]] || coarse_$scale
[[ $parts != *" times "* ]] || measure
report msst
