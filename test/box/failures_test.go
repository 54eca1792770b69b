//go:build box

package box

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// fakeEnvoy is a program that says this version and, asked to validate a configuration, refuses it.
func fakeEnvoy(t *testing.T, version string) []byte {
	t.Helper()
	dir := t.TempDir()
	source := fmt.Sprintf(`package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("envoy  version: 0123456789abcdef/%s/Clean/RELEASE/BoringSSL")
		return
	}
	fmt.Fprintln(os.Stderr, "error initializing configuration: no such field: 'load_stats_config'")
	os.Exit(1)
}
`, version)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", "envoy", "main.go")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(dir, "envoy"))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func envoyTgz(t *testing.T, content []byte) []byte {
	return tgz(
		t, entry{tar.Header{Name: "usr/local/bin/envoy", Mode: 0o755, Typeflag: tar.TypeReg}, content})
}

// waitFailure waits until bootstrap has failed with a line that holds all the words, and checks the
// line's form and that nothing half-installed is there.
func (v *VM) waitFailure(limit time.Duration, words ...string) {
	v.t.Helper()
	v.eventually(limit, fmt.Sprintf("a failure with %q", words), func() error {
		state := v.state()
		for _, word := range words {
			if state.Status != progress.Failed || !strings.Contains(state.FailureLine(), word) {
				return fmt.Errorf("it is %q: %s", state.Status, state.FailureLine())
			}
		}
		return nil
	})
	line := v.state().FailureLine()
	if strings.Contains(line, "\n") || len(line) > 1024 ||
		!strings.Contains(line, "it is tried again") {
		v.t.Errorf("not one line of at most 1 KB that says what comes next: %q", line)
	}
	if strings.Contains(line, "SECRET") {
		v.t.Errorf("a URL's query is shown: %q", line)
	}
	v.t.Logf("%s", line)
	for _, dir := range []string{"usr/local/bin", "etc/service-proxy-agent",
		"usr/local/lib/service-proxy-agent"} {
		if left, err := filepath.Glob(filepath.Join(v.root, dir, ".*new*")); err != nil || len(left) > 0 {
			v.t.Errorf("half installed: %v, %v", left, err)
		}
	}
}

// forget takes Envoy and its configuration off the VM, so that the next case
// starts as the first did.
func (v *VM) forget() {
	v.t.Helper()
	v.run("sh", "-c", `systemctl stop service-proxy-bootstrap.service service-proxy-envoy.service
rm -rf /usr/local/bin/envoy /etc/service-proxy-agent/envoy.json \
	/usr/local/lib/service-proxy-agent/previous /var/lib/service-proxy-agent/bootstrap.json \
	/run/service-proxy-envoy-restart`)
}

func (v *VM) bootstrapAgain() {
	v.t.Helper()
	v.run("systemctl", "restart", "--no-block", "service-proxy-bootstrap.service")
}

// failure is one thing broken.
type failure struct {
	name      string
	attribute string   // "": the good one
	brk       func()   // before bootstrap starts
	want      []string // words of the failure; none: it is to finish in spite of it
	mend      func()   // nil: by the good attribute
}

// sick is a VM whose archive brings no Envoy. Things are broken on it one after the other.
type sick struct {
	*VM
	good      []byte // an archive with an Envoy
	attribute string // names it, with its checksum
}

func newSick(t *testing.T) sick {
	t.Helper()
	s := sick{VM: newVM(t, options{archive: packageRelease(t, "1.0.0", "none")}),
		good: envoyArchive(t)}
	sum := sha256.Sum256(s.good)
	s.platform.PutObject(bucket, "good.tgz", s.good)
	s.attribute = primary(t, "good.tgz#sha256="+hex.EncodeToString(sum[:]))
	return s
}

func primary(t *testing.T, object string) string {
	t.Helper()
	return attributeWith(t, map[string]any{"primary-source": "gs://" + bucket + "/" + object})
}

// put makes an object, and the attribute that names it.
func (s sick) put(name string, content []byte) string {
	s.t.Helper()
	s.platform.PutObject(bucket, name, content)
	return primary(s.t, name)
}

