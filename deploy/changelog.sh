#!/bin/sh
# Prints what CHANGELOG.md says of a version: the notes of its release. Fails where it says nothing.
# Of a commit that is no version's (deploy/version.sh) that is what is unreleased, maybe nothing.
# usage: changelog.sh VERSION
set -eu
cd "$(dirname "$0")/.."
[ $# = 1 ] || { echo "usage: changelog.sh VERSION" >&2; exit 64; }
case $1 in
*dev.*) heading="## Unreleased" empty=1 ;;
*) heading="## $1 - " empty=0 ;; # and the day
esac
awk -v heading="$heading" -v empty=$empty '
	/^## / { on = index($0, heading) == 1; found = found || on && empty; next }
	on && (/./ || said) { print; found = said = 1 }
	END { exit !found }
' CHANGELOG.md || {
	echo "changelog: CHANGELOG.md says nothing under \"$heading\"" >&2
	exit 1
}
