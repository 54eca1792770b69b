//go:build box

package box

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/machine"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// Boxes wait more than they work: more of them at a time than two cores would have. (A -parallel on
// the command line wins: it is parsed in Run.)
func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "5"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

const (
	bucket  = machine.Bucket
	archive = machine.Archive
)

// The one service of the mesh, and the VM's own application.
var (
	vip          = netip.MustParseAddrPort("10.77.0.1:80")
	vip6         = netip.MustParseAddrPort("[fd77::1]:80")
	servingPort  = uint16(8080)
	endpointPort = uint16(8000) // 80 is the metadata server's
)

// VM is one box.
type VM struct {
	t        *testing.T
	lab      *lab.Lab
	platform *platform.Emulator
	xds      *controlplane.Server
	root     string // where the overlay is mounted
	upper    string // what the box has written on its disk
	release  string
	ipv6     bool // has no IPv4
	engine   bool // has Docker
	instance platform.VM
	ca       *authority.Authority

	mu     sync.Mutex
	serial bytes.Buffer
	pts    string
	nspawn *exec.Cmd
	exited chan struct{}
	leader int // the box's pid 1, as the host sees it
	log    *os.File
}

// usualAttribute is a VM's where nothing else is said.
var usualAttribute = fmt.Sprintf(`{"api-version": "0.2", "service": {"serving-ports": [%d]},
	"labels": {"app": "review"}, "proxy-spec": {"network": ""}}`, servingPort)

type options struct {
	release   string // bookworm
	ipv6      bool   // a VM without IPv4
	attribute string
	archive   []byte            // the release archive; nil: with Envoy
	prepare   func(root string) // changes the root filesystem before the first boot
	programs  string            // packages of Debian's that the image has, too, all of them disabled
	instance  platform.VM       // what the metadata server says of it
	of        *VM               // whose disk this one's is a copy of, as it is just now
}

func moduleRoot(t *testing.T) string { return machine.ModuleRoot(t) }

// programs is the folder with what these packages add to that root filesystem.
func programs(t *testing.T, base, packages string) string {
	t.Helper()
	const script = "./programs.sh"
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	of := sha256.Sum256(append(text, filepath.Base(base)+packages...))
	return machine.Kept(t, fmt.Sprintf("programs-%.8x", of), script, base, packages)
}

// newVM makes a VM and does not boot it.
func newVM(t *testing.T, opts options) *VM {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the box needs root")
	}
	if opts.release == "" {
		opts.release = "bookworm"
	}
	if opts.attribute == "" {
		opts.attribute = usualAttribute
	}
	base := filepath.Join(moduleRoot(t), "build", "box")
	if err := os.MkdirAll(base, 0o755); err != nil {
		t.Fatal(err)
	}
	lower := machine.RootFS(t, opts.release, runtime.GOARCH)
	if opts.programs != "" {
		lower = programs(t, lower, opts.programs) + ":" + lower
	}
	v := &VM{t: t, release: opts.release, ipv6: opts.ipv6, instance: opts.instance,
		engine: slices.Contains(strings.Fields(opts.programs), "docker.io")}
	v.lab = lab.T(t, lab.Options{})
	// journald's socket holds as many entries. systemd sets it at the boot of a VM, and in a container
	// it leaves the kernel's 10 (bump_unix_max_dgram_qlen in systemd's main.c).
	if out, err := v.lab.VM.Run(context.Background(), "sysctl", "-qw",
		"net.unix.max_dgram_qlen=512"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if v.ipv6 {
		if out, err := v.lab.VM.Run(context.Background(), "ip", "-4", "addr", "flush", "dev",
			"eth0"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}

	work, err := os.MkdirTemp(base, "run-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(work) })
	v.root, v.upper = filepath.Join(work, "root"), filepath.Join(work, "upper")
	for _, dir := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if opts.of != nil {
		v.ca = opts.of.ca // which the disk trusts
		if err := os.Remove(v.upper); err != nil {
			t.Fatal(err)
		}
		// What runs there may remove its own files meanwhile.
		out, err := exec.Command("cp", "-a", opts.of.upper, v.upper).CombinedOutput()
		if err != nil && strings.Count(string(out), "\n") != strings.Count(string(out), "No such file") {
			t.Fatalf("copy the disk: %v\n%s", err, out)
		}
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, filepath.Join(work, "upper"),
		filepath.Join(work, "work"))
	if err := unix.Mount("overlay", v.root, "overlay", 0, data); err != nil {
		t.Fatalf("mount the overlay: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(v.root, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the overlay: %v", err)
		}
	})
	if v.log, err = os.Create(filepath.Join(work, "console.log")); err != nil {
		t.Fatal(err)
	}
	v.servers()
	v.files()
	if opts.archive == nil {
		opts.archive = release(t)
	}
	v.platform.PutObject(bucket, archive, opts.archive)
	v.platform.SetAttribute("gce-service-proxy", opts.attribute)
	if opts.prepare != nil {
		opts.prepare(v.root)
	}
	v.openSerial()
	t.Cleanup(func() {
		if t.Failed() {
			v.report()
		}
		v.power()
		v.log.Close()
	})
	return v
}

