//go:build vm

package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/machine"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// The one service of the mesh, and the VM's own application.
var (
	vip  = netip.MustParseAddrPort("10.77.0.1:80")
	vip6 = netip.MustParseAddrPort("[fd77::1]:80")
)

const (
	servingPort  = uint16(8080)
	endpointPort = uint16(8000) // 80 is the metadata server's
)

// VM is one emulated machine.
type VM struct {
	t testing.TB
	machine.Surroundings
	lab *lab.Lab

	dir     string
	arch    string
	image   string
	console string // what kernel and systemd say, on serial port 2

	qemu   *exec.Cmd
	exited chan struct{}
	qmp    *monitor
	port   net.Conn // to the runner

	mu      sync.Mutex
	serial  bytes.Buffer // serial port 1
	began   int          // how often the runner has
	next    int
	waiting map[int]chan answer
}

// request and answer are those of test/vm/runner.
type request struct {
	ID      int      `json:"id"`
	Args    []string `json:"args"`
	Stdin   string   `json:"stdin"`
	Seconds int      `json:"seconds"`
}

type answer struct {
	ID   int    `json:"id"`
	Out  string `json:"out"`
	Code int    `json:"code"`
	Err  string `json:"err"`
}

// hardware is the machine that is emulated for an architecture.
type hardware struct {
	emulator string
	args     []string // its processor and serial port 1, which both systems call ttyS0
	console  string   // what the kernel calls serial port 2
}

var machines = map[string]hardware{
	// A processor without AVX, which Envoy does not need: with QEMU 7.2's, systemd's calls were seen
	// to fail with EINVAL.
	"amd64": {"qemu-system-x86_64", []string{"-cpu", "Westmere,+rdrand", "-serial", "chardev:one"},
		"ttyS1"},
	// The processor of Tau T2A. The machine's own serial port is of another make, ttyAMA0.
	"arm64": {"qemu-system-aarch64", []string{"-machine", "virt", "-cpu", "neoverse-n1",
		"-device", "pci-serial,chardev=one"}, "ttyAMA0"},
}

// image is the folder with what a VM of the release boots from.
func image(t testing.TB, release, arch string) string {
	t.Helper()
	runner := filepath.Join(t.TempDir(), "runner")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w",
		"-o", runner, "./runner")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the runner: %v\n%s", err, out)
	}
	base := machine.RootFS(t, release, arch)
	sum := sha256.New()
	fmt.Fprint(sum, filepath.Base(base))
	for _, name := range []string{"image.sh", "runner/main.go"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sum.Write(text)
	}
	return machine.Kept(t, fmt.Sprintf("image-%s-%s-%.8x", release, arch, sum.Sum(nil)),
		machine.For(arch, "./image.sh", base, runner)...)
}

// newVM makes a VM with its network and neighbours, and does not boot it.
func newVM(t testing.TB, release, arch string) *VM {
	t.Helper()
	v := &VM{t: t, arch: arch, image: image(t, release, arch), waiting: map[int]chan answer{}}
	v.lab = lab.T(t, lab.Options{})
	// The cable ends at the emulator, not in a namespace.
	if _, err := v.lab.Service.RunInput(context.Background(), `
link delete vm
tuntap add dev vm mode tap
link set vm up
addr add 10.128.0.1/24 dev vm
addr add fd28::1/64 dev vm nodad
`, "ip", "-batch", "-"); err != nil {
		t.Fatal(err)
	}
	v.Surroundings = machine.Surround(t, v.lab, machine.Options{
		VM: platform.VM{IPv6: lab.VMAddr6.String()}})
	if _, err := v.lab.Echo(v.lab.Service, endpointPort,
		lab.EchoOptions{Name: "endpoint"}); err != nil {
		t.Fatal(err)
	}
	v.push()
	envoy := "" // the one that the archive brings
	var err error
	if arch == runtime.GOARCH {
		if envoy, err = lab.FindEnvoy(); err != nil {
			t.Fatal(err)
		}
	}
	v.Platform.PutObject(machine.Bucket, machine.Archive,
		machine.Release(t, "1.0.0", arch, envoy))
	v.Platform.SetAttribute("gce-service-proxy", fmt.Sprintf(`{"api-version": "0.2",
		"service": {"serving-ports": [%d]}, "proxy-spec": {"network": ""}}`, servingPort))

	base := filepath.Join(machine.ModuleRoot(t), "build", "vm")
	if err := os.MkdirAll(base, 0o755); err != nil {
		t.Fatal(err)
	}
	if v.dir, err = os.MkdirTemp(base, "run-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(v.dir) })
	v.console = filepath.Join(v.lab.Dir, "console")
	disk := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw",
		"-b", filepath.Join(v.image, "root.ext4"), filepath.Join(v.dir, "disk"))
	if out, err := disk.CombinedOutput(); err != nil {
		t.Fatalf("make a disk: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			v.report()
		}
		v.power()
	})
	return v
}

