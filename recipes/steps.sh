# What table1.sh and msst.sh share; not a script of its own.
#
# Every step leaves a file or a folder that appears when it is whole, and is skipped where that is
# there: a script that was killed, at any point, goes on when it is called again.
set -euo pipefail

mkdir -p "${1:?"usage: SCALE=paper|small bash $0 OUT [PART]..."}"
out=$(cd "$1" && pwd)
shift
export LC_ALL=C
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scale=${SCALE:?"say SCALE=paper or SCALE=small"}
case $scale in
  paper) seeds=${SEEDS:-0} ;;
  small) seeds=${SEEDS:-0 1} ;;
  *) echo "$0: SCALE is $scale; there are paper and small" >&2; exit 2 ;;
esac
weights=${BACKBONE:-IMAGENET1K_V1} # torchvision's name, or a file with its key names
read -ra changes <<<"${CHANGES:-}" # key=value ... for every training
mkdir -p "$out/results" "$out/figures"

# need VARIABLE WHAT: the variable names a folder.
need() {
  [ -d "${!1:-}" ] || { echo "$0: $1=${!1:-} has to be the folder of $2" >&2; exit 2; }
}

# train RUN RECIPE KEY=VALUE...: ends in $out/runs/RUN/model
train() {
  local run=$out/runs/$1
  [ -d "$run/model" ] ||
    vsod train --config "$2" --resume "out=$run" validate_every=0 "${@:3}" "${changes[@]}"
}

# made FILE|FOLDER COMMAND...: the command makes it, whole or not at all
made() {
  [ -e "$1" ] || "${@:2}"
}

# predict MAPS RUN OPTION...: maps of a dataset by a trained model
predict() {
  XDG_CACHE_HOME=$out/cache vsod predict -o "$out/maps/$1" --model "$out/runs/$2/model" "${@:3}"
}

# report NAME: the tables and loss curves of what there is
report() {
  python "$here/../docs/reproduction.py" --print "$1" "$out/results" >"$out/$1.md.part"
  [ ! -f "$out/times/$1.md" ] || cat "$out/times/$1.md" >>"$out/$1.md.part"
  mv "$out/$1.md.part" "$out/$1.md"
  [ ! -d "$out/runs" ] || python "$here/losses.py" "$out/figures/$1-losses.png" "$out"/runs/*/
  cat "$out/$1.md"
  echo "in $out: $1.md, figures/, results/"
}