// servers starts what stands outside of the VM.
func (v *VM) servers() {
	t, vm := v.t, v.instance
	if v.ipv6 {
		vm.IP, vm.IPv6 = "none", lab.VMAddr6.String()
	}
	around := machine.Surround(t, v.lab, machine.Options{VM: vm, IPv6: v.ipv6, CA: v.ca})
	v.platform, v.xds, v.ca = around.Platform, around.ControlPlane, around.CA
	if _, err := v.lab.Echo(v.lab.Service, endpointPort,
		lab.EchoOptions{Name: "endpoint"}); err != nil {
		t.Fatal(err)
	}
	v.push()
	if err := os.MkdirAll(filepath.Join(v.root, "usr/local/share/ca-certificates"),
		0o755); err != nil {
		t.Fatal(err)
	}
	// update-ca-certificates takes it in when bootstrap installs ca-certificates.
	v.write("usr/local/share/ca-certificates/test.crt", string(v.ca.PEM()), 0o644)
}

// vip is the service's address.
func (v *VM) vip() netip.AddrPort {
	if v.ipv6 {
		return vip6
	}
	return vip
}

// push gives the control plane the mesh.
func (v *VM) push() { v.pushWith("") }

// pushWith is push with an access log.
func (v *VM) pushWith(accessLog string) {
	v.t.Helper()
	own, endpoint, families := lab.VMAddr, lab.EndpointAddr(1), controlplane.IPv6Off
	if v.ipv6 {
		own, endpoint, families = lab.VMAddr6, lab.EndpointAddr6(1), controlplane.IPv6Additional
	}
	_, err := v.xds.Set(controlplane.Config{
		TLSInspector: true, AccessLog: accessLog, IPv6: families,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs(v.vip().Addr().String()), Port: vip.Port(), HTTP: true,
				Endpoints: []netip.AddrPort{netip.AddrPortFrom(endpoint, endpointPort)}}},
		Inbound: []controlplane.Inbound{{Addr: own, Port: servingPort, HTTP: true}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
}

func (v *VM) write(name, text string, mode os.FileMode) {
	v.t.Helper()
	if err := os.WriteFile(filepath.Join(v.root, name), []byte(text), mode); err != nil {
		v.t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(v.root, name), mode); err != nil {
		v.t.Fatal(err)
	}
}

// startupScripts stands for Google's guest agent: it writes the attribute startup-script to a file
// of a new folder below run_dir and has a shell run that, at each boot
// (google_metadata_script_runner/main.go and google-startup-scripts.service in
// GoogleCloudPlatform/guest-agent). run_dir, in /etc/default/instance_configs.cfg, is /tmp where
// nothing is set; a VM with a noexec /tmp must set it.
const (
	startupScripts = `#!/bin/sh
set -eu
dir=$(mktemp -d /var/lib/metadata-scriptsXXXXXX)
trap 'rm -rf "$dir"' EXIT
curl -sSf -H Metadata-Flavor:Google -o "$dir/startup-script" http://metadata.google.internal/computeMetadata/v1/instance/attributes/startup-script
chmod 755 "$dir/startup-script"
/bin/bash -c "$dir/startup-script"
`
	startupUnit = `[Unit]
Wants=network-online.target
After=network-online.target
[Service]
Type=oneshot
ExecStartPre=/bin/mount -o remount,noexec /tmp
ExecStart=/usr/bin/google_metadata_script_runner
KillMode=process
[Install]
WantedBy=multi-user.target
`
)

// fstab has /run as Debian's and Ubuntu's initramfs mounts it (`mount -t tmpfs -o
// "nodev,noexec,nosuid,size=${RUNSIZE:-10%},mode=0755" tmpfs /run` in initramfs-tools'
// init), on a VM with 1 GB, an e2-micro. systemd-remount-fs.service gives it to the box,
// which has no initramfs.
const fstab = "tmpfs /run tmpfs nodev,noexec,nosuid,size=100m,mode=0755 0 0\n"

// application is what the unit of deploy/examples starts.
const application = "#!/bin/sh\nexec nc -lk -p 8081\n"

// example is a file of deploy/examples, as it stands.
func (v *VM) example(name string) string {
	v.t.Helper()
	text, err := os.ReadFile(filepath.Join(moduleRoot(v.t), "deploy", "examples", name))
	if err != nil {
		v.t.Fatal(err)
	}
	return string(text)
}

func (v *VM) files() {
	v.write("usr/bin/gsutil", machine.Gsutil, 0o755)
	v.write("usr/bin/osconfig-recipe", machine.Recipe, 0o755)
	v.write("usr/bin/sudo", "#!/bin/sh\nexec \"$@\"\n", 0o755)
	v.write("usr/local/bin/application", application, 0o755)
	v.write("etc/systemd/system/application.service", v.example("application.service"), 0o644)
	metadata := lab.MetadataAddr.String()
	if v.ipv6 {
		metadata = lab.MetadataAddr6.String()
	}
	v.write("etc/hosts", "127.0.0.1 localhost\n"+metadata+
		" metadata.google.internal metadata.google.internal. metadata\n", 0o644)
	v.write("etc/resolv.conf", "nameserver "+metadata+"\n", 0o644)
	v.write("etc/hostname", "vm-1\n", 0o644)
	v.write("etc/fstab", fstab, 0o644)
}

// openSerial makes the pty that stands for /dev/ttyS0 and copies it to the
// test and to the platform.
func (v *VM) openSerial() {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	v.pts = fmt.Sprintf("/dev/pts/%d", n)
	// Like ttyS0 on a real image: group tty may write. Kept open, so that the master does not see a
	// hang-up between writers.
	slave, err := os.OpenFile(v.pts, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	if err := errors.Join(os.Chown(v.pts, 0, 5), os.Chmod(v.pts, 0o660)); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { slave.Close(); master.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			if err != nil {
				return
			}
			v.mu.Lock()
			v.serial.Write(buf[:n])
			v.mu.Unlock()
			_, _ = v.platform.Write(buf[:n])
		}
	}()
}

// Serial is what came over the serial port.
func (v *VM) Serial() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return strings.ReplaceAll(v.serial.String(), "\r\n", "\n")
}