// check shows of each failure the right line, nothing half installed, and recovery by itself
// when the cause has gone.
func (s sick) check(failures []failure) {
	v, whole := s.VM, s.t
	asked := false
	for _, tt := range failures {
		whole.Run(tt.name, func(t *testing.T) {
			v.t = t
			defer func() { v.t = whole }()
			// the daemon shall not start it before all is broken
			v.run("systemctl", "stop", "service-proxy-bootstrap.path")
			attribute := tt.attribute
			if attribute == "" {
				attribute = s.attribute
			}
			v.platform.SetAttribute("gce-service-proxy", attribute)
			v.forget()
			if tt.brk != nil {
				tt.brk()
			}
			v.bootstrapAgain()
			start := time.Now()
			if tt.want != nil {
				v.waitFailure(45*time.Second, tt.want...)
				if !asked || os.Getenv("SOAK") != "" {
					v.doctor(1, symptom.Bootstrap)
					asked = true
				}
			}
			failed := time.Since(start)
			switch {
			case tt.want == nil:
			case tt.mend != nil:
				tt.mend()
			default:
				v.platform.SetAttribute("gce-service-proxy", s.attribute)
			}
			start = time.Now()
			v.waitFinished(90 * time.Second)
			t.Logf("said after %.1f s, recovered after %.1f s", failed.Seconds(),
				time.Since(start).Seconds())
			if tt.want == nil && tt.mend != nil {
				tt.mend()
			}
		})
		if whole.Failed() {
			return // the next case would start from what this one left
		}
	}
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}

// TestEnvoyFailures: archives with no, a broken or an unfit Envoy.
func TestEnvoyFailures(t *testing.T) {
	t.Parallel()
	v := newSick(t)
	v.platform.PutObject(bucket, "sub dir/good.tgz", v.good)
	v.boot()
	v.install()

	// Nothing to be had: seen from outside.
	v.waitFailure(60*time.Second, bootstrap.StepEnvoy, "there is no Envoy", "primary-source")
	v.waitStatus(60*time.Second, progress.Failed)
	v.eventually(60*time.Second, "bootstrap-last-failure", func() error {
		if have := v.guest(guestattr.BootstrapLastFailure); !strings.Contains(have, "there is no Envoy") {
			return fmt.Errorf("it is %q", have)
		}
		return nil
	})
	v.platform.SetAttribute("gce-service-proxy", v.attribute)
	v.waitFinished(60 * time.Second)

	sum := sha256.Sum256(v.good)
	old, refusing := fakeEnvoy(t, "1.20.3"), fakeEnvoy(t, "1.33.0")
	v.check([]failure{
		{name: "primary dead, secondary fine", attribute: attributeWith(t, map[string]any{"primary-source": "gs://" + bucket + "/none.tgz", "secondary-source": "gs://" + bucket + "/sub dir/good.tgz"})},
		{name: "both dead", attribute: attributeWith(t, map[string]any{"primary-source": "gs://" + bucket + "/none.tgz", "secondary-source": "https://storage.googleapis.com/" + bucket + "/none.tgz?sig=SECRET"}),
			want: []string{
				bootstrap.StepEnvoy, "primary-source: download gs://the-bucket/none.tgz: status 404",
				"secondary-source: ", "status 403"}},
		{name: "truncated archive", attribute: v.put("truncated.tgz", v.good[:len(v.good)/2]), want: []string{bootstrap.StepEnvoy, "bad archive: it ends early"},
			mend: func() { v.platform.PutObject(bucket, "truncated.tgz", v.good) }},
		{name: "corrupt archive", attribute: v.put("corrupt.tgz", corrupt(v.good)), want: []string{bootstrap.StepEnvoy, "bad archive"}},
		{name: "wrong checksum", attribute: primary(t, "good.tgz#sha256="+strings.Repeat("0", 64)), want: []string{bootstrap.StepEnvoy, "wrong checksum"}},
		{name: "checksum beside", attribute: func() string {
			v.platform.PutObject(bucket, "beside.tgz.sha256",
				[]byte(strings.Repeat("a", 64)+"  beside.tgz\n"))
			return v.put("beside.tgz", v.good)
		}(), want: []string{bootstrap.StepEnvoy, "wrong checksum"},
			mend: func() {
				v.platform.PutObject(bucket, "beside.tgz.sha256",
					[]byte(hex.EncodeToString(sum[:])+"  beside.tgz\n"))
			}},
		{name: "archive that leaves its folder", attribute: v.put("dots.tgz", tgz(t, entry{tar.Header{Name: "usr/local/bin/../../../etc/evil", Mode: 0o644, Typeflag: tar.TypeReg}, []byte("x")})),
			want: []string{bootstrap.StepEnvoy, "leaves its folder"}},
		{name: "archive with an absolute link", attribute: v.put("link.tgz", tgz(t, entry{tar.Header{Name: "usr/local/bin/envoy", Linkname: "/bin/sh", Typeflag: tar.TypeSymlink}, nil})),
			want: []string{bootstrap.StepEnvoy, "is a link"}},
		{name: "setuid", attribute: v.put("setuid.tgz", tgz(t, entry{tar.Header{Name: "usr/local/bin/envoy", Mode: 0o4755, Typeflag: tar.TypeReg}, old})),
			want: []string{bootstrap.StepEnvoy, "setuid"}},
		{name: "too old in the archive", attribute: v.put("old.tgz", envoyTgz(t, old)), want: []string{bootstrap.StepEnvoy, "version 1.20.3 is too old"}},
		{name: "too old on the image", attribute: attributeWith(t, map[string]any{}), brk: func() {
			v.write("usr/local/bin/envoy", string(old), 0o755)
		}, want: []string{
			bootstrap.StepEnvoy, "/usr/local/bin/envoy: bad Envoy: version 1.20.3 is too old, want 1.24.9"}},
		{name: "refuses its configuration", attribute: v.put("refusing.tgz", envoyTgz(t, refusing)), want: []string{bootstrap.StepConfigure, "Envoy 1.33.0 refuses its configuration", "no such field"}},
	})
}

