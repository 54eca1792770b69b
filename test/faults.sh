#!/usr/bin/env bash
# Plants faults, each in a copy of the tree, and demands that TestShuffled finds each of them.
# usage: faults.sh [all]: the usual ones, or every kind of drift as well
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy" 2>/dev/null || true
missed=0

plant() { # NAME FILE SED: what sed makes of the file must differ and must be found
  local name=$1 file=$2 edit=$3 start=$SECONDS
  cp "$copy/$file" "$copy/sound"
  sed -i -E "$edit" "$copy/$file"
  if cmp -s "$copy/sound" "$copy/$file"; then
    echo "faults: $name: nothing to change in $file by $edit" >&2; exit 2
  fi
  if (cd "$copy" && go test -count=1 -run '^TestShuffled$' ./agent) >"$copy/said" 2>&1; then
    echo "MISSED  $name"; missed=1
  elif ! grep -q '^ *shuffle_test.go:.*seed ' "$copy/said"; then
    echo "faults: $name: no sequence was played:" >&2; head -5 "$copy/said" >&2; exit 2
  else
    printf 'found   %-48s %3d s  %s\n' "$name" $((SECONDS - start)) "$(grep -m1 -oE 'seed [0-9]+, .*' "$copy/said" | cut -c1-100)"
  fi
  mv "$copy/sound" "$copy/$file"
}

plant 'a stale snapshot is taken' internal/envoywatch/process.go 's/if !p\.confirmed && \(empty \|\| !p\.told\) \{/if false \&\& !p.confirmed \&\& empty {/'
plant 'a half-warm set is taken' internal/envoywatch/process.go 's/return !p\.told && len\(s\.Warming\) > 0/return false \&\& len(s.Warming) > 0/'
plant 'a gate never closes' internal/reconcile/policy.go '/p\.Listening && p\.Owner != proxyUID, draining:/,/return/ s/return gate\{denied: true\}/return g/'
plant 'jumps are appended' iptables/plan.go 's/p\.rule\("-I", builtin, strconv\.Itoa\(i\+1\)\+" "\+spec\)/_, _ = i, p.rule; p.rule("-A", builtin, spec)/'
plant 'a fight never ends' internal/reconcile/policy.go 's/^(\t\t)\*b = backOff\{\}/\1_ = b/'
plant 'drift of one kind is ignored' iptables/diff.go 's/drift = append\(drift, Drift\{JumpDoubled, builtin, spec\}\)/_ = spec/'
plant 'the settling row is forgotten' internal/reconcile/goal.go 's/g\.settling = now\.Add\(settle\)/_ = now/'
plant 'the settling row stays' internal/reconcile/goal.go 's/now\.Before\(g\.settling\)/!g.settling.IsZero()/'
plant 'repairs are not spaced' internal/reconcile/policy.go 's/return !now\.Before\(b\.until\)/return true/'
plant 'a pause is no pause' internal/reconcile/family.go 's/if p\.order\.Paused \{/if false {/'
plant 'rules of another boot are adopted' internal/reconcile/family.go 's/f\.standing\.jumps && p\.order\.Marked/f.standing.jumps/'
plant 'who made a drift is told to nobody' agent/history.go 's/^(\t\t)h\.name\(\&drift\)/\1_ = drift/'
if [[ ${1:-} == all ]]; then
  for kind in $(sed -nE '/^type DriftKind/,/^\)/ s/^\t([A-Z][A-Za-z]+).*/\1/p' iptables/diff.go); do
    plant "drift ignored: $kind" iptables/diff.go "/^func Diff\(/,/^}/ s/return (\[\]Drift\{.*\}|drift)\$/return slices.DeleteFunc(\1, func(d Drift) bool { return d.Kind == $kind })/"
  done
fi
exit $missed
