//go:build lab

package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// times is full, or short when each benchmark is only run once to see that it works (make test).
func times(full, short int) int {
	if os.Getenv("BENCH_ONCE") != "" {
		return short
	}
	return full
}

// count is the number in this variable of the environment, or n.
func count(b *testing.B, variable string, n int) int {
	given := os.Getenv(variable)
	if given == "" {
		return n
	}
	n, err := strconv.Atoi(given)
	must(b, err)
	return n
}

// BenchmarkPushToRedirect is how long after the control plane's push the first connection to the
// new service is redirected, at 10 services and one change a second, and what share of Envoy's main
// thread the agent's questions take meanwhile and idle. The floors in the same run are Envoy's own
// time, from the push until it logs that it has the listener (of which it tells milliseconds, cut
// off), and a bare iptables-restore of one rule, in both its forms. The bound in a metric's name is
// that of the project: of the first, the log line and 1.5 times that restore. What a change took
// behind its own line is told apart: on a busy machine the line itself may be the late one.
// BENCH_CHANGES is how many changes there are, 200 if it is not set.
func BenchmarkPushToRedirect(b *testing.B) {
	for _, backend := range lab.Backends {
		for _, hint := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/log=%v", backend, hint), func(b *testing.B) {
				var args []string
				if !hint {
					args = []string{"--envoy-log", ""}
				}
				config := func(i int) controlplane.Config {
					c := controlplane.Config{}
					for n := range 9 {
						c.Services = append(c.Services, service(n))
					}
					c.Services = append(c.Services, service(100+i))
					return c
				}
				m, a := start(b, mesh.Options{Backend: backend, Config: config(0)}, args...)
				must(b, a.WaitReady(within(b, 20*time.Second)))
				vip := func(i int) netip.AddrPort {
					return netip.AddrPortFrom(service(100 + i).Prefixes[0].Addr(), 9000)
				}
				thread := mainThread(m.Envoy.PID())
				var took, floor, behind, appends, replaces []time.Duration
				bare := newBareRestore(b, m.VM, backend)
				busy, begin := cpu(b, thread), time.Now()
				changes := times(count(b, "BENCH_CHANGES", 200), 4)
				for i := 1; i <= changes; i++ {
					// Not in step with anything that the agent does each second.
					next := time.Now().Add(900*time.Millisecond + rand.N(200*time.Millisecond))
					push, err := m.CP.Set(config(i))
					must(b, err)
					for {
						r, err := lab.Probe(b.Context(), m.VM, 1000, vip(i))
						if err == nil && !r.Escaped {
							break
						}
						if time.Since(push.At) > 20*time.Second {
							b.Fatalf("%v is not redirected", vip(i))
						}
						// Else the probes take one of two processors from who is measured.
						time.Sleep(time.Millisecond)
					}
					whole := time.Since(push.At)
					logged := listenerLogged(b, m.Envoy.LogTail(1<<20), push.At)
					took, floor = append(took, whole), append(floor, logged)
					behind = append(behind, whole-logged)
					if i%4 == 0 { // no more often: the agent looks at what others write
						time.Sleep(300 * time.Millisecond)
						appends = append(appends, bare.append(b))
						replaces = append(replaces, bare.replace(b))
					}
					time.Sleep(time.Until(next))
				}
				changing := share(cpu(b, thread)-busy, time.Since(begin))
				busy, begin = cpu(b, thread), time.Now()
				time.Sleep(time.Duration(times(60, 1)) * time.Second)
				idle := share(cpu(b, thread)-busy, time.Since(begin))
				a.Kill()
				busy, begin = cpu(b, thread), time.Now()
				time.Sleep(time.Duration(times(60, 1)) * time.Second)
				alone := share(cpu(b, thread)-busy, time.Since(begin))

				b.ReportMetric(0, "ns/op")
				b.ReportMetric(ms(took, 50), "p50-ms")
				b.ReportMetric(ms(took, 99), "p99-ms")
				b.ReportMetric(ms(floor, 50), "envoy-logged-p50-ms")
				b.ReportMetric(ms(floor, 99), "envoy-logged-p99-ms")
				b.ReportMetric(ms(behind, 50), "behind-envoy-p50-ms")
				b.ReportMetric(ms(behind, 99), "behind-envoy-p99-ms")
				for form, restores := range map[string][]time.Duration{
					"append": appends, "replace": replaces} {
					bare := ms(restores, 50)
					b.ReportMetric(bare, "bare-"+form+"-p50-ms")
					b.ReportMetric(ms(took, 50)/(ms(floor, 50)+1.5*bare), "p50-ratio-"+form+"(max1)")
				}
				b.ReportMetric(changing, "envoy-main-changing-%")
				b.ReportMetric(idle-alone, "envoy-main-idle-%")
			})
		}
	}
}

