#!/bin/sh
# The end of `make release`: what goes with the archive and the packages that are in dist/ already.
# Licences and SBOM are of the archive's own content. Of one commit, by one release of Go and with
# the same Envoy, everything is the same byte for byte; `make soak GROUP=release` shows it.
#
#   VERSION  of the release; default: deploy/version.sh
set -eu
cd "$(dirname "$0")/.."

tool=github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
if [ "${1:-}" = build ]; then # FILE
	export CGO_ENABLED=0
	exec go -C deploy/sbom build -trimpath -ldflags='-s -w' -o "$2" $tool
fi

command -v jq >/dev/null || { echo "release: jq is missing: apt-get install jq" >&2; exit 1; }
version=$(deploy/version.sh)
name=service-proxy-agent-$version
for kind in .tgz _amd64.deb _arm64.deb .x86_64.rpm .aarch64.rpm; do
	ls dist/*"$kind" >/dev/null 2>&1 || {
		echo "release: there is no *$kind in dist/: run \`make release\`" >&2; exit 1; }
done
# SHA256SUMS has it.
rm -f "dist/$name.tgz.sha256"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
tar -xzf "dist/$name.tgz" -C "$work"
cp "$work/service-proxy-agent/THIRD_PARTY_LICENSES" dist/

# Its own sum is in what it writes, so it is built the same everywhere.
pins=$(cat deploy/sbom/go.sum deploy/release.sh; go version)
pins=$(echo "$pins" | sha256sum | cut -c 1-16)
sbom=$(test/kept.sh "cyclonedx-gomod-$pins" deploy/release.sh build)
time=$(date -u -d "@$(deploy/version.sh --time)" +%Y-%m-%dT%H:%M:%SZ)
for arch in amd64 arm64; do
	"$sbom" bin -json -std -noserial -notimestamp -version "$version" \
		-output "$work/$arch.json" "$work/service-proxy-agent/$arch/service-proxy-agent"
	jq --arg time "$time" '.metadata.timestamp = $time' "$work/$arch.json" >"dist/$name-$arch.cdx.json"
done

# LC_ALL: the same order everywhere.
cd dist
rm -f SHA256SUMS
LC_ALL=C ls | xargs -d '\n' sha256sum >"$work/sums"
mv "$work/sums" SHA256SUMS
chmod 0644 ./*
cat SHA256SUMS
