#!/bin/sh
# Makes the .deb and .rpm of the agent and of Envoy, for amd64 and arm64, in dist/: `make packages`.
# The same commit makes the same packages, byte for byte.
#
#   VERSION       of the agent; default: deploy/version.sh
#   ENVOY         an Envoy binary for amd64, or none; default: the one that the tests use
#   ENVOY_ARM64   the same for arm64
#   ARCHES        default: amd64 arm64
#   KINDS         default: deb rpm
#   SOURCE_DATE_EPOCH  the time of all files, in seconds; default: the commit's
#   LDFLAGS       for go build; version, commit and layout are stamped in besides
#   OUT           the folder; default: dist
set -eu
cd "$(dirname "$0")/../.."

if [ "${1:-}" = build ]; then # FILE: nfpm, kept by test/kept.sh
	export CGO_ENABLED=0 GOFLAGS=
	exec go -C deploy/packages/tools build -trimpath -ldflags='-s -w' -o "$2" \
		github.com/goreleaser/nfpm/v2/cmd/nfpm
fi
pins=$(cat deploy/packages/tools/go.sum; go version)
nfpm=$(test/kept.sh "nfpm-$(echo "$pins" | sha256sum | cut -c 1-16)" deploy/packages/build.sh build)

version=$(deploy/version.sh) commit=$(deploy/version.sh --commit)
package_version=$(deploy/version.sh --package) SOURCE_DATE_EPOCH=$(deploy/version.sh --time)
export SOURCE_DATE_EPOCH
envoy_version=${ENVOY_VERSION:-1.40.0}
out=${OUT:-dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# envoy ARCH GIVEN: prints which Envoy is packed, or none.
envoy() {
	[ -z "$2" ] || { echo "$2"; return; }
	fetched=build/envoy-$envoy_version-$1
	[ -x "$fetched" ] || [ "$(go env GOHOSTARCH)" != "$1" ] || fetched=build/envoy-$envoy_version
	[ -x "$fetched" ] || test/tools.sh build "${fetched#build/envoy-}" >&2 || {
		echo "packages: there is no Envoy $envoy_version for $1, so there is no package of it:" \
			"to have one give its file; to go without, none" >&2
		fetched=none
	}
	echo "$fetched"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
umask 022
layout='-X github.com/service-proxy-agent/service-proxy-agent/internal/layout.of=packages'
export MAINTAINER='The service-proxy-agent authors <service-proxy-agent@users.noreply.github.com>'
day=$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
docs() { # FOLDER PACKAGE COPYRIGHT: what each package says of itself
	mkdir -p "$1/doc/deb" "$1/doc/rpm"
	cp "$3" "$1/doc/deb/copyright"
	cp LICENSE "$1/doc/rpm/LICENSE"
	cat >"$1/doc/deb/changelog" <<-END
		$2 ($PACKAGE_VERSION) stable; urgency=medium

		  * What changed is in the release notes, at
		    https://github.com/service-proxy-agent/service-proxy-agent/releases

		 -- $MAINTAINER  $day
	END
	gzip -9n "$1/doc/deb/changelog"
}
rpm_only() { # FOLDER CONFIGURATION PACKAGE: what nfpm takes by its name alone
	# A folder that no package owns would stay behind. dpkg needs no such entry.
	printf '  - dst: %s\n    type: dir\n    packager: rpm\n' "/usr/share/licenses/$3" >>"$1/$2"
	(cd "$1" && for file in root/doc/rpm/*; do
		printf '  - src: %s\n    dst: %s\n    type: license\n    packager: rpm\n' "$file" \
			"/usr/share/licenses/$3/${file##*/}" >>"$2"
	done
	for file in root/usr/share/man/man8/*; do
		[ ! -e "$file" ] || printf '  - src: %s\n    dst: %s\n    type: doc\n    packager: rpm\n' \
			"$file" "${file#root}" >>"$2"
	done)
}
pack() { # FOLDER CONFIGURATION ARCH
	find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	(cd "$1" && for kind in ${KINDS:-deb rpm}; do
		ARCH=$3 "$nfpm" package --config "$2" --packager $kind --target "$out/" >"$work/said" 2>&1 ||
			{ cat "$work/said" >&2; exit 1; }
		sed -n "s|^created package: $out/|packages: |p" "$work/said" >&2
	done)
}

export PACKAGE_VERSION=$package_version
root=$work/agent/root
mkdir -p "$root"
go run -ldflags "$layout" ./deploy/packages/stage "$root"
gzip -9n "$root"/usr/share/man/man8/*.8
put() { mkdir -p "$(dirname "$root/$2")" && cp "$1" "$root/$2"; }
put deploy/completion/service-proxy-agent.bash usr/share/bash-completion/completions/service-proxy-agent
put deploy/completion/service-proxy-agent.fish usr/share/fish/vendor_completions.d/service-proxy-agent.fish
put deploy/completion/_service-proxy-agent zsh
put deploy/packages/default default
put deploy/packages/needrestart.conf needrestart.conf
put deploy/packages/agent.overrides overrides
put deploy/packages/preset usr/lib/systemd/system-preset/80-service-proxy-agent.preset
docs "$root" service-proxy-agent deploy/packages/copyright
go run ./deploy/licenses >"$root/doc/rpm/THIRD_PARTY_LICENSES" # of what is linked in
gzip -9nc "$root/doc/rpm/THIRD_PARTY_LICENSES" >"$root/doc/deb/THIRD_PARTY_LICENSES.gz"
cp -r deploy/packages/scripts deploy/packages/*.yaml "$work/agent/"
chmod 755 "$work"/agent/scripts/*
rpm_only "$work/agent" agent.yaml service-proxy-agent
for arch in ${ARCHES:-amd64 arm64}; do
	mkdir -p "$root/usr/bin"
	CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -trimpath -buildvcs=false \
		-ldflags "-s -w -X main.version=$version -X main.commit=$commit $layout ${LDFLAGS:-}" \
		-o "$root/usr/bin/service-proxy-agent" ./cmd/service-proxy-agent
	pack "$work/agent" agent.yaml "$arch"
done

# Of the agent's version, too: an Envoy package of one name and version is one package for ever.
export PACKAGE_VERSION=$envoy_version+$package_version
root=$work/envoy/root
put deploy/packages/envoy.overrides overrides
docs "$root" service-proxy-agent-envoy deploy/packages/copyright.envoy
cp -r deploy/packages/scripts deploy/packages/*.yaml "$work/envoy/"
chmod 755 "$work"/envoy/scripts/*
rpm_only "$work/envoy" envoy.yaml service-proxy-agent-envoy
for arch in ${ARCHES:-amd64 arm64}; do
	case $arch in amd64) given=${ENVOY:-} ;; *) given=${ENVOY_ARM64:-} ;; esac
	file=$(envoy "$arch" "$given")
	[ "$file" != none ] || continue
	LIBC=$(go run ./deploy/packages/stage --libc "$file")
	export LIBC
	put "$file" usr/lib/service-proxy-agent/envoy
	chmod 755 "$root/usr/lib/service-proxy-agent/envoy"
	pack "$work/envoy" envoy.yaml "$arch"
done