// loggedListener finds when Envoy logged that it has the listener.
var loggedListener = regexp.MustCompile(`\[([^]]+)\]\S* .*lds: add/update listener`)

// listenerLogged is how long after a push Envoy first logged that it had the listener.
func listenerLogged(b *testing.B, log string, push time.Time) time.Duration {
	for _, line := range loggedListener.FindAllStringSubmatch(log, -1) {
		at, err := time.ParseInLocation("2006-01-02 15:04:05.000", line[1], time.Local)
		must(b, err)
		if after := at.Sub(push.Truncate(time.Millisecond)); after >= 0 {
			return after
		}
	}
	b.Fatal("Envoy has not logged that it has the listener")
	return 0
}

// bareRestore runs iptables-restore of one rule in the table where the agent's rules are, in a
// chain that nothing leads to. There are two forms of it, and on nft the second takes some 15 ms
// more: whatever deletes a rule waits until no packet can meet it any longer.
type bareRestore struct {
	vm      *lab.Namespace
	backend lab.Backend
}

const bareRule = "-A BARE -d 192.0.2.1/32 -j RETURN\n"

func newBareRestore(b *testing.B, vm *lab.Namespace, backend lab.Backend) bareRestore {
	bare := bareRestore{vm, backend}
	bare.run(b, ":BARE - [0:0]\n")
	return bare
}

// append puts one more rule into the chain that is there.
func (r bareRestore) append(b *testing.B) time.Duration { return r.run(b, bareRule) }

// replace begins the chain anew, as a service that takes the place of another does with the chain
// of all.
func (r bareRestore) replace(b *testing.B) time.Duration {
	return r.run(b, ":BARE - [0:0]\n"+bareRule)
}

func (r bareRestore) run(b *testing.B, lines string) time.Duration {
	restore := exec.CommandContext(b.Context(), "iptables-"+string(r.backend)+"-restore",
		"--noflush", "-w", "5")
	restore.Stdin = strings.NewReader("*nat\n" + lines + "COMMIT\n")
	began := time.Now()
	must(b, r.vm.Do(restore.Start))
	must(b, restore.Wait())
	return time.Since(began)
}

