#!/bin/sh
# Installs the agent from the unpacked archive that this script stands in. It is what gcloud's own
# recipe runs, as
# ${SERVICE_PROXY_AGENT_DIRECTORY}/service-proxy-agent/service-proxy-agent-bootstrap.sh, and what a
# startup-script may run; as often as one likes.
#
# OS Config runs it once per disk, even if it fails, and waits until its output is closed; the
# folder is deleted afterwards. So it starts units, without waiting for them, and ends: every retry
# is the program's own.
#
# The program says by itself where it cannot be installed. This script says where it cannot start.
set -eu

refuse() {
	name=$([ ! -r /etc/os-release ] || . /etc/os-release; echo "${PRETTY_NAME:-this system}")
	echo "service-proxy-agent: $name: $1" >&2
	exit 1
}
here=$(cd "$(dirname "$0")" && pwd)
case $(uname -m) in
x86_64) arch=amd64 ;;
aarch64) arch=arm64 ;;
*) refuse "there is no build for $(uname -m); use a machine type of x86-64 or Arm64" ;;
esac
agent=$here/$arch/service-proxy-agent
[ -f "$agent" ] || refuse "the archive in $here has no $arch/service-proxy-agent; unpack all of it"
why=$("$agent" version 2>&1 >/dev/null) && exec "$agent" bootstrap --archive "$here" </dev/null

# A folder that is mounted noexec, as /tmp may be: the program is run from a copy elsewhere, and
# reads the rest of the archive where it is.
for dir in /var/lib /usr/local/lib /run; do
	copy=$(mktemp -d "$dir/service-proxy-agent-start.XXXXXX" 2>/dev/null) || continue
	trap 'rm -rf "$copy"' EXIT
	if cp "$agent" "$copy/" 2>/dev/null && "$copy/service-proxy-agent" version >/dev/null 2>&1; then
		"$copy/service-proxy-agent" bootstrap --archive "$here" </dev/null
		exit
	fi
	rm -rf "$copy"
done
refuse "the program of the archive does not run here (${why:-no reason given}), in $here, /var/lib, /usr/local/lib or /run; unpack it where programs may run (a folder that is not mounted noexec)"
