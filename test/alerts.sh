#!/usr/bin/env bash
# make alerts: promtool checks what is in deploy/prometheus, and plays the unit tests of its rules.
# Needs build/promtool (make tools, or PROMTOOL).
set -euo pipefail
cd "$(dirname "$0")/../deploy/prometheus"
promtool=${PROMTOOL:-../../build/promtool}

"$promtool" check rules --lint=all --lint-fatal rules/*.yml
for config in prometheus.yml prometheus-tls.yml; do
  "$promtool" check config --lint=all --lint-fatal "$config"
done
"$promtool" test rules tests/*.yml