// ownCgroup runs a command in a cgroup named $0, in each hierarchy: version 2 alone, or all of
// version 1's and "unified" beside them. Boxes side by side would else share theirs, and the
// systemd of one take away what that of another was about to start a service in (status
// 219/CGROUP). A new cpuset is empty, and takes nobody in.
const ownCgroup = `all=/sys/fs/cgroup
[ -e $all/cgroup.procs ] || all=$all/*
for h in $all; do
	[ -e $h/cgroup.procs ] && mkdir -p $h/$0 || continue
	if [ $h = /sys/fs/cgroup/cpuset ]; then
		for f in cpuset.cpus cpuset.mems; do cat $h/$f >$h/$0/$f; done
	fi
	echo $$ >$h/$0/cgroup.procs
done
exec "$@"`

// removeCgroup removes what ownCgroup made, and what the box made in it, once its processes have
// ended.
func removeCgroup(name string) {
	// in the one hierarchy, or in each of version 1
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + name) // the pattern is good
	for _, top := range append(tops, filepath.Join("/sys/fs/cgroup", name)) {
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
			var dirs []string
			_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			if len(dirs) == 0 {
				break
			}
			for _, dir := range slices.Backward(dirs) {
				_ = os.Remove(dir)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// boot starts the box and waits until systemd answers.
func (v *VM) boot() {
	t := v.t
	t.Helper()
	v.platform.Rebooted()
	name := fmt.Sprintf("spa-box-%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)
	v.nspawn = exec.Command("sh", "-c", ownCgroup, name, "systemd-nspawn", "--quiet", "-D", v.root,
		"-b", "--register=no", "--keep-unit", "--machine="+name,
		"--network-namespace-path=/run/netns/"+v.lab.VM.Name, "--bind="+v.pts+":/dev/ttyS0", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
		"--console=pipe",
		// the one nspawn gives only with a namespace of its own making, the other modprobe@.service wants
		"--capability=CAP_NET_ADMIN,CAP_SYS_MODULE")
	if v.engine {
		// runc makes a keyring for each container, and limits its devices by bpf or in a cgroup. Docker
		// turns on forwarding.
		v.nspawn.Args = append(v.nspawn.Args, "--system-call-filter=add_key keyctl bpf")
		v.nspawn.Env = append(os.Environ(), "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network")
	}
	v.nspawn.Stdout, v.nspawn.Stderr = v.log, v.log
	v.nspawn.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := lab.Start(v.nspawn); err != nil {
		t.Fatal(err)
	}
	v.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // however it ends
		removeCgroup(name)
		close(exited)
	}(v.nspawn, v.exited)
	v.eventually(30*time.Second, "the box has a pid 1", func() error {
		pid, err := leaderOf(v.nspawn.Process.Pid)
		v.leader = pid
		return err
	})
	v.eventually(60*time.Second, "systemd is up", func() error {
		out, _ := v.try("systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state != "running" && state != "degraded" &&
			state != "starting" {
			return fmt.Errorf("systemd is %q", state)
		}
		return nil
	})
	if v.engine { // of version 1, nspawn makes all but systemd's read-only; here they are its own
		v.run("sh", "-euc", `for h in /sys/fs/cgroup/*; do
			[ ! -e $h/cgroup.procs ] || mountpoint -q $h && mount -o remount,rw,bind $h; done`)
	}
}

// leaderOf finds the box's pid 1: nspawn's child (of its outer child, which has gone) that is pid 1
// in its own namespace.
func leaderOf(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, err
	}
	for _, field := range strings.Fields(string(text)) {
		child, err := strconv.Atoi(field)
		if err != nil {
			return 0, err
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
				if f := strings.Fields(ids); len(f) > 1 && f[len(f)-1] == "1" {
					return child, nil
				}
			}
		}
	}
	return 0, errors.New("no pid 1 yet")
}

// power takes the power away: SIGKILL of everything at once.
func (v *VM) power() {
	if v.nspawn == nil {
		return
	}
	_ = syscall.Kill(v.leader, syscall.SIGKILL) // gone already where it has ended by itself
	_ = v.nspawn.Process.Kill()
	<-v.exited
	v.nspawn = nil
	v.eventually(10*time.Second, "the box is gone", func() error {
		if err := syscall.Kill(v.leader, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("pid %d: %v", v.leader, err)
		}
		return nil
	})
	// The kernel's rules live in the network namespace, which outlives the box but not a real VM.
	for _, family := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy",
		"ip6tables-legacy"} {
		_, _ = v.lab.VM.Run(context.Background(), family, "-t", "nat", "-F")
		_, _ = v.lab.VM.Run(context.Background(), family, "-t", "nat", "-X")
	}
}