// TestMachineFailures: what the VM, its attribute and the metadata server may have wrong.
func TestMachineFailures(t *testing.T) {
	t.Parallel()
	v := newSick(t)
	v.platform.SetAttribute("gce-service-proxy", v.attribute)
	v.boot()
	v.install()
	v.waitFinished(90 * time.Second)

	script := func(text string) func() { return func() { v.run("sh", "-c", text) } }
	fault := func(f platform.Fault) (brk, mend func()) {
		var remove func()
		return func() { remove = v.platform.Inject(f) }, func() { remove() }
	}
	const attributePath = "/computeMetadata/v1/instance/attributes/gce-service-proxy"
	metadata403, mend403 := fault(platform.Fault{Prefix: attributePath, Status: 403})
	metadata503, mend503 := fault(platform.Fault{Prefix: attributePath, Status: 503})
	metadataHang, mendHang := fault(platform.Fault{Prefix: attributePath, Hang: true})
	metadataSlow, mendSlow := fault(
		platform.Fault{Prefix: "/computeMetadata/v1/instance/", Delay: 2 * time.Second})
	v.check([]failure{
		{name: "disk full", brk: script("mkdir -p /usr/local/lib/service-proxy-agent; mount -t tmpfs -o size=4m tmpfs /usr/local/lib/service-proxy-agent"),
			want: []string{bootstrap.StepEnvoy, "no space left on device", "make room"},
			mend: script("umount -l /usr/local/lib/service-proxy-agent")},
		{name: "read-only /usr/local", brk: script("mount --bind /usr/local /usr/local; mount -o remount,bind,ro /usr/local"),
			want: []string{bootstrap.StepSystem, "read-only file system", "writable"},
			mend: script("mount -o remount,bind,rw /usr/local; umount -l /usr/local")},
		{name: "no certificates and a broken repository", brk: script("rm /etc/ssl/certs/ca-certificates.crt; dpkg --purge --force-depends ca-certificates; mv /var/local/repo /var/local/repo.away"),
			want: []string{bootstrap.StepPackages, "ca-certificates missing on this image", "E: "},
			mend: script("mv /var/local/repo.away /var/local/repo")},
		{name: "malformed JSON", attribute: `{"service": {`, want: []string{bootstrap.StepAttribute, "ends early"}},
		{name: "wrong type", attribute: `{"service": {"serving-ports": ["80"]}}`, want: []string{bootstrap.StepAttribute, "service.serving-ports[0]", "want a whole number, have a string"}},
		{name: "Anthos form", attribute: capture(t, "asm-managed"), want: []string{bootstrap.StepAttribute, "Anthos"}},
		{name: "no attribute", brk: func() { v.platform.DeleteAttribute("gce-service-proxy") }, want: []string{bootstrap.StepAttribute, "no metadata attribute gce-service-proxy", "--service-proxy enabled"}},
		{name: "metadata 403", brk: metadata403, want: []string{bootstrap.StepAttribute, "status 403"}, mend: mend403},
		{name: "metadata 503", brk: metadata503, want: []string{bootstrap.StepAttribute, "status 503"}, mend: mend503},
		{name: "metadata hangs", brk: metadataHang, want: []string{bootstrap.StepAttribute, "no answer within 10s"}, mend: mendHang},
		{name: "metadata slow", brk: metadataSlow, mend: mendSlow},
	})
}

