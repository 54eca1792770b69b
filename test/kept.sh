#!/usr/bin/env bash
# kept.sh NAME COMMAND…: prints the path of what `COMMAND… PATH` has made, a file or a folder, now or
# in an earlier run. For what takes long to make and is the same in every clone: it is kept outside
# of them, or in build/ where nothing can be kept. NAME holds all that it depends on.
# It stands there whole or not at all. What nobody asked for in a month goes.
set -euo pipefail
name=$1; shift

cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/service-proxy-agent-test
(( $(id -u) )) || cache=/var/cache/service-proxy-agent-test
{ mkdir -p "$cache" && [[ -w $cache ]]; } 2>/dev/null ||
  { cache=$(dirname "$0")/../build/cache; mkdir -p "$cache"; }
path=$(realpath "$cache")/$name

exec 9>>"$path.lock"
flock 9
touch "$path.lock"
if [[ ! -e $path ]]; then
  find "$cache" -maxdepth 1 -name '*.lock' -mtime +30 | while read -r lock; do
    rm -rf "${lock%.lock}" "$lock"
  done
  rm -rf "$path.new"
  "$@" "$path.new" 9>&- >&2 || { rm -rf "$path.new"; exit 1; }
  mv "$path.new" "$path"
fi
echo "$path"
