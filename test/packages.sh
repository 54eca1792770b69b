#!/bin/sh
# What the packages hold, that they are clean and reproducible. The
# tools of both kinds are installed by apt where they are missing; elsewhere it says what to install.
set -eu
cd "$(dirname "$0")/.."
missing=
for tool in lintian rpmlint rpm; do
	command -v $tool >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
	if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
		echo "packages: missing$missing: install the packages of these names" >&2
		exit 1
	fi
	echo "packages: installing$missing (apt)"
	apt-get -qq -o DPkg::Lock::Timeout=300 update
	# shellcheck disable=SC2086 # words
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
		--no-install-recommends install $missing >/dev/null
fi
go test -vet=off -tags packages -count=1 -timeout 10m "$@" ./test/packages
