#!/usr/bin/env bash
# make soak GROUP=release: two releases of this commit are the same byte for byte. One is made of a
# clone, the other of git's archive, as a tarball of GitHub's is one: in another folder, with empty
# caches of Go's, another umask and another time zone. Then each part is looked at.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -z $(git status --porcelain) ]] ||
  { echo "release: commit first: a release is a commit's" >&2; exit 1; }
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT

git clone -q . "$tmp/clone"
mkdir "$tmp/archive"
git archive HEAD | tar -x -C "$tmp/archive"
for dir in clone archive; do
  mkdir "$tmp/$dir/build"
  cp -l build/envoy-* "$tmp/$dir/build/" 2>/dev/null || cp build/envoy-* "$tmp/$dir/build/"
done
unset ENVOY AGENT PROMTOOL GOFLAGS SOURCE_DATE_EPOCH
# Of a commit without a tag an archive does not know how many came before it.
VERSION=$(unset VERSION; deploy/version.sh)
export VERSION
make -C "$tmp/clone" release
(
  umask 077
  export GOCACHE=$tmp/cache TZ=Pacific/Chatham LC_ALL=C LANG=C
  make -C "$tmp/archive" release
)
diff "$tmp/clone/dist/SHA256SUMS" "$tmp/archive/dist/SHA256SUMS"

cd "$tmp/clone/dist"
sha256sum -c --quiet SHA256SUMS
diff <(cut -d ' ' -f 3 SHA256SUMS) <(LC_ALL=C ls -I SHA256SUMS)

# The SBOM against what the program itself says, in either case beside Go's standard library.
tar -xzf service-proxy-agent-*.tgz
diff THIRD_PARTY_LICENSES service-proxy-agent/THIRD_PARTY_LICENSES
arch=$(go env GOHOSTARCH)
said=$("service-proxy-agent/$arch/service-proxy-agent" version -o json)
for sbom in *.cdx.json; do
  diff <(jq -r '.components[] | select(.name != "std") | .name + " " + .version' "$sbom" | sort) \
    <(jq -r '.modules[] | .path + " " + .version' <<<"$said" | sort)
  jq -e '.metadata.component.version and .metadata.timestamp' "$sbom" >/dev/null
done

# Pre-releases sort before their release, as apt sees it.
before=
for version in 1.2.3-rc.1 1.2.3-rc.1.dev.9+g2 1.2.3-rc.1.dev.10+g1 1.2.3-rc.2 1.2.3 \
  1.2.4-dev.1+g0 1.2.4; do
  version=$(VERSION=$version "$tmp/clone/deploy/version.sh" --package)
  [[ -z $before ]] || dpkg --compare-versions "$before" lt "$version" ||
    { echo "release: $before is not before $version"; exit 1; }
  before=$version
done
echo "release: the same twice: $(sha256sum SHA256SUMS)"