func corrupt(archive []byte) []byte {
	bad := append([]byte(nil), archive...)
	for i := len(bad) / 3; i < len(bad)/3+100; i++ {
		bad[i] ^= 0xff
	}
	return bad
}

func capture(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../internal/attribute/testdata", name+".attr"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestInstallOnReadOnlyDisk: the recipe runs once, even if it fails; what it could not install then
// is installed when that becomes possible.
func TestInstallOnReadOnlyDisk(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{})
	v.boot()
	if have := v.run("findmnt", "-no", "OPTIONS", "/run"); !strings.Contains(have, "noexec") {
		t.Fatalf("/run is %q", have)
	}
	v.run("sh", "-c", "mount --bind /usr/local /usr/local; mount -o remount,bind,ro /usr/local")
	out, err := v.try("osconfig-recipe")
	if err == nil {
		t.Errorf("the recipe succeeded: %s", out)
	}
	t.Log(strings.TrimSpace(out))
	// Another one takes its place, while systemd has its unit.
	if out, err := v.try("osconfig-recipe"); err == nil || strings.Contains(out, "not tried again") {
		t.Errorf("the second recipe: %v, %s", err, out)
	}
	v.waitStatus(30*time.Second, progress.Failed)
	have := v.guest(guestattr.BootstrapLastFailure)
	if !strings.Contains(have, bootstrap.StepInstall) ||
		!strings.Contains(have, "read-only file system") {
		t.Errorf("bootstrap-last-failure %q", have)
	}
	const copied = "/var/lib/service-proxy-agent-archive"
	if have := v.run("stat", "-c", "%a %U %G", copied); have != "700 root root\n" {
		t.Errorf("%s is %q", copied, have)
	}
	v.run("sh", "-c", "mount -o remount,bind,rw /usr/local; umount -l /usr/local")
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	if out, err := v.try("test", "-e", copied); err == nil {
		t.Errorf("left behind: %s %s", copied, out)
	}
	if have := v.property("service-proxy-install.service", "ActiveState"); have != "inactive" {
		t.Errorf("what tried again is still %s", have)
	}
}

