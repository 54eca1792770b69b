#!/bin/sh
# The same without OS Config, for images that lack its agent: a plain startup-script, run at each
# boot. The VM needs the metadata enable-guest-attributes=TRUE and gce-service-proxy, whose JSON
# https://github.com/service-proxy-agent/service-proxy-agent/blob/main/docs/attribute.md describes.
# Order nothing after google-startup-scripts.service: it is still running while this does.
set -eu
archive=gs://BUCKET/service-proxy-agent-VERSION.tgz
# Not in /tmp: what is run from there would fail where that is mounted noexec.
dir=/var/lib/service-proxy-agent-download
rm -rf "$dir"
mkdir -m 700 "$dir"
trap 'rm -rf "$dir"' EXIT
gsutil -q cp "$archive" "$dir/a.tgz"
tar -xzf "$dir/a.tgz" -C "$dir"
"$dir/service-proxy-agent/service-proxy-agent-bootstrap.sh"
