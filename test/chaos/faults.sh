#!/usr/bin/env bash
# Plants faults, each in a copy of the tree, and demands that games of TestChaos find each of them,
# by breaking the promise that it is about.
# usage: faults.sh [NAME-PART]; $MINUTES (5) is what each has at most, $SAID a folder that keeps what
# the games said.
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $(id -u) == 0 ]] || { echo "faults: needs root for network namespaces" >&2; exit 1; }
: "${ENVOY:=$PWD/build/envoy-1.40.0}"
export ENVOY
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy" 2>/dev/null || true
(cd "$copy" && go test -c -tags lab -o chaos.test ./test/chaos)
missed=0 only=${1:-}

seen() { # KINDS: the first promise of these that is broken in what was said, behind its game
  awk -v broken="^ +($1) [0-9]+ times" '/^=== (NAME|RUN|CONT)/ { game = $3 }
    $0 ~ broken { sub(/^ +/, ""); print game ": " $0; exit }' "$copy/said"
}

plant() { # NAME KINDS FILE SED: what sed makes of FILE must break a promise of these kinds
  local name=$1 kinds=$2 file=$3 edit=$4 start=$SECONDS
  [[ $name == *"$only"* ]] || return 0
  cp "$copy/$file" "$copy/sound"
  sed -i -E "$edit" "$copy/$file"
  if cmp -s "$copy/sound" "$copy/$file"; then
    echo "faults: $name: nothing to change in $file by $edit" >&2; exit 2
  fi
  (cd "$copy" && CGO_ENABLED=0 go build -o faulty ./cmd/service-proxy-agent)
  : >"$copy/said"
  # The seeds of `make test` first, one of each backend, and its sequences; then others. A game takes
  # up to 90 s beyond the time of the campaign. One that ends it by breaking a promise of other kinds
  # leaves the rest of the time to the next.
  local games found='' left
  for games in '^TestChaos$' '^TestSequence$' others; do
    while left=$((start + ${MINUTES:-5} * 60 - SECONDS)) && [[ $games != others ]] || ((left > 95)); do
      local args=(-test.run "$games")
      [[ $games != others ]] ||
        args=(-test.run '^TestChaos$' "-chaos.for=$((left - 90))s" -chaos.first -chaos.shrink=0)
      (cd "$copy/test/chaos" && "$copy/chaos.test" "${args[@]}" -test.timeout 15m -test.v \
        -chaos.agent "$copy/faulty") >>"$copy/said" 2>&1 || true
      [[ -z ${SAID:-} ]] || cp "$copy/said" "$SAID/${name// /-}"
      found=$(seen "$kinds")
      [[ -z $found ]] || break 2
      [[ $games == others ]] || break
    done
  done
  mv "$copy/sound" "$copy/$file"
  if [[ -n $found ]]; then
    printf 'found   %-30s %4d s  %s\n' "$name" $((SECONDS - start)) "${found:0:200}"
    return 0
  fi
  echo "MISSED  $name; what was seen:"
  grep -E '^ +[a-z]+ [0-9]+ times' "$copy/said" | cut -c1-160 || tail -3 "$copy/said"
  missed=1
}

plant 'the jump is appended' 'escaped|late|lied' iptables/plan.go \
  's/p\.rule\("-I", builtin, strconv\.Itoa\(i\+1\)\+" "\+spec\)/_, _ = i, p.rule; p.rule("-A", builtin, spec)/'
plant 'no hold' 'early|refused' internal/reconcile/policy.go \
  's/^(\tcase p\.Listening):$/\1 || !g.open:/'
plant 'cleanup flushes the table' 'left|foreign' iptables/clean.go \
  's/^(\t\tif _, _, err = k\.apply\(ctx, t, plan\))/\t\tplan.lines = append(plan.lines, "-F")\n\1/'
plant 'the budget is ignored' 'spent' guestattr/guestattr.go \
  's/rate\.NewLimiter\(rate\.Every\(refill\), burst\)/rate.NewLimiter(rate.Inf, 1<<20)/; /^func \(w \*Writer\) take\(/a return true'
plant 'who owns the port is not asked' 'captured' internal/reconcile/policy.go \
  's/^\tcase p\.Listening && p\.Owner != proxyUID, draining:/\tcase draining:/'
plant 'drift is ignored' 'escaped|late|lied|refused' internal/reconcile/family.go \
  's/^\tif !f\.backOff\.mayRepair\(p\.now\) \{/\tif true {/'
exit $missed
