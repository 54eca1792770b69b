//go:build lab

package e2e

import (
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestArchiveCannotStart runs the archive's script with the real program where neither can do its
// work: each says so in one line, and has changed nothing. All of it happens in a mount namespace
// of its own, in which there is no systemd, and the machine's folders are not the machine's.
func TestArchiveCannotStart(t *testing.T) {
	agent, err := mesh.Binary()
	if err != nil {
		t.Fatal(err)
	}
	const script = "service-proxy-agent-bootstrap.sh"
	const noSystemd = ": systemd does not run here (there is no /run/systemd/system); use an image that " +
		"boots with systemd; beside an Envoy of your own, `service-proxy-agent run` needs none"
	for _, tt := range []struct {
		name    string
		prepare string // by a shell, in the namespace; $here is the archive's folder
		run     string
		want    string
	}{
		{"no systemd", "", "./" + script, noSystemd},
		{"no systemd, noexec folder", "mount -o remount,bind,noexec $here", "sh " + script, noSystemd},
		{"noexec folder, and /var/lib", "mount -o remount,bind,noexec $here; " +
			"mount -o remount,bind,noexec /var/lib", "sh " + script, noSystemd},
		{"noexec everywhere", "for d in $here /var/lib /usr/local/lib /run; do " +
			"mount -o remount,bind,noexec $d; done", "sh " + script,
			": the program of the archive does not run here ("},
		{"another machine", "mkdir /run/bin; printf '#!/bin/sh\\necho riscv64\\n' >/run/bin/uname; " +
			"chmod 755 /run/bin/uname; PATH=/run/bin:$PATH", "./" + script,
			": there is no build for riscv64; use a machine type of x86-64 or Arm64"},
		{"half an archive", "rm -r $here/" + runtime.GOARCH, "./" + script, "; unpack all of it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			here := filepath.Join(t.TempDir(), "service-proxy-agent")
			arch := filepath.Join(here, runtime.GOARCH)
			if err := os.MkdirAll(arch, 0o755); err != nil {
				t.Fatal(err)
			}
			copied, err := exec.Command("sh", "-c", `cp "$1" "$2/service-proxy-agent" && cp ../../deploy/`+
				script+` "$3/"`, "sh", agent, arch, here).CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, copied)
			}
			cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh",
				"-euc", `here=$1; mount --bind "$here" "$here"
for d in /run /var/lib /usr/local/lib; do mount -t tmpfs tmpfs $d; done
`+tt.prepare+`
cd "$here"; code=0; `+tt.run+` || code=$?
echo "exit $code"; find /run /var/lib /usr/local/lib -name '*service-proxy*' -not -path '/var/lib/service-proxy-agent*'`,
				"sh", here)
			cloud := platform.New(platform.VM{})
			defer cloud.Close()
			metadata := httptest.NewServer(cloud)
			defer metadata.Close()
			cmd.Env = append(os.Environ(),
				"GCE_METADATA_HOST="+strings.TrimPrefix(metadata.URL, "http://"))
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			t.Logf("%s", out)
			// The program's own log goes to stderr as JSON; what a person is told is the line of its name.
			var said []string
			exit, left := "", ""
			for line := range strings.Lines(string(out)) {
				line = strings.TrimSuffix(line, "\n")
				switch {
				case strings.HasPrefix(line, "service-proxy-agent: "):
					said = append(said, line)
				case strings.HasPrefix(line, "exit "):
					exit = line
				case strings.HasPrefix(line, "/"):
					left += line + "\n"
				}
			}
			if len(said) != 1 || !strings.Contains(said[0], tt.want) || exit != "exit 1" || left != "" {
				t.Errorf("it says %q, and %q; want one line with %q; left %q", said, exit, tt.want, left)
			}
			// What the program refuses it tells outside, too.
			if guest := cloud.GuestAttributes(guestattr.Namespace); tt.want == noSystemd &&
				(guest[guestattr.BootstrapStatus] != progress.Failed ||
					!strings.Contains(guest[guestattr.BootstrapLastFailure], tt.want)) {
				t.Errorf("guest attributes %q", guest)
			}
			if name, _ := os.ReadFile("/etc/os-release"); len(said) > 0 && len(name) > 0 &&
				strings.Contains(said[0], ": this system: ") {
				t.Errorf("%s does not name the system", said[0])
			}
		})
	}
}
