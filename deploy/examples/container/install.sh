#!/bin/sh
# Installs the agent without bootstrap, for an Envoy that runs from an image: program, units, users
# and folders. It enables and starts nothing.
#
#   install.sh PROGRAM    the service-proxy-agent to install, from an archive or from build/
#   ROOT                  the folder that stands for /; default: /
set -eu
program=$(realpath "$1") root=${ROOT:-}
cd "$(dirname "$0")/../../.."

install -D -m 755 "$program" "$root/usr/local/bin/service-proxy-agent"
for unit in agent.service interception.service ready.service ready.path ready.target \
	rotate.service rotate.timer; do
	install -D -m 644 "systemd/units/service-proxy-$unit" \
		"$root/usr/local/lib/systemd/system/service-proxy-$unit"
done
for kind in sysusers.d tmpfiles.d; do
	install -D -m 644 "systemd/$kind/service-proxy-agent.conf" \
		"$root/usr/local/lib/$kind/service-proxy-agent.conf"
done
cd deploy/examples/container
install -D -m 644 service-proxy-envoy.service "$root/etc/systemd/system/service-proxy-envoy.service"
[ -e "$root/etc/default/service-proxy-agent" ] ||
	install -D -m 644 service-proxy-agent.default "$root/etc/default/service-proxy-agent"
systemd-sysusers --root="${root:-/}" service-proxy-agent.conf
systemd-tmpfiles --root="${root:-/}" --create service-proxy-agent.conf
[ -n "$root" ] || systemctl daemon-reload