// BenchmarkStart is the agent's time from its start to its first rule, and what it holds in memory
// then, at 10 and at 10,000 services, none next to another: those would be one rule.
func BenchmarkStart(b *testing.B) {
	for _, backend := range lab.Backends {
		for _, n := range []int{10, times(10_000, 100)} {
			b.Run(fmt.Sprintf("%s/services=%d", backend, n), func(b *testing.B) {
				config := controlplane.Config{}
				for i := range n {
					s := service(2 * i)
					s.Cluster = "one"
					config.Services = append(config.Services, s)
				}
				m, a := start(b, mesh.Options{Backend: backend, Config: config})
				must(b, a.WaitReady(within(b, 60*time.Second)))
				var took []time.Duration
				for range times(10, 1) {
					a.Kill()
					_, stderr, code, err := a.Run(b.Context(), "cleanup")
					if err != nil || code != 0 {
						b.Fatalf("cleanup: %d %v %s", code, err, stderr)
					}
					begin := time.Now()
					must(b, a.Start())
					for {
						if r, err := lab.Probe(b.Context(), m.VM, 1000,
							netip.AddrPortFrom(service(2*n - 2).Prefixes[0].Addr(), 9000)); err == nil && !r.Escaped {
							break
						}
						if time.Since(begin) > 60*time.Second {
							b.Fatal("no rule")
						}
					}
					took = append(took, time.Since(begin))
					// Not killed while it starts programs: one that is forked and has not come to its exec
					// holds the agent's socket and lock for up to 30 ms more, and cleanup takes that for
					// an agent that hangs up.
					must(b, a.WaitReady(within(b, 60*time.Second)))
				}
				s, err := a.Status(b.Context())
				must(b, err)
				rules := s.Families[0].Rules // of IPv4
				if rules < n {
					b.Errorf("%d rules for %d services", rules, n)
				}
				// the heap of the first dump is given back
				time.Sleep(time.Duration(times(30, 1)) * time.Second)
				own := cpuAll(b, a.PID())
				begin := time.Now()
				time.Sleep(time.Duration(times(30, 1)) * time.Second)
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(rules), "rules")
				b.ReportMetric(ms(took, 50), "start-to-rule-p50-ms")
				b.ReportMetric(resident(b, a.PID()), "resident-MB")
				b.ReportMetric(share(cpuAll(b, a.PID())-own, time.Since(begin)), "idle-core-%")
			})
		}
	}
}

// BenchmarkRepair is how long a jump that was deleted is missing.
func BenchmarkRepair(b *testing.B) {
	for _, backend := range lab.Backends {
		b.Run(string(backend), func(b *testing.B) {
			m, a := start(b, mesh.Options{Backend: backend, Config: services()})
			must(b, a.WaitReady(within(b, 20*time.Second)))
			var took []time.Duration
			for range times(100, 3) {
				s, err := a.Status(b.Context())
				must(b, err)
				_, err = m.VM.Run(b.Context(), "iptables", "-w", "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j",
					"SERVICE_PROXY_OUTPUT")
				must(b, err)
				begin := time.Now()
				for {
					if r, err := lab.HTTPProbe(b.Context(), m.VM, 1000, web4); err == nil && !r.Escaped {
						break
					}
				}
				took = append(took, time.Since(begin))
				_, err = a.Wait(within(b, 10*time.Second), "repair", func(n status.Status) bool {
					return n.Undone > s.Undone
				})
				must(b, err)
				time.Sleep(2500 * time.Millisecond) // more often is met with back-off
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ms(took, 50), "p50-ms")
			b.ReportMetric(ms(took, 99), "p99-ms")
		})
	}
}

func ms(d []time.Duration, percent int) float64 {
	d = slices.Sorted(slices.Values(d))
	return float64(d[min(len(d)-1, len(d)*percent/100)].Microseconds()) / 1000
}

func share(busy, of time.Duration) float64 { return 100 * busy.Seconds() / of.Seconds() }

// mainThread is the stat file of the thread on which Envoy answers its admin interface.
func mainThread(pid int) string {
	return filepath.Join("/proc", strconv.Itoa(pid), "task", strconv.Itoa(pid), "stat")
}

// cpu is the time that a thread or process has used, of its children that were waited for not.
func cpu(b testing.TB, stat string) time.Duration { return ticks(b, stat, 11, 12) }

// cpuAll counts the children, too: iptables and its like.
func cpuAll(b testing.TB, pid int) time.Duration {
	return ticks(b, fmt.Sprintf("/proc/%d/stat", pid), 11, 12, 13, 14)
}

// ticks adds fields of proc_pid_stat(5), counted after the command's name;
// USER_HZ is 100 everywhere.
func ticks(b testing.TB, stat string, fields ...int) (d time.Duration) {
	text, err := os.ReadFile(stat)
	must(b, err)
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	for _, i := range fields {
		n, err := strconv.Atoi(f[i])
		must(b, err)
		d += time.Duration(n) * 10 * time.Millisecond
	}
	return d
}

func resident(b testing.TB, pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			must(b, err)
			return float64(n) / 1024
		}
	}
	b.Fatal("no VmRSS")
	return 0
}
