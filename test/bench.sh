#!/usr/bin/env bash
# make bench: every benchmark, which prints figures and ratios against a floor or a peer of the
# same run. "once" runs each a single time, as make test does, to see that it works; its
# figures then mean little.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "make bench: needs root for network namespaces" >&2; exit 1; }
times=${BENCHTIME:-1s}
[[ ${1:-} == once ]] && { times=1x; export BENCH_ONCE=1; }
packages=$(git ls-files '*_test.go' | xargs grep -l '^func Benchmark' | xargs -n1 dirname | sort -u | sed 's,^,./,')
exec go test -tags kernel,lab -p 1 -run '^$' -bench . -benchtime "$times" -timeout 80m $packages
