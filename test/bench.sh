#!/usr/bin/env bash
# make bench: every benchmark, which prints figures and ratios against a floor or a peer of the
# same run, and the curve (test/curve) among them. Then test/bench says which ratios moved since
# test/bench/baseline.json, and makes build/bench/scale.md with its pictures. Two hours in all.
# usage: bench.sh [once|report]
#   once    runs each a single time, as make test does, to see that it works; its figures mean little
#   report  measures nothing: the second half alone, of what the last run left in build/bench
# DOCS=1: docs/scale.md, docs/img/scale-*.svg and the baseline are written, too. Of a run in which
# anything failed they are not.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/bench

measure() { # FLAG…
  local packages
  packages=$(git ls-files '*_test.go' | xargs grep -l '^func Benchmark' | xargs -n1 dirname | sort -u |
    sed 's,^,./,')
  go test -tags kernel,lab -p 1 -run '^$' -bench . -timeout 150m "$@" $packages
}
# Tests that print figures, with full counts: drift on the legacy backend is repaired or it is not,
# which is a test, but how fast is to be read beside the rest. make test has their short forms.
tests() {
  SOAK=1 go test -tags lab -count=1 -v -timeout 80m -run '^TestLegacy(Drift|RandomEdits|Idle)$' ./test/e2e
}

if [[ ${1:-} != report ]]; then
  [[ $(id -u) == 0 ]] || { echo "make bench: needs root for network namespaces" >&2; exit 1; }
fi
case ${1:-} in
  once)
    export BENCH_ONCE=1
    measure -benchtime 1x
    exit ;;
  report) ;;
  "")
    mkdir -p "$out"
    # An old curve would pass for one of this run.
    rm -f "$out/curve.json" "$out/bench.txt"
    failed=0
    measure -benchtime "${BENCHTIME:-1s}" | tee "$out/running.txt" || failed=1
    tests | tee -a "$out/running.txt" || failed=1
    mv "$out/running.txt" "$out/bench.txt" ;;
  *) echo "bench: once, report or nothing, not \"$1\"" >&2; exit 2 ;;
esac
go run ./test/bench ${DOCS:+-docs docs} || failed=1
exit "${failed:-0}"
