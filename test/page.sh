#!/usr/bin/env bash
# The page of `status --html` in a real browser, and by a validator. Pages and pictures of them are
# in build/pages then, to look at.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
type -P chromium-headless-shell >/dev/null || type -P chromium >/dev/null ||
  missing+=(chromium-headless-shell)
type -P npx >/dev/null || missing+=(npm)
if (( ${#missing[@]} )); then
  echo "page: installing ${missing[*]} (apt)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
export PAGES=$PWD/build/pages
rm -rf "$PAGES"
go test -tags browser -count=1 -v -timeout 10m -run '^TestInBrowser$' ./internal/page
# A live page refreshes itself, as a rule forbids; it can be paused, which that rule cannot know.
echo '{"root": true, "extends": ["html-validate:recommended"], "rules": {"meta-refresh": "off"}}' \
  >"$PAGES/.htmlvalidate.json"
# 9 is the newest that runs on the node of Debian 12.
npx --yes html-validate@9.7.1 "$PAGES"/*.html
echo "page: the pictures are in $PAGES"
