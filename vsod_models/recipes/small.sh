#!/usr/bin/env bash
# The tables of docs/reproduction.md: both systems in small, on a CPU.
#
#   VSOD_DATA=DIR BACKBONE=mobilenet_v2.safetensors bash vsod_models/recipes/small.sh OUT [mssa] [msst] [coarse]
#
# VSOD_DATA holds davis16-270p (DAVIS-2016 in its official layout, at any size) and duts-tr-499 (any
# images/ and masks/); BACKBONE is MobileNetV2 with torchvision's key names.  What is there already
# is kept, so a run that was stopped goes on.  Hours on two cores; SEEDS="0" halves that.
set -euo pipefail
out=$1
davis=$VSOD_DATA/davis16-270p
stills=$VSOD_DATA/duts-tr-499
results=$out/results
seeds=${SEEDS:-0 1}
mkdir -p "$out" "$results"

train() { # name recipe key=value ...
  [ -d "$out/$1/model" ] || vsod train --config "$2" --resume "out=$out/$1" "${@:3}"
}
score() { # name of the numbers, name of the run, options of vsod predict
  [ -f "$results/$1.json" ] && return
  vsod predict --dataset davis16 --data "$davis" -o "$out/$1-maps" --model "$out/$2/model" "${@:3}"
  vsod eval --pred "$out/$1-maps" --data "$davis" --dataset davis16 --protocol davsod \
    --json "$results/$1.json" --curves "$results/$1.png"
}
compare() { # name of the picture, LABEL=name of the numbers ...
  local of pred=()
  for of in "${@:2}"; do pred+=(--pred "${of%%=*}=$out/${of#*=}-maps"); done
  vsod eval "${pred[@]}" --data "$davis" --dataset davis16 --protocol davsod --curves "$results/$1.png"
}

# MSSA and its baseline: stills, then videos; both readings of gamma, two seeds.
mssa() {
  for gamma in balanced paper; do
    for seed in $seeds; do
      for model in mssa baseline; do
        reductions="[1,2]"
        [ $model = baseline ] && reductions="[1]"
        name=$model-$gamma-$seed
        same=(model.reductions=$reductions seed=$seed loss.positive_weight=$gamma)
        train "$name-pre" small-pretrain "${same[@]}" backbone_weights="$BACKBONE" \
          data.roots.stills="$stills"
        train "$name" small-finetune "${same[@]}" initial="$out/$name-pre/model" \
          data.roots.davis16="$davis"
        score "$name" "$name"
      done
    done
  done
  compare reproduction-mssa "baseline, balanced=baseline-balanced-0" "MSSA, balanced=mssa-balanced-0" \
    "baseline, paper=baseline-paper-0" "MSSA, paper=mssa-paper-0"
}

# MSST: 360 iterations in all for each configuration, in stages.
msst() {
  [ -d "$out/prior" ] || vsod prior train davis16 "$davis" -o "$out/prior" --frames 200 \
    --backbone mobilenet_v2 --weights "$BACKBONE"
  for seed in $seeds; do
    same=(seed="$seed" data.roots.davis16="$davis" data.prior="$out/prior" data.prior_cache="$out/priors")
    after=("${same[@]}" backbone_weights=null)
    os=$out/os-first-$seed/model
    st=$out/st-first-$seed/model
    train "os-first-$seed" small-msst-os "${same[@]}" backbone_weights="$BACKBONE"
    train "os-$seed" small-msst-os "${after[@]}" initial="$os" iterations=240 \
      optimizer.halve_every=160
    train "st-first-$seed" small-msst-st "${same[@]}" initial="$os" backbone_weights="$BACKBONE"
    train "st-$seed" small-msst-st "${after[@]}" initial="$st"
    train "full-$seed" small-msst-full "${after[@]}" initial="$st"
    for model in os st full; do
      score "$model-$seed" "$model-$seed"
      score "$model-$seed-crf" "$model-$seed" --crf dss
    done
  done
  compare reproduction-msst os=os-0 st=st-0 full=full-0 "full + CRF=full-0-crf"
}

# Coarse labels: every second training sequence as if it had no masks.
coarse() {
  half=$out/half
  mkdir -p "$half/ImageSets/480p"
  ln -sfn "$(realpath "$davis/JPEGImages")" "$half/JPEGImages"
  ln -sfn "$(realpath "$davis/Annotations")" "$half/Annotations"
  cut -d/ -f4 "$davis/ImageSets/480p/train.txt" | sort -u | sed -n 'p;n' >"$half/ImageSets/480p/fine.txt"
  cut -d/ -f4 "$davis/ImageSets/480p/train.txt" | sort -u | sed -n 'n;p' >"$half/ImageSets/480p/rest.txt"
  [ -d "$out/coarse" ] || vsod label coarse davis16 "$davis" -o "$out/coarse" --fit --auto-erase \
    --sequences "$(paste -sd, "$half/ImageSets/480p/rest.txt")"
  for seed in $seeds; do
    same=(seed="$seed" data.roots.davis16="$half" backbone_weights="$BACKBONE")
    train "half-$seed" small-msst-os "${same[@]}" data.train='[{dataset: davis16, split: fine}]'
    train "coarse-$seed" small-msst-os "${same[@]}" data.label_weights.coarse=0.5 \
      data.train="[{dataset: davis16, split: fine},{dataset: davis16, split: rest, labels: $out/coarse}]"
    # the same with what the first of the two says about the other half among the maps
    [ -d "$out/own-$seed" ] || vsod predict --dataset davis16 --data "$half" --split rest \
      -o "$out/own-$seed" --model "$out/half-$seed/model" --crf dss
    [ -d "$out/coarse-own-$seed" ] || vsod label coarse davis16 "$davis" -o "$out/coarse-own-$seed" \
      --maps minimum-barrier --maps flow-contrast --maps "$out/own-$seed" --weights 1,1,2 \
      --auto-erase --sequences "$(paste -sd, "$half/ImageSets/480p/rest.txt")"
    train "own-coarse-$seed" small-msst-os "${same[@]}" data.label_weights.coarse=0.5 \
      data.train="[{dataset: davis16, split: fine},{dataset: davis16, split: rest, labels: $out/coarse-own-$seed}]"
    for run in half coarse own-coarse; do
      score "$run-$seed" "$run-$seed"
    done
  done
}

shift
[ $# -gt 0 ] || set -- mssa msst coarse
for part in "$@"; do
  "$part"
done
