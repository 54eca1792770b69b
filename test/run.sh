#!/usr/bin/env bash
# make test: everything, each distinct case once, in groups; prints the seconds of each.
# At the end stands what failed, once more: a group's output is long, and CI may show its end alone.
# usage: run.sh [GROUP…]
# Kernel, lab and box tests need root and network namespaces of their own: without them this fails,
# it does not skip.
set -uo pipefail
cd "$(dirname "$0")/.."

if [[ $(id -u) != 0 ]]; then
  echo "make test: needs root for network namespaces: run it with sudo," \
    "or \`make check\` for what needs none" >&2
  exit 1
fi
if ! unshare -n true 2>/dev/null; then
  echo "make test: this machine gives no network namespaces (unshare -n is refused):" \
    "use a VM, or a container with CAP_SYS_ADMIN" >&2
  exit 1
fi

declare -a report
failed=0
group() { # NAME COMMAND…
  local name=$1 start=$SECONDS status=ok; shift
  printf '\n=== %s\n' "$name"
  "$@" 2>&1 | tee "$output" || { status=FAILED; failed=1; excerpt "$name" >>"$excerpts"; }
  report+=("$(printf '%-11s %4d s  %s' "$name" $((SECONDS - start)) "$status")")
}
output=$(mktemp) excerpts=$(mktemp)
trap 'rm -f "$output" "$excerpts"' EXIT
# What each failed test said, three lines of each message, or the last lines where that was no test.
excerpt() { # NAME
  local found
  found=$(awk '/^ *--- FAIL|^panic:|^fatal error:|DATA RACE/ { failed = 1; left = 12 }
    /^(ok|FAIL|PASS)|^ *--- (PASS|SKIP|BENCH)|^=== / { failed = left = 0 }
    failed && /^ *[a-z_0-9]+\.go:[0-9]+: / { left = 3 }
    left-- > 0 { print substr($0, 1, 300) }' "$output")
  printf '\n=== failed: %s\n' "$1"
  printf '%s\n' "${found:-$(tail -n 20 "$output")}" | head -n 150
}

# What this machine itself does with packets. Looking changes nothing: iptables-legacy-save makes a
# table that was not there, so only those that are there are asked for, and counters are left out.
host() {
  local family table
  nft -s list ruleset
  for family in ip ip6; do
    for table in $(cat "/proc/net/${family}_tables_names" 2>/dev/null); do
      "${family}tables-legacy-save" -t "$table" | sed -E '/^#/d; s/ \[[0-9]+:[0-9]+\]$//'
    done
  done
  grep . /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding
}
# Demo and tests have namespaces of their own; the machine's rules are nobody's business.
untouched() {
  diff "$before" <(host 2>&1) && return
  echo "make test: the rules of this machine itself changed (< before, > now)"
  return 1
}

setup() {
  make --no-print-directory tools build binaries
}
lint()   { nice -n 10 test/lint.sh; }
alerts() { test/alerts.sh; }
# lint vets all there is, and nobody debugs these binaries: -w links them in two thirds of the time.
go_test() { go test -vet=off -ldflags=-w "$@"; }
unit()   { go_test -race -timeout 5m ./... && go_test -run '^TestShuffled$' ./agent; }
# -p 1: they share the lock of iptables-legacy, which some hold to see what becomes of it.
kernel() { tagged kernel -timeout 10m -p 1; }
# Labs and boxes wait more than they work.
lab()    { tagged lab -timeout 12m -p 2 -parallel 8; }
# Promises with a time in them, so nothing else runs beside.
chaos()  { go_test -tags lab -count=1 -timeout 12m ./test/chaos; }
# Three boxes that are compared, one more with packages, and these' scripts in a chroot, are make
# soak's.
box() {
  tagged box -timeout 16m -parallel 6 \
    -skip '^(TestSameVM|TestArchiveToPackage|TestDeb.*|TestNeedrestart|TestRPMScripts)$'
}
# The tests in files with this build tag. The others of their packages ran in unit.
tagged() { # TAG FLAG…
  local tag=$1 files tests packages; shift
  files=$(git ls-files '*_test.go' | xargs grep -lE "^//go:build .*\b$tag\b") ||
    { echo "no test with the tag $tag"; return 1; }
  tests=$(sed -nE 's/^func ((Test|Fuzz|Example)[A-Za-z0-9_]*)\(.*/\1/p' $files |
    grep -vx TestMain | paste -sd '|')
  packages=$(dirname $files | sort -u | sed 's,^,./,' | grep -vx ./test/chaos)
  go_test -tags "$tag" -count=1 -run "^($tests)\$" "$@" $packages
}

bench()  { test/bench.sh once; }
# That the benchmarks work is to be seen; their figures mean little here.
rest()   { local bad=0; bench || bad=1; alerts || bad=1; return $bad; }
# Kernel tests wait for a lock, one after the other, and boxes for systemd: what needs no root, or no
# quiet, has what is left of the processors.
kernel+lint() { beside lint kernel; }
box+rest()    { beside rest box; }
beside() { # COMMAND GROUP: what COMMAND says comes when GROUP has ended
  local said ended=0
  said=$(mktemp)
  "$1" >"$said" 2>&1 &
  "$2" || ended=1
  wait $! || ended=1
  cat "$said"; rm -f "$said"
  return $ended
}

group set-up setup
command -v gcloud >/dev/null ||
  report+=("NOT RUN: the real gcloud, which no registry has (https://cloud.google.com/sdk);"
    "         TestGcloud made its requests")

if (( ! failed )); then
  (( $# )) || set -- unit kernel+lint lab chaos box+rest
  before=$(mktemp); host >"$before" 2>&1
  for name; do
    group "$name" "$name"
    untouched || { report+=("after $name: the rules of this machine changed"); failed=1; }
  done
  rm -f "$before"
fi

cat "$excerpts"
printf '\n=== seconds\n'
printf '%s\n' "${report[@]}"
exit $failed