// push gives the control plane the mesh, with more addresses of its service.
func (v *VM) push(more ...netip.Addr) {
	v.t.Helper()
	prefixes := controlplane.VIPs(vip.Addr().String(), vip6.Addr().String())
	for _, addr := range more {
		prefixes = append(prefixes, netip.PrefixFrom(addr, addr.BitLen()))
	}
	_, err := v.ControlPlane.Set(controlplane.Config{
		TLSInspector: true, IPv6: controlplane.IPv6Additional,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: prefixes,
				Port: vip.Port(), HTTP: true,
				Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort)}}},
		Inbound: []controlplane.Inbound{
			{Addr: lab.VMAddr, Port: servingPort, HTTP: true},
			{Addr: lab.VMAddr6, Port: servingPort, HTTP: true}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
}

// Write is serial port 1, which the platform reads as Compute Engine does.
func (v *VM) Write(p []byte) (int, error) {
	v.mu.Lock()
	v.serial.Write(p)
	v.mu.Unlock()
	return v.Platform.Write(p)
}

// Serial is what came over serial port 1.
func (v *VM) Serial() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return strings.ReplaceAll(v.serial.String(), "\r\n", "\n")
}

// boot turns the power on and waits for the runner.
func (v *VM) boot() {
	v.t.Helper()
	v.Platform.Rebooted()
	// The path of a socket has 108 bytes, and a clone may lie deep.
	at := func(name string) string { return filepath.Join(v.lab.Dir, name) }
	hardware := machines[v.arch]
	args := append(slices.Clone(hardware.args),
		"-accel", "tcg,thread=multi", "-smp", "2", "-m", "1280",
		"-nodefaults", "-display", "none",
		"-kernel", filepath.Join(v.image, "vmlinuz"), "-initrd", filepath.Join(v.image, "initrd.img"),
		"-append", "root=/dev/vda rw net.ifnames=0 panic=-1 console="+hardware.console+" "+
			"mitigations=off systemd.show_status=no",
		"-drive", "file="+filepath.Join(v.dir, "disk")+",if=virtio,format=qcow2,cache=writeback",
		"-netdev", "tap,id=n,ifname=vm,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=n,romfile=",
		"-device", "virtio-rng-pci",
		"-chardev", "stdio,id=one,signal=off",
		"-serial", "file:"+v.console,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=run,path="+at("run")+",server=on,wait=off",
		"-device", "virtserialport,chardev=run,name=run",
		"-qmp", "unix:"+at("qmp")+",server=on,wait=off")
	v.qemu = v.lab.Service.Command(context.Background(), hardware.emulator, args...)
	var said strings.Builder
	v.qemu.Stdout, v.qemu.Stderr = v, &said
	if err := lab.Start(v.qemu); err != nil {
		v.t.Fatal(err)
	}
	v.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // however it ends
		close(exited)
	}(v.qemu, v.exited)
	v.eventually(time.Minute, "qemu answers", func() (err error) {
		select {
		case <-v.exited:
			v.t.Fatalf("qemu ended: %s", &said)
		default:
		}
		if v.port == nil {
			if v.port, err = net.Dial("unix", at("run")); err != nil {
				v.port = nil
				return err
			}
			go v.hear(v.port)
		}
		v.qmp, err = newMonitor(at("qmp"))
		return err
	})
	v.up(1)
}

