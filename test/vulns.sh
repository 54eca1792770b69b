#!/usr/bin/env bash
# make vulns: known vulnerabilities in what the program calls. Not part of `make test`: the answer
# changes with the day and with the Go that is installed, not with the code. The database is made of
# the module golang.org/x/vulndb, as the Go proxy has it today (its index alone takes a minute), so
# that no other server needs to be reached.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/build/tools
mkdir -p "$tools"
GOBIN=$tools go -C test/tools install -ldflags='-s -w' golang.org/x/vuln/cmd/govulncheck

version=$(go list -m -f '{{.Version}}' golang.org/x/vulndb@latest)
db=$tools/vulndb-$version
if [[ ! -d $db ]]; then
  rm -rf "$tools"/vulndb-*
  entries=$(go mod download -json "golang.org/x/vulndb@$version" | sed -nE 's/^\t"Dir": "(.*)",$/\1/p')/data/osv
  go run "golang.org/x/vulndb/cmd/indexdb@$version" -vulns "$entries" -out "$db.part"
  mv "$db.part" "$db"
fi
echo "vulns: database $version, $(go version)"
exec "$tools/govulncheck" -db "file://$db" ./cmd/...
