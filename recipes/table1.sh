#!/usr/bin/env bash
# Table I and Figure 4 of the MSSA paper: MSSA and its baseline, pretrained and finetuned, scored on
# DAVIS-2016, SegTrack-V2 and FBMS-59.
#
#   SCALE=paper COCO=DIR DAVIS=DIR FBMS=DIR SEGTRACK=DIR bash recipes/table1.sh OUT
#   SCALE=small STILLS=DIR DAVIS=DIR BACKBONE=FILE bash recipes/table1.sh OUT
#
# paper: VGG16, 100,000 + 100,000 iterations, one seed.  small: MobileNetV2, 1,500 + 1,000 iterations
# on stills and DAVIS train, two seeds: a night on two cores; FBMS and SEGTRACK are scored where they
# are given.  The folders are as docs/data.md says; STILLS holds images/ and masks/.
# BACKBONE: ImageNet weights, a file or torchvision's name.  SEEDS="0 1 2" says which.
# PRETRAIN, FINETUNE: iterations, for a trial.
# Ends in OUT/table1.md and OUT/figures; what is there already is kept.
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

need DAVIS DAVIS-2016
if [ "$scale" = paper ]; then
  need COCO COCO-2017
  need FBMS FBMS-59
  need SEGTRACK SegTrack-V2
  recipe=mssa
  stills=(data.roots.coco="${COCO}" iterations="${PRETRAIN:-100000}")
  videos=(data.roots.davis16="$DAVIS" data.roots.fbms59="$FBMS" iterations="${FINETUNE:-100000}")
else
  need STILLS "stills, with images/ and masks/ in it"
  recipe=small
  stills=(data.roots.stills="$STILLS" iterations="${PRETRAIN:-1500}")
  videos=(data.roots.davis16="$DAVIS" iterations="${FINETUNE:-1000}")
fi

# score DATASET ROOT SPLIT: maps of all models, and their numbers and figures together
score() {
  local model seed preds=()
  for seed in $seeds; do
    for model in MSSA baseline; do
      preds+=(--pred "$model-$seed=$out/maps/$1/$model-$seed")
      [ -f "$out/results/table1-$1.json" ] ||
        predict "$1/$model-$seed" "$model-$seed" --dataset "$1" --data "$2" --split "$3"
    done
  done
  made "$out/results/table1-$1.json" \
    vsod eval "${preds[@]}" --dataset "$1" --data "$2" --split "$3" --protocol davsod \
    --curves "$out/figures/table1-$1-curves.png" --scatter "$out/figures/table1-$1-scatter.png" \
    --grid "$out/figures/table1-$1-grid.jpg" --json "$out/results/table1-$1.json"
}

for seed in $seeds; do
  for model in MSSA baseline; do
    reductions="[1,2]"
    [ $model = baseline ] && reductions="[1]"
    same=(model.reductions=$reductions seed="$seed")
    train "$model-$seed-first" $recipe-pretrain "${same[@]}" backbone_weights="$weights" "${stills[@]}"
    train "$model-$seed" $recipe-finetune "${same[@]}" initial="$out/runs/$model-$seed-first/model" \
      "${videos[@]}"
  done
done
score davis16 "$DAVIS" val
[ -z "${SEGTRACK:-}" ] || score segtrackv2 "$SEGTRACK" test
[ -z "${FBMS:-}" ] || score fbms59 "$FBMS" test
report table1
