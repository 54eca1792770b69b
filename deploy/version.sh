#!/bin/sh
# The one place that knows which version this is: a semantic version, of git's tags.
#
#   at v1.2.3                     1.2.3
#   5 commits after it            1.2.4-dev.5+g0123456789ab
#   5 commits after v1.3.0-rc.1   1.3.0-rc.1.dev.5+g0123456789ab
#   5 commits, and no tag yet     0.0.0-dev.5+g0123456789ab
#   with changes                  …+g0123456789ab.dirty, never a tag's own
#
# A shallow clone that has no tag cannot count: it is 0.0.0-dev.0+g0123456789ab. An archive that git
# or GitHub made of a commit has all it takes below (.gitattributes). A folder that is neither is
# 0.0.0-dev.0+unknown.
#
# usage: version.sh [--package|--commit|--time]
#   --package  the version as .deb and .rpm write it: a ~ sorts before what follows
#   --commit   the commit, its first 12 digits
#   --time     when it was committed, in seconds: the SOURCE_DATE_EPOCH of what is built
# Where VERSION or SOURCE_DATE_EPOCH are set, they are the answer.
set -eu
cd "$(dirname "$0")/.."
export GIT_OPTIONAL_LOCKS=0

archived='$Format:%H %ct %(describe:tags=true,match=v[0-9]*.[0-9]*.[0-9]*,abbrev=12)$'

# look sets commit, time, dirty, described as `git describe` has it, and count if there is no tag.
look() {
	commit=unknown time=0 described='' dirty='' count=0
	case $archived in
	\$Format*)
		# Unpacked within another repository, this is not that one's commit.
		[ -e .git ] || return 0
		commit=$(git rev-parse --verify HEAD) || { commit=unknown; return 0; }
		time=$(git log -1 --format=%ct)
		[ -z "$(git status --porcelain --untracked-files=no)" ] || dirty=.dirty
		if described=$(git describe --tags --match 'v[0-9]*.[0-9]*.[0-9]*' --abbrev=12 2>/dev/null); then
			return 0
		fi
		[ "$(git rev-parse --is-shallow-repository)" = true ] || count=$(git rev-list --count HEAD)
		;;
	*)
		read -r commit time described <<-END
			$archived
		END
		# A git before 2.32 leaves it as it is.
		case $described in %*) described='' ;; esac
		;;
	esac
}

short() { echo "$commit" | cut -c 1-12; }

semantic() {
	tag=$described
	case $described in
	*-*-g*[0-9a-f])
		count=${described%-g*} count=${count##*-}
		tag=${described%-"$count"-g*} ;;
	esac
	case $commit in unknown) build=+unknown ;; *) build=+g$(short)$dirty ;; esac
	case $tag in
	'') echo "0.0.0-dev.$count$build" ;;
	"$described$dirty") echo "${tag#v}" ;; # the tag itself, without changes
	*-*) echo "${tag#v}.dev.$count$build" ;;
	*) tag=${tag#v} patch=${tag##*.}
		echo "${tag%.*}.$((patch + 1))-dev.$count$build" ;;
	esac
}

case ${1:-} in
'' | --package)
	version=${VERSION:-}
	[ -n "$version" ] || { look; version=$(semantic); }
	[ -z "${1:-}" ] || version=$(echo "$version" | sed 's/-/~/; s/-/./g')
	echo "$version" ;;
--commit) look; short ;;
--time) [ -n "${SOURCE_DATE_EPOCH:-}" ] || look; echo "${SOURCE_DATE_EPOCH:-$time}" ;;
*) sed -n 's/^# usage: /usage: /p' "$0" >&2; exit 64 ;;
esac
