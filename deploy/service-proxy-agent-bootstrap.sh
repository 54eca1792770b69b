#!/bin/sh
# Installs the agent from the unpacked archive that this script stands in. It is what gcloud's own
# recipe runs, as
# ${SERVICE_PROXY_AGENT_DIRECTORY}/service-proxy-agent/service-proxy-agent-bootstrap.sh, and what a
# startup-script may run; as often as one likes.
#
# OS Config runs it once per disk, even if it fails, and waits until its output is closed; the
# folder is deleted afterwards. So it starts units, without waiting for them, and ends: every retry
# is the program's own.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
case $(uname -m) in
x86_64) arch=amd64 ;;
aarch64) arch=arm64 ;;
*)
	echo "service-proxy-agent: there is no build for $(uname -m)" >&2
	exit 1
	;;
esac
exec "$here/$arch/service-proxy-agent" bootstrap --archive "$here" </dev/null