// up waits until the runner has begun so often, and systemd has started what it starts at boot.
func (v *VM) up(times int) {
	v.t.Helper()
	start := time.Now()
	awake := v.watchdog()
	v.eventually(slow, "the VM is up", func() error {
		awake()
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.began < times {
			return fmt.Errorf("the runner has begun %d times, want %d", v.began, times)
		}
		return nil
	})
	v.eventually(slow, "the network is up", func() error {
		_, err := v.try("sh", "-c", "ip route get 10.131.0.1 && ip -6 route get fd77::1 && "+
			"! ip -6 addr show dev eth0 | grep -q tentative")
		return err
	})
	v.t.Logf("booted in %.0f s: %s", time.Since(start).Seconds(),
		strings.TrimSpace(v.run("uname", "-r")))
}

// watchdog presses the button where a kernel has said nothing for two minutes and has not begun to
// run programs. A kernel 6.1 was seen to stand still for ten at "Loading compiled-in X.509
// certificates", with its processors busy (QEMU 7.2). Of what is tested nothing has begun by then.
func (v *VM) watchdog() (look func()) {
	size, since := 0, time.Now()
	return func() {
		text, _ := os.ReadFile(v.console) // none yet: qemu makes it
		boot := text[max(0, bytes.LastIndex(text, []byte("] Linux version "))):]
		switch {
		case len(text) != size || bytes.Contains(boot, []byte("Run /init as init process")):
			size, since = len(text), time.Now()
		case time.Since(since) > 2*time.Minute:
			v.t.Logf("the kernel hangs, and is reset; it said last: %s",
				text[bytes.LastIndexByte(bytes.TrimSpace(text), '\n')+1:])
			if err := v.qmp.do("system_reset"); err != nil {
				v.t.Fatal(err)
			}
			since = time.Now()
		}
	}
}

// hear takes the runner's answers.
func (v *VM) hear(port net.Conn) {
	for in := bufio.NewReader(port); ; {
		line, err := in.ReadBytes('\n')
		if err != nil {
			v.forget()
			return
		}
		var a answer
		if json.Unmarshal(line, &a) != nil {
			continue // what a reset has cut
		}
		v.mu.Lock()
		if a.ID == 0 {
			v.began++
		} else if c := v.waiting[a.ID]; c != nil {
			c <- a
			delete(v.waiting, a.ID)
		}
		v.mu.Unlock()
	}
}

// forget tells those who wait that there will be no answer.
func (v *VM) forget() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id, c := range v.waiting {
		c <- answer{Code: -1, Err: "the VM was reset"}
		delete(v.waiting, id)
	}
}

// input runs a command in the VM with text on standard input, try one without; run is try that must
// succeed.
func (v *VM) input(stdin string, args ...string) (string, error) {
	const limit = 10 * time.Minute
	v.mu.Lock()
	if v.began == 0 {
		v.mu.Unlock()
		return "", errors.New("the VM is not up")
	}
	v.next++
	id, c := v.next, make(chan answer, 1)
	v.waiting[id] = c
	v.mu.Unlock()
	line, err := json.Marshal(request{ID: id, Args: args, Stdin: stdin, Seconds: int(limit.Seconds())})
	if err != nil {
		return "", err
	}
	if _, err := v.port.Write(append(line, '\n')); err != nil {
		return "", err
	}
	select {
	case a := <-c:
		if a.Code != 0 {
			return a.Out, &exitError{a}
		}
		return a.Out, nil
	case <-v.exited:
		return "", errors.New("the VM is off")
	case <-time.After(limit + 10*time.Second):
		return "", errors.New("the runner does not answer")
	}
}

// exitError is a command that failed.
type exitError struct{ answer }

func (e *exitError) Error() string { return e.Err }

