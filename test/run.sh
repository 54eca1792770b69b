#!/usr/bin/env bash
# make test: everything, each distinct case once, in groups; prints the seconds of each.
# Kernel, lab and box tests need root and network namespaces of their own: without them this fails, it does not skip.
set -uo pipefail
cd "$(dirname "$0")/.."

if [[ $(id -u) != 0 ]]; then
  echo "make test: needs root for network namespaces: run it with sudo, or \`make check\` for what needs none" >&2; exit 1
fi
if ! unshare -n true 2>/dev/null; then
  echo "make test: this machine gives no network namespaces (unshare -n is refused): use a VM, or a container with CAP_SYS_ADMIN" >&2; exit 1
fi

declare -a report
failed=0
group() { # NAME COMMAND…
  local name=$1 start=$SECONDS status=ok; shift
  printf '\n=== %s\n' "$name"
  "$@" || { status=FAILED; failed=1; }
  report+=("$(printf '%-8s %4d s  %s' "$name" $((SECONDS - start)) "$status")")
}

setup() {
  make --no-print-directory tools build release
}
lint() {
  local bad
  bad=$(gofmt -l $(git ls-files '*.go')) && [[ -z $bad ]] || { echo "gofmt: $bad"; return 1; }
  go vet ./... && go vet -tags kernel,lab,box ./...
}
unit()   { go test -race -timeout 5m ./...; }
# -p 1: the packages share two cores, and tests of latency would disturb one another.
kernel() { go test -tags kernel -p 1 -count=1 -timeout 10m $(tagged kernel); }
lab()    { go test -tags lab -p 1 -parallel 4 -count=1 -timeout 12m $(tagged lab); }
box()    { go test -tags box -p 1 -count=1 -timeout 12m $(tagged box); }
tagged() { # packages that hold a test with this build tag; none is an error of go test
  git ls-files '*_test.go' | xargs grep -lE "^//go:build .*\b$1\b" | xargs -n1 dirname | sort -u | sed 's,^,./,'
}

group set-up setup
if (( ! failed )); then
  group lint lint
  group unit unit
  group kernel kernel
  group lab lab
  group box box
  group bench test/bench.sh once
fi

printf '\n=== seconds\n'
printf '%s\n' "${report[@]}"
exit $failed
