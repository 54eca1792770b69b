#!/usr/bin/env bash
# make soak: the full counts and durations.
# usage: soak.sh [GROUP]; each group takes at most 80 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "make soak: needs root for network namespaces" >&2; exit 1; }
export SOAK=1
run() { echo "=== soak $1"; go test -tags "$1" -p 1 -count=1 -v -timeout 80m "${@:2}"; }
fuzz() { # every fuzz target for a share of half an hour
  go list ./... | while read -r package; do
    go test -list '^Fuzz' "$package" | { grep '^Fuzz' || true; } | while read -r target; do
      echo "=== fuzz $package $target"; go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-5m}" "$package"
    done
  done
}
install() { # PACKAGE…
  echo "soak: installing $* (apt)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
case ${1:-all} in
  rules) run kernel ./iptables/... ./internal/... ./agent ;;
  shuffled) # and whether each fault that can be planted is found
    go test -count=1 -timeout 80m -run '^TestShuffled$' ./agent -shuffled.count 200000
    test/faults.sh all ;;
  envoy) run lab ./envoyadmin/... ;;
  agent) run lab -skip '^TestLongRun$' ./test/e2e/... ;;
  long)  run lab -run '^TestLongRun$' ./test/e2e ;; # 75 minutes; nothing else beside it
  box)   test/tools.sh build; run box -skip '^TestCoexistence$' ./test/box/... ;;
  firewalls) test/tools.sh build; run box -run '^TestCoexistence$' ./test/box ;;
  chaos) # games of 90 s with new seeds; what fails is played again with fewer events
    run lab -run '^(TestChaos|TestSequence)$' ./test/chaos -args -chaos.for "${FOR:-60m}" \
      -chaos.labs "${LABS:-2}" -chaos.seed "${SEED:-0}" ;;
  chaos-faults) test/chaos/faults.sh ;; # whether the games find faults that are planted
  fuzz)  fuzz ;;
  completion) # in the shells themselves; what a machine has not is installed by apt
    if ! { type zsh fish && [[ -e /usr/share/bash-completion/bash_completion ]]; } >/dev/null 2>&1; then
      install bash-completion zsh fish
    fi
    run shells ./test/completion ;;
  grafana) # -count=1: the dashboards are outside of the module, so the cache knows nothing of them
    echo "=== soak grafana"
    go -C test/grafana vet . && go -C test/grafana test -count=1 -v -timeout 10m . ;;
  page)  test/page.sh ;;
  packages) test/packages.sh ;; # what they hold, and what lintian and rpmlint say
  release) test/release.sh ;; # two of them, byte for byte
  vm) # Debian's kernels; the emulator and what makes a disk are installed by apt
    type qemu-system-x86_64 qemu-img mkfs.ext4 >/dev/null 2>&1 ||
      install qemu-system-x86 qemu-utils e2fsprogs
    run vm -skip '^TestArm64$' ./test/vm ;;
  arm64) # one VM of that architecture; qemu-user-static is for making its disk
    type qemu-system-aarch64 qemu-aarch64-static qemu-img mkfs.ext4 >/dev/null 2>&1 ||
      install qemu-system-arm qemu-user-static qemu-utils e2fsprogs
    run vm -run '^TestArm64$' ./test/vm ;;
  all)   for g in rules shuffled envoy agent long box firewalls chaos chaos-faults fuzz completion grafana page packages release vm arm64; do "$0" "$g"; done ;;
  *)     echo "soak: no group \"$1\": rules shuffled envoy agent long box firewalls chaos chaos-faults fuzz completion grafana page packages release vm arm64" >&2; exit 2 ;;
esac
