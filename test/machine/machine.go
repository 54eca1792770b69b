// Package machine is what a whole VM of a test meets beside its own disk, whether it is booted in a
// container (test/box) or by an emulator (test/vm): Compute Engine and Traffic Director under their
// names and certificates in the "service" of a lab, the release's archive, and what Google's image
// installs it with.
package machine

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// Addresses of Google's names, all in the lab's "service".
const (
	controlPlaneAddr  = "10.131.0.1"
	storageAddr       = "10.131.0.2" // and logging
	controlPlaneAddr6 = "fd31::1"
	storageAddr6      = "fd31::2"
)

// Where the release's archive is.
const (
	Bucket  = "the-bucket"
	Archive = "service-proxy-agent.tgz"
)

// Options of what is outside.
type Options struct {
	VM   platform.VM          // what the metadata server says of the VM
	IPv6 bool                 // all is reached by IPv6 alone
	CA   *authority.Authority // nil: a new one
}

// Surroundings are the servers; they end with the test.
type Surroundings struct {
	Platform     *platform.Emulator
	ControlPlane *controlplane.Server
	CA           *authority.Authority // of their certificates
}

// Surround starts metadata server, resolver, Cloud Storage, Cloud Logging and a control plane that
// has no configuration yet.
func Surround(t testing.TB, l *lab.Lab, opts Options) Surroundings {
	t.Helper()
	s := Surroundings{CA: opts.CA}
	if s.CA == nil {
		ca, err := authority.New()
		if err != nil {
			t.Fatal(err)
		}
		s.CA = ca
	}
	metadata, controlPlane, storage := lab.MetadataAddr.String(), controlPlaneAddr, storageAddr
	if opts.IPv6 {
		metadata, controlPlane, storage = lab.MetadataAddr6.String(), controlPlaneAddr6, storageAddr6
		for _, addr := range []string{controlPlane, storage} {
			if out, err := l.Service.Run(context.Background(), "ip", "addr", "add", addr+"/128", "dev",
				"lo", "nodad"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	}
	s.Platform = platform.New(opts.VM)
	t.Cleanup(func() {
		if err := s.Platform.Close(); err != nil {
			t.Error(err)
		}
	})
	listen := func(addr string) net.Listener {
		ln, err := l.Service.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	s.Platform.Serve(listen(net.JoinHostPort(metadata, "80")), nil)
	dns, err := l.Service.ListenPacket("udp", net.JoinHostPort(metadata, "53"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dns.Close() })
	go serveDNS(dns, map[string]string{
		"metadata.google.internal": metadata, "trafficdirector.googleapis.com": controlPlane,
		"storage.googleapis.com": storage, "logging.googleapis.com": storage,
	})
	cert, err := s.CA.Certificate("storage.googleapis.com", "logging.googleapis.com")
	if err != nil {
		t.Fatal(err)
	}
	s.Platform.Serve(listen(net.JoinHostPort(storage, "443")), &cert)

	cert, err = s.CA.Certificate("trafficdirector.googleapis.com")
	if err != nil {
		t.Fatal(err)
	}
	s.ControlPlane = controlplane.New(controlplane.Options{
		Listen: func() (net.Listener, error) {
			return l.Service.Listen("tcp", net.JoinHostPort(controlPlane, "443"))
		},
		Certificate: &cert,
	})
	if err := s.ControlPlane.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.ControlPlane.Close)
	return s
}

// ModuleRoot is the folder of go.mod, for a test in a folder below test.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Kept is the path of what the command makes, now or in an earlier run (test/kept.sh).
func Kept(t testing.TB, name string, command ...string) string {
	t.Helper()
	cmd := exec.Command("../kept.sh", append([]string{name}, command...)...)
	var said strings.Builder
	cmd.Stderr = &said
	dir, err := cmd.Output()
	if err != nil {
		t.Fatalf("make %s (Debian's servers, once): %v\n%s", name, err, &said)
	}
	return strings.TrimSpace(string(dir))
}

// For is the command as it runs where programs of that architecture do (test/foreign.sh).
func For(arch string, command ...string) []string {
	if arch == runtime.GOARCH {
		return command
	}
	return append([]string{"../foreign.sh", arch}, command...)
}

// RootFS is the folder with a Debian release's root filesystem, which is made where this machine
// has none. Go and Debian have the same names for architectures.
func RootFS(t testing.TB, release, arch string) string {
	t.Helper()
	const script = "../box/rootfs.sh"
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("rootfs-%s-%s-%.8x", release, arch, sha256.Sum256(text))
	return Kept(t, name, For(arch, script, release, arch)...)
}

// Gsutil is Google's image's part: `gsutil [-q] cp gs://BUCKET/OBJECT DEST`, with the VM's token.
// That -q stands before the command, and that a DEST which is a folder gets a file of the object's
// name, is from `gsutil help` and `gsutil help cp`; that it exits with 1 when it fails, from
// gslib/__main__.py. The real one asks the JSON API; what it says on the wire is not seen here.
const Gsutil = `#!/bin/sh
set -eu
[ "$1" != -q ] || shift
[ "$1" = cp ] && [ $# = 3 ] || { echo "CommandException: $*" >&2; exit 1; }
metadata=http://metadata.google.internal/computeMetadata/v1
token=$(curl -sf -H Metadata-Flavor:Google $metadata/instance/service-accounts/default/token |
	sed 's/.*"access_token": *"\([^"]*\)".*/\1/')
dest=$3
[ ! -d "$dest" ] || dest=$dest/$(basename "$2")
curl -sSf --cacert /usr/local/share/ca-certificates/test.crt -H "Authorization: Bearer $token" \
	-o "$dest" "https://storage.googleapis.com/${2#gs://}" || exit 1
`

// Recipe is the script step of gcloud's software recipe, word for word as gcloud writes it into
// gce-software-declaration, with what the OS Config agent does around it: a temporary folder that
// is deleted afterwards, and waiting for stdout to close. (The archive's folder gcloud leaves; here
// it goes, too, as it does at a boot.)
const Recipe = `#! /bin/bash
cd "$(mktemp -d)"
trap 'rm -rf "$SERVICE_PROXY_AGENT_DIRECTORY" "$PWD"' EXIT
export SERVICE_PROXY_AGENT_DIRECTORY=$(mktemp -d)
sudo gsutil cp gs://` + Bucket + "/" + Archive + ` ${SERVICE_PROXY_AGENT_DIRECTORY}
ARCHIVE_NAME=$(ls ${SERVICE_PROXY_AGENT_DIRECTORY})
sudo tar -xzf ${SERVICE_PROXY_AGENT_DIRECTORY}/${ARCHIVE_NAME} -C ${SERVICE_PROXY_AGENT_DIRECTORY}
${SERVICE_PROXY_AGENT_DIRECTORY}/service-proxy-agent/service-proxy-agent-bootstrap.sh
`

var built struct {
	sync.Mutex
	archives map[string][]byte
	packages map[string]map[string][]byte
}

// Release is deploy/package.sh's archive of that version, with that Envoy for the architecture
// ("none": without; "": the one that is brought by default). It has none for the other one, which
// would take seconds to pack.
func Release(t testing.TB, version, arch, envoy string) []byte {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	key := version + " " + arch + " " + envoy
	if built.archives[key] == nil {
		out := filepath.Join(t.TempDir(), "a.tgz")
		cmd := exec.Command(filepath.Join(ModuleRoot(t), "deploy", "package.sh"))
		cmd.Env = append(os.Environ(), "VERSION="+version, "ENVOY=none", "ENVOY_ARM64=none", "OUT="+out,
			map[string]string{"amd64": "ENVOY=", "arm64": "ENVOY_ARM64="}[arch]+envoy)
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("package: %v\n%s", err, said)
		}
		text, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if built.archives == nil {
			built.archives = map[string][]byte{}
		}
		built.archives[key] = text
	}
	return built.archives[key]
}

// Packages are the .deb of that version for this machine's architecture, by name, and that of Envoy
// where it is given ("none": without).
func Packages(t testing.TB, version, envoy string) map[string][]byte {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	key := version + " " + envoy
	if built.packages[key] != nil {
		return built.packages[key]
	}
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(ModuleRoot(t), "deploy", "packages", "build.sh"))
	setting := map[string]string{"amd64": "ENVOY", "arm64": "ENVOY_ARM64"}[runtime.GOARCH]
	cmd.Env = append(os.Environ(), "VERSION="+version, "KINDS=deb", "ARCHES="+runtime.GOARCH,
		setting+"="+envoy, "OUT="+dir)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("packages: %v\n%s", err, said)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatal("no packages", err)
	}
	all := map[string][]byte{}
	for _, entry := range entries {
		if all[entry.Name()], err = os.ReadFile(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	if built.packages == nil {
		built.packages = map[string]map[string][]byte{}
	}
	built.packages[key] = all
	return all
}