// TestPartsMissing: without ip6tables, guest attributes and the HTTP listener all the rest goes on,
// and the serial port names what is missing. It is taken up by itself when it is there. (One box
// for all: each is asked for again every minute or two.)
func TestPartsMissing(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{})
	v.platform.Update(func(vm *platform.VM) { vm.GuestAttributesDisabled = true })
	v.write("etc/default/service-proxy-agent", "SERVICE_PROXY_AGENT_LISTEN=\n", 0o644)
	v.boot()
	v.install()
	v.waitFinished(90 * time.Second)
	const files = "/usr/sbin/ip6tables* /etc/alternatives/ip6tables*"
	v.run("sh", "-c", "tar -cPf /root/ip6tables.tar "+files+"; rm -f "+files+
		"; systemctl restart --no-block service-proxy-agent.service")
	for _, word := range []string{"ip6tables", "enable-guest-attributes"} {
		v.eventually(60*time.Second, "the serial port names "+word, func() error {
			serial := v.Serial()
			if i := strings.LastIndex(serial, " started"); i < 0 || !strings.Contains(serial[i:], word) {
				return fmt.Errorf("it says\n%s", serial)
			}
			return nil
		})
	}
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	if state := v.state(); state.Status != progress.Finished {
		t.Errorf("bootstrap is %q: %s", state.Status, state.Failure)
	}

	v.eventually(30*time.Second, "the target, by the agent's socket", func() error {
		out, err := v.try("systemctl", "is-active", "service-proxy-ready.target")
		if err != nil {
			return fmt.Errorf("%w: %q", err, out)
		}
		return nil
	})
	if out, err := v.try("curl", "-s", "-m", "3", "http://127.0.0.1:15020/healthz"); err == nil {
		t.Errorf("there is a listener: %s", out)
	}
	v.run("service-proxy-agent", "wait", "--listen", "", "--timeout", "10s")
	out, err := v.try("setpriv", "--reuid=65534", "--clear-groups", "service-proxy-agent", "wait",
		"--listen", "", "--timeout", "10s")
	if err == nil || !strings.Contains(out, "--listen") || !strings.Contains(out, "agent.sock") ||
		!strings.Contains(out, "root") {
		t.Errorf("another user is told %q, %v", out, err)
	}

	// A log that has grown too big: this box runs long enough for the timer to see it by itself.
	v.run("truncate", "-s", "65M", "/var/log/envoy/envoy.out.log")

	start := time.Now()
	v.platform.Update(func(vm *platform.VM) { vm.GuestAttributesDisabled = false })
	v.run("tar", "-xPf", "/root/ip6tables.tar")
	v.eventually(80*time.Second, "IPv6 is in use again", func() error {
		out, _ := v.try("service-proxy-agent", "status") // its exit code is of all findings
		if !regexp.MustCompile(`(?m)^IPv6 rules +as wanted`).MatchString(out) {
			return fmt.Errorf("the status is\n%s", out)
		}
		return nil
	})
	ipv6 := time.Since(start)
	v.waitStatus(150*time.Second, progress.Finished)
	v.eventually(80*time.Second, "the timer has the log rotated", func() error {
		sizes, err := v.try("stat", "-c", "%s", "/var/log/envoy/envoy.out.log",
			"/var/log/envoy/envoy.out.log.1")
		if want := fmt.Sprintf("0\n%d\n", 65<<20); err != nil || sizes != want {
			return fmt.Errorf("sizes %q, want %q; the timer's last was at %q", sizes, want,
				v.property("service-proxy-rotate.timer", "LastTriggerUSec"))
		}
		return nil
	})
	t.Logf("IPv6 was back after %.0f s, guest attributes after %.0f s", ipv6.Seconds(),
		time.Since(start).Seconds())
}

// TestAccessLogElsewhere: Envoy's sandbox lets it write where the attribute says, by a drop-in, and
// the rotation's lets that rotate it.
func TestAccessLogElsewhere(t *testing.T) {
	t.Parallel()
	const log = `/srv/my "100%" logs/access.log`
	v := newVM(t, options{attribute: attributeWith(t, map[string]any{"access-log": log})})
	v.pushWith(log)
	v.boot()
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	// Envoy writes it each 10 s
	v.eventually(30*time.Second, "a line in the access log", func() error {
		text, err := os.ReadFile(filepath.Join(v.root, log))
		if err != nil || len(text) == 0 {
			return fmt.Errorf("%d bytes, %v", len(text), err)
		}
		return nil
	})
	if rejected := v.xds.Rejections(); len(rejected) > 0 {
		t.Errorf("Envoy refused %v", rejected)
	}
	v.run("truncate", "-s", "65M", log)
	v.run("systemctl", "start", "service-proxy-rotate.service")
	if copied := v.run("stat", "-c", "%s", log+".1"); strings.TrimSpace(copied) != fmt.Sprint(65<<20) {
		t.Errorf("the copy has %s bytes", copied)
	}
	if err := v.checkVIP(); err != nil {
		t.Error(err)
	}
	v.eventually(30*time.Second, "a new line in the emptied access log", func() error {
		info, err := os.Stat(filepath.Join(v.root, log))
		if err != nil || info.Size() == 0 || info.Size() > 1<<20 {
			return fmt.Errorf("%v, %v", info, err)
		}
		return nil
	})
}