// shutdown asks systemd to power off and waits for it.
func (v *VM) shutdown() {
	v.t.Helper()
	_, _ = v.try("systemctl", "poweroff", "--no-block")
	select {
	case <-v.exited:
	case <-time.After(90 * time.Second):
		v.t.Fatal("the box does not shut down")
	}
	v.nspawn = nil
}

// try runs a command in the box; run is try that must succeed.
func (v *VM) try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter",
		append([]string{"--target", strconv.Itoa(v.leader), "--mount", "--uts", "--ipc", "--net", "--pid",
			"--", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C",
		"HOME=/root"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (v *VM) run(name string, args ...string) string {
	v.t.Helper()
	out, err := v.try(name, args...)
	if err != nil {
		v.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// eventually fails the test when check does not hold within limit.
func (v *VM) eventually(limit time.Duration, what string, check func() error) {
	v.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("not within %v: %s: %v", limit, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// guest is a guest attribute as the world outside reads it.
func (v *VM) guest(key string) string {
	return v.platform.GuestAttributes(guestattr.Namespace)[key]
}

// waitStatus waits until bootstrap-status, seen from outside, is want.
func (v *VM) waitStatus(limit time.Duration, want string) {
	v.t.Helper()
	v.eventually(limit, "bootstrap-status "+want, func() error {
		if have := v.guest(guestattr.BootstrapStatus); have != want {
			return fmt.Errorf("it is %q, last failure %q", have, v.guest(guestattr.BootstrapLastFailure))
		}
		return nil
	})
}

// state is bootstrap's own state file.
func (v *VM) state() progress.State {
	v.t.Helper()
	state, err := progress.Read(filepath.Join(v.root, progress.StateDir))
	if err != nil {
		v.t.Fatal(err)
	}
	return state
}

// checkVIP says whether the service's address answers through Envoy, from inside.
func (v *VM) checkVIP() error {
	out, err := v.try("curl", "-s", "-m", "3", "-D", "-", "-o", "/dev/null",
		"http://"+v.vip().String()+"/")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if !strings.Contains(strings.ToLower(out), controlplane.ServedByHeader+": web") {
		return fmt.Errorf("the answer did not come through Envoy:\n%s", out)
	}
	return nil
}

// report prints, after a failure, what a person would look at.
func (v *VM) report() {
	if v.nspawn != nil {
		for _, args := range [][]string{
			{"systemctl", "--no-pager", "--failed"},
			{"journalctl", "--no-pager", "-n", "120", "-u", "service-proxy-*"},
			{"tail", "-n", "20", "/var/log/envoy/envoy.err.log"},
			{"sh", "-c", "iptables-save -t nat; ls -la /usr/local/bin /var/lib/service-proxy-agent /run/service-proxy-agent /var/log/envoy"},
		} {
			out, _ := v.try(args[0], args[1:]...)
			v.t.Logf("%s:\n%s", strings.Join(args, " "), out)
		}
	}
	v.t.Logf("guest attributes: %q", v.platform.GuestAttributes(guestattr.Namespace))
	v.t.Logf("serial port:\n%s", v.Serial())
	if console, err := os.ReadFile(v.log.Name()); err == nil {
		v.t.Logf("console:\n%.3000s", console)
	}
}

func packageRelease(t *testing.T, version, envoy string) []byte {
	return machine.Release(t, version, runtime.GOARCH, envoy)
}

func release(t *testing.T) []byte { return packageRelease(t, "1.0.0", envoyBinary(t)) }

func envoyBinary(t *testing.T) string {
	t.Helper()
	envoy, err := lab.FindEnvoy()
	if err != nil {
		t.Fatal(err)
	}
	return envoy
}

// entry is one file of a made-up Envoy archive.
type entry struct {
	header  tar.Header
	content []byte
}

// tgz packs an archive.
func tgz(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	gz, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(gz)
	for _, e := range entries {
		e.header.Size = int64(len(e.content))
		if err := w.WriteHeader(&e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), gz.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

var goodEnvoy struct {
	sync.Once
	archive []byte
}

// envoyArchive is a good Envoy archive, as primary-source names one.
func envoyArchive(t *testing.T) []byte {
	t.Helper()
	goodEnvoy.Do(func() {
		content, err := os.ReadFile(envoyBinary(t))
		if err != nil {
			t.Fatal(err)
		}
		goodEnvoy.archive = tgz(
			t, entry{tar.Header{Name: "usr/local/bin/envoy", Mode: 0o755, Typeflag: tar.TypeReg}, content})
	})
	return goodEnvoy.archive
}

// attributeWith is an attribute with these keys of proxy-spec.
func attributeWith(t *testing.T, spec map[string]any) string {
	t.Helper()
	if spec["network"] == nil {
		spec["network"] = ""
	}
	text, err := json.Marshal(map[string]any{"api-version": "0.2", "service": map[string]any{
		"serving-ports": []uint16{servingPort}}, "proxy-spec": spec})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
