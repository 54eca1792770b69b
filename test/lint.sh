#!/usr/bin/env bash
# make lint: format, vet, golangci-lint (.golangci.yml says which linters and why), the manual, code
# that nobody calls. Needs no root. The linters are pinned by test/tools/go.mod, a module of its own.
# They are built once, and when a pin moves; test/kept.sh keeps them.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0

if [[ ${1:-} == build ]]; then # FOLDER
  echo "lint: building golangci-lint and deadcode (two minutes on 2 cores)"
  export GOBIN=$2
  exec go -C test/tools install -ldflags='-s -w' \
    github.com/golangci/golangci-lint/v2/cmd/golangci-lint golang.org/x/tools/cmd/deadcode
fi
pins=$(cat test/tools/go.sum <(go version) | sha256sum | cut -c 1-16)
tools=$(test/kept.sh "linters-$pins" test/lint.sh build)

bad=$(gofmt -l $(git ls-files '*.go'))
[[ -z $bad ]] || { echo "gofmt: $bad"; failed=1; }

# A build tag that .golangci.yml does not have would hide its files from all that is below.
tags=$(sed -n 's/^ *build-tags: \[\(.*\)\].*/\1/p' .golangci.yml | tr -d ' ')
bad=$(git grep -h '^//go:build ' -- '*.go' | grep -vE " !?race$| (${tags//,/|})$" | sort -u) || true
[[ -z $bad ]] || { printf '.golangci.yml lacks a build tag of\n%s\n' "$bad"; failed=1; }

go vet ./... && go vet -tags "$tags" ./... || failed=1

"$tools/golangci-lint" run ./... || failed=1

if command -v mandoc >/dev/null; then
  mandoc -T lint -W warning docs/man/*.8 || failed=1
else
  echo "lint: mandoc is missing, which reads docs/man: apt-get install mandoc, or make tools"
  failed=1
fi

# What neither the programs nor a test call, and then what tests alone call: of that,
# test/tools/deadcode.keep says why it stays.
dead() { # PACKAGE…
  "$tools/deadcode" -f '{{range .Funcs}}{{println .Position .Name}}{{end}}' "$@" |
    sed -E 's/:[0-9]+:[0-9]+//; /^$/d' | sort -u
}
bad=$(dead -test -tags "$tags" ./...)
[[ -z $bad ]] || { printf 'deadcode: nothing calls\n%s\n' "$bad"; failed=1; }
bad=$(dead ./cmd/... | grep -vxF "$(sed 's/ *#.*//; /^$/d' test/tools/deadcode.keep)") || true
[[ -z $bad ]] || { printf 'deadcode: tests alone call\n%s\n' "$bad"; failed=1; }
exit $failed
