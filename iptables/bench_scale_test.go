//go:build kernel

package iptables

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The ratios at scale, each against bare iptables on a flat chain of the same 10,000 rules, in
// turns within one run:
//
//	go test -tags kernel -run '^$' -bench Scale -benchtime 10x ./iptables
//
// "ratio" is what is compared; the limits stand in the names of the metrics.
const scale = 10000

var ran = map[string]bool{}

// benchInNetns runs the calling benchmark in a network namespace of its own, like inNetns.
func benchInNetns(b *testing.B) bool {
	b.Helper()
	if os.Getenv("IPTABLES_TEST_NETNS") == b.Name() {
		sh(b, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Geteuid() != 0 {
		b.Fatal("needs root: it makes a network namespace")
	}
	if ran[b.Name()] { // the framework calls with 1 and then with N
		return false
	}
	ran[b.Name()] = true
	args := []string{"-test.run=^$", "-test.timeout=30m", "-test.count=1"}
	pattern := "^" + b.Name() + "$"
	if given := flag.Lookup("test.bench").Value.String(); strings.Contains(given, "/") {
		_, rest, _ := strings.Cut(given, "/")
		pattern += "/" + rest
	}
	args = append(args, "-test.bench="+pattern, "-test.benchtime="+
		flag.Lookup("test.benchtime").Value.String())
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "IPTABLES_TEST_NETNS="+b.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		b.Fatal(err)
	}
	return false
}

// shapes of 10,000 services, and one more that is added and removed.
func shapes() map[string][]netip.Prefix {
	var row []netip.Prefix
	for a := netip.MustParseAddr("10.128.0.1"); len(row) < scale; a = a.Next() {
		row = append(row, netip.PrefixFrom(a, 32))
	}
	return map[string][]netip.Prefix{
		"random":           randomPrefixes(IPv4, scale, 1),
		"dense":            row,
		"dense-unmergable": densePrefixes(IPv4, scale),
	}
}

func flat(services []netip.Prefix) string {
	var b strings.Builder
	b.WriteString(
		"*nat\n:FLAT - [0:0]\n:FLAT_REDIRECT - [0:0]\n-A OUTPUT -p tcp -j FLAT\n-A FLAT_REDIRECT -p tcp -j REDIRECT --to-ports 15001\n")
	for _, p := range services {
		b.WriteString("-A FLAT -d " + p.String() + " -j FLAT_REDIRECT\n")
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// bare runs bare iptables in a second namespace, so that neither side has the
// other's rules in its table.
type bare struct {
	b          *testing.B
	backend    string
	home, away int
}

func newBare(b *testing.B, backend string) bare {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	away, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	return bare{b, backend, home, away}
}

// run runs one command there and says how long it took.
func (x bare) run(stdin string, suffix string, args ...string) time.Duration {
	x.b.Helper()
	runtime.LockOSThread() // a command runs in the namespace of the thread that starts it
	defer runtime.UnlockOSThread()
	unix.Setns(x.away, unix.CLONE_NEWNET)
	defer unix.Setns(x.home, unix.CLONE_NEWNET)
	cmd := exec.Command(command(x.backend, IPv4, suffix), args...)
	cmd.Stdin = strings.NewReader(stdin)
	start := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(start)
	if err != nil {
		x.b.Fatalf("%s: %v\n%.500s", cmd, err, out)
	}
	return took
}

func median(d []time.Duration) time.Duration { return quantile(d, 0.5) }

func quantile(d []time.Duration, q float64) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[int(q*float64(len(d)-1))]
}

// report prints both medians and their ratio. limit is the ratio that must not be passed.
func report(b *testing.B, ours, theirs []time.Duration, limit float64) {
	o, t := median(ours), median(theirs)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(o.Microseconds())/1000, "ours-ms")
	b.ReportMetric(float64(t.Microseconds())/1000, "bare-ms")
	b.ReportMetric(float64(o)/float64(t), fmt.Sprintf("ratio(max%g)", limit))
}

func BenchmarkScale(b *testing.B) {
	if !benchInNetns(b) {
		return
	}
	for _, backend := range []string{NFT, Legacy} {
		b.Run(backend, func(b *testing.B) {
			k := open(b, backend)
			x := newBare(b, backend)
			for _, shape := range []string{"random", "dense", "dense-unmergable"} {
				services := shapes()[shape]
				want := serviceSet(IPv4, services)
				first := 1.25
				if backend == Legacy {
					first = 2.5
				}
				b.Run("install/"+shape, func(b *testing.B) {
					var ours, theirs []time.Duration
					text := flat(services)
					for b.Loop() {
						clear(b, backend, IPv4)
						result := apply(b, k, want)
						ours = append(ours, result.Took)
						if backend == NFT {
							x.run("*nat\n-F\n-X\nCOMMIT\n", "-restore", "--noflush")
						} else {
							x.run("", "", "-t", "nat", "-F")
							x.run("", "", "-t", "nat", "-X")
						}
						theirs = append(theirs, x.run(text, "-restore", "--noflush", "-w", "5"))
					}
					report(b, ours, theirs, first)
				})
				// One more beside the last. (One far from all others puts a level above them:
				// a 16 ms write on nft.)
				one := netip.PrefixFrom(slices.MaxFunc(services, comparePrefix).Addr().Next().Next(), 32)
				more := serviceSet(IPv4, append(slices.Clone(services), one))
				less := serviceSet(IPv4, services[:scale-1])
				last := services[scale-1]
				// ready puts both sides into their places, so that each of these runs by itself as well.
				ready := func(b *testing.B) Table {
					x.run("*nat\n:FLAT - [0:0]\n-F OUTPUT\nCOMMIT\n", "-restore", "--noflush", "-w", "5")
					x.run(flat(services), "-restore", "--noflush", "-w", "5")
					apply(b, k, want)
					return read(b, k, IPv4)
				}
				change := func(b *testing.B, name string, to Ruleset, bareArgs, bareUndo []string) {
					b.Run(name+"/"+shape, func(b *testing.B) {
						have := ready(b)
						var ours, theirs, passes, theirPasses []time.Duration
						for b.Loop() {
							start := time.Now()
							result, err := k.Apply(b.Context(), NewPlan(to, have))
							if err != nil || len(result.Drift) > 0 {
								b.Fatal(err, result.Drift)
							}
							passes = append(passes, time.Since(start))
							ours = append(ours, result.Took)
							if result, err = k.Apply(b.Context(), NewPlan(want, result.Have)); err != nil {
								b.Fatal(err)
							}
							have = result.Have
							bare := x.run("", "", append([]string{"-w", "5", "-t", "nat"}, bareArgs...)...)
							theirs = append(theirs, bare)
							theirPasses = append(theirPasses, bare+x.run("", "-save", "-t", "nat"))
							x.run("", "", append([]string{"-w", "5", "-t", "nat"}, bareUndo...)...)
						}
						report(b, ours, theirs, 1.2)
						b.ReportMetric(float64(median(passes))/float64(median(theirPasses)), "pass-ratio(max1.2)")
						b.ReportMetric(float64(median(passes).Microseconds())/1000, "pass-ms")
					})
				}
				spec := []string{"FLAT", "-d", one.String(), "-j", "FLAT_REDIRECT"}
				change(b, "add", more, append([]string{"-A"}, spec...), append([]string{"-D"}, spec...))
				spec = []string{"FLAT", "-d", last.String(), "-j", "FLAT_REDIRECT"}
				change(b, "remove", less, append([]string{"-D"}, spec...), append([]string{"-A"}, spec...))
			}
			b.Run("connect", func(b *testing.B) { benchConnect(b, k) })
			b.Run("idle", func(b *testing.B) { benchIdle(b, k) })
			clear(b, backend, IPv4)
		})
	}
}

// benchConnect connects to the last of 10,000 services and to the last of 10, in turns.
func benchConnect(b *testing.B, k *Kernel) {
	services := randomPrefixes(IPv4, scale, 1)
	last := slices.MaxFunc(services, comparePrefix).Addr()
	many, few := serviceSet(IPv4, services),
		serviceSet(IPv4, append(slices.Clone(services[:9]), netip.PrefixFrom(last, 32)))
	// there already, for the second backend
	exec.Command("ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo").Run()
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(listener)
	unix.SetsockoptInt(listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(listener, &unix.SockaddrInet4{Port: 15001}); err != nil {
		b.Fatal(err)
	}
	unix.Listen(listener, 64)
	connect := func() time.Duration {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // no TIME_WAIT
		to := &unix.SockaddrInet4{Port: 443, Addr: last.As4()}
		start := time.Now()
		if err := unix.Connect(fd, to); err != nil {
			b.Fatal(err)
		}
		took := time.Since(start)
		accepted, _, err := unix.Accept(listener)
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
		unix.Close(accepted)
		return took
	}
	var ours, theirs []time.Duration
	for b.Loop() {
		apply(b, k, many)
		for range 500 {
			ours = append(ours, connect())
		}
		apply(b, k, few)
		for range 500 {
			theirs = append(theirs, connect())
		}
	}
	o, t := quantile(ours, 0.1), quantile(theirs, 0.1)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(o.Nanoseconds())/1000, "of10000-us")
	b.ReportMetric(float64(t.Nanoseconds())/1000, "of10-us")
	b.ReportMetric(float64(o)/float64(t), "ratio(max1.1)")
}

// benchIdle is what looking costs when nothing happens: a read each 1.5 s on legacy, and each five
// minutes on nft, where the kernel tells of changes (internal/reconcile).
func benchIdle(b *testing.B, k *Kernel) {
	want := serviceSet(IPv4, randomPrefixes(IPv4, scale, 1))
	apply(b, k, want)
	var before, after unix.Rusage
	var children [2]unix.Rusage
	interval, n := 1500*time.Millisecond, 0
	if k.Backend() == NFT {
		interval = 5 * time.Minute
	}
	unix.Getrusage(unix.RUSAGE_SELF, &before)
	unix.Getrusage(unix.RUSAGE_CHILDREN, &children[0])
	for b.Loop() {
		n++
		if drift := Diff(want, read(b, k, IPv4)); len(drift) > 0 {
			b.Fatal(drift)
		}
	}
	unix.Getrusage(unix.RUSAGE_SELF, &after)
	unix.Getrusage(unix.RUSAGE_CHILDREN, &children[1])
	cpu := func(r unix.Rusage) time.Duration {
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	each := (cpu(after) - cpu(before) + cpu(children[1]) - cpu(children[0])) / time.Duration(n)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(each.Nanoseconds())/1000, "cpu-us/look")
	b.ReportMetric(100*float64(each)/float64(interval), "%core")
}
