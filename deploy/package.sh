#!/bin/sh
# Makes dist/service-proxy-agent-VERSION.tgz, one archive for both architectures: `make package`.
#
#   VERSION  of the agent; default: git describe
#   ENVOY    an Envoy binary for amd64 to put in, or none; default: build/envoy-$ENVOY_VERSION, the one the tests use, where it is at hand
#   ENVOY_ARM64  the same for arm64; default: none
#   LDFLAGS  for go build; the version and commit are stamped in besides
#   OUT      the archive's path
set -eu
cd "$(dirname "$0")/.."

version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}
out=${OUT:-dist/service-proxy-agent-$version.tgz}
envoy=${ENVOY:-}
if [ -z "$envoy" ]; then
	envoy=build/envoy-${ENVOY_VERSION:-1.40.0}
	if [ ! -x "$envoy" ]; then
		echo "package: there is no $envoy, so the archive brings no Envoy: VMs need primary-source, or one on their image;" \
			"to put one in, run \`make tools\` first, or give ENVOY=FILE (ENVOY=none: go without, and no word of it)" >&2
		envoy=none
	fi
fi
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
top=$work/service-proxy-agent
mkdir -p "$top"
cp LICENSE deploy/service-proxy-agent-bootstrap.sh "$top/"
chmod 755 "$top/service-proxy-agent-bootstrap.sh"
for arch in amd64 arm64; do
	mkdir "$top/$arch"
	CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -trimpath -ldflags "-s -w -X main.version=$version -X main.commit=$commit ${LDFLAGS:-}" \
		-o "$top/$arch/service-proxy-agent" ./cmd/service-proxy-agent
done
# The manual and the shells' completion, where they shall be on the VM (internal/bootstrap/share.go).
share=$top/root/usr/local/share fish=$top/root/etc/fish/completions
mkdir -p "$share/man/man8" "$share/bash-completion/completions" "$share/zsh/site-functions" "$fish"
cp docs/man/*.8 "$share/man/man8/"
cp deploy/completion/service-proxy-agent.bash "$share/bash-completion/completions/service-proxy-agent"
cp deploy/completion/_service-proxy-agent "$share/zsh/site-functions/"
cp deploy/completion/service-proxy-agent.fish "$fish/"
put() { # FILE ARCH NAME-OF-THE-SETTING
	[ "$1" != none ] || return 0
	[ -f "$1" ] && [ -x "$1" ] || { echo "package: $3=$1: there is no such program; name an Envoy for $2, or none" >&2; exit 1; }
	cp "$1" "$top/$2/envoy"
	chmod 755 "$top/$2/envoy"
}
put "$envoy" amd64 ENVOY
put "${ENVOY_ARM64:-none}" arm64 ENVOY_ARM64

mkdir -p "$(dirname "$out")"
# The same content makes the same archive: sorted, no owners, one time.
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - service-proxy-agent | gzip -n -6 >"$out.new"
mv "$out.new" "$out"
sum=$(sha256sum "$out")
echo "${sum%% *}  $(basename "$out")" >"$out.sha256"
echo "$out: $(du -h "$out" | cut -f1), Envoy for amd64: $envoy, for arm64: ${ENVOY_ARM64:-none}"
