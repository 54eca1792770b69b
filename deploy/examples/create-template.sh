#!/bin/sh
# An instance template whose VMs are mesh nodes of this agent. gcloud's own flags do it all:
# --service-proxy-agent-location (not shown by --help) only changes which archive gcloud's
# own recipe installs.
#
#   gcloud storage cp dist/service-proxy-agent-VERSION.tgz gs://BUCKET/
#   ./create-template.sh TEMPLATE gs://BUCKET/service-proxy-agent-VERSION.tgz
#
# The VMs' service account needs roles/trafficdirector.client, roles/logging.logWriter, and
# roles/storage.objectViewer on the bucket; the project needs trafficdirector.googleapis.com and
# logging.googleapis.com enabled.
set -eu
template=$1 archive=$2
exec gcloud compute instance-templates create "$template" \
	--service-proxy enabled,serving-ports='80;8080',proxy-port=15001 \
	--service-proxy-labels app=review,version=canary \
	--service-proxy-agent-location "$archive"