func (v *VM) try(args ...string) (string, error) { return v.input("", args...) }

func (v *VM) run(args ...string) string {
	v.t.Helper()
	out, err := v.try(args...)
	if err != nil {
		v.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// exit is a command's output and exit code, whatever it is.
func (v *VM) exit(args ...string) (string, int) {
	v.t.Helper()
	out, err := v.try(args...)
	var exit *exitError
	if err != nil && (!errors.As(err, &exit) || exit.Code < 0) {
		v.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	if exit != nil {
		return out, exit.Code
	}
	return out, 0
}

func (v *VM) write(name, text string, mode os.FileMode) {
	v.t.Helper()
	if out, err := v.input(text, "sh", "-euc",
		fmt.Sprintf(`mkdir -p "$(dirname "$0")"; cat >"$0"; chmod %o "$0"`, mode), name); err != nil {
		v.t.Fatalf("write %s: %v\n%s", name, err, out)
	}
}

// reset presses the button: nothing is written back, nothing is told. It waits until the VM is up.
func (v *VM) reset() {
	v.t.Helper()
	v.mu.Lock()
	began := v.began
	v.mu.Unlock()
	v.Platform.Rebooted()
	if err := v.qmp.do("system_reset"); err != nil {
		v.t.Fatal(err)
	}
	v.forget()
	v.up(began + 1)
}

// power takes the power away.
func (v *VM) power() {
	if v.qemu == nil {
		return
	}
	_ = v.qemu.Process.Kill() // or it has ended by itself
	<-v.exited
	if v.port != nil {
		v.port.Close()
	}
	if v.qmp != nil {
		v.qmp.conn.Close()
	}
	v.qemu = nil
}

// monitor is QEMU's machine protocol.
type monitor struct {
	conn net.Conn
	in   *json.Decoder
}

func newMonitor(path string) (*monitor, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn, json.NewDecoder(conn)}
	var greeting struct{ QMP any }
	if err := m.in.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	return m, m.do("qmp_capabilities")
}

func (m *monitor) do(command string) error {
	if _, err := fmt.Fprintf(m.conn, `{"execute": %q}`+"\n", command); err != nil {
		return err
	}
	for {
		var reply struct {
			Return *json.RawMessage
			Error  *struct{ Desc string }
		}
		switch err := m.in.Decode(&reply); { // events come between
		case errors.Is(err, io.EOF):
			return errors.New("the monitor is gone")
		case err != nil:
			return err
		case reply.Error != nil:
			return fmt.Errorf("%s: %s", command, reply.Error.Desc)
		case reply.Return != nil:
			return nil
		}
	}
}

// eventually fails the test when check does not hold within limit.
func (v *VM) eventually(limit time.Duration, what string, check func() error) time.Duration {
	v.t.Helper()
	start := time.Now()
	for {
		err := check()
		if err == nil {
			return time.Since(start)
		}
		if time.Since(start) > limit {
			v.t.Fatalf("not within %v: %s: %v", limit, what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// guest is a guest attribute as the world outside reads it.
func (v *VM) guest(key string) string {
	return v.Platform.GuestAttributes(guestattr.Namespace)[key]
}

// report prints, after a failure, what a person would look at.
func (v *VM) report() {
	v.t.Logf("guest attributes: %q", v.Platform.GuestAttributes(guestattr.Namespace))
	v.t.Logf("serial port 1:\n%s", v.Serial())
	if console, err := os.ReadFile(v.console); err == nil {
		v.t.Logf("console:\n%s", console[max(0, len(console)-4000):])
	}
	if v.qemu != nil {
		for _, command := range []string{"systemctl --no-pager --failed",
			"journalctl --no-pager -n 120 -u 'service-proxy-*'", "service-proxy-agent status",
			"tail -n 20 /var/log/envoy/envoy.err.log", "iptables-save -t nat; ip6tables-save -t nat",
		} {
			out, _ := v.try("sh", "-c", command)
			v.t.Logf("%s:\n%s", command, out)
		}
	}
}
