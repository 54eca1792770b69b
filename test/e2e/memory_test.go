//go:build lab

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// BenchmarkMemory is what the agent holds of memory: at rest, at its peak while it starts, and at
// its peak while a dump is read and a changed rule written. With PROFILES=DIR it leaves heap
// profiles there.
func BenchmarkMemory(b *testing.B) {
	sizes := []int{10, 10_000, 32_000}
	sizes = sizes[:times(len(sizes), 1)]
	for _, backend := range lab.Backends {
		for _, n := range sizes {
			b.Run(fmt.Sprintf("%s/services=%d", backend, n), func(b *testing.B) {
				config := spread(n, false)
				m, err := mesh.New(within(b, 5*time.Minute), mesh.Options{Backend: backend, Config: config})
				must(b, err)
				defer m.Close()
				a := m.NewAgent()
				must(b, a.Start())
				must(b, a.WaitReady(within(b, 2*time.Minute)))
				starting := memory(b, a.PID(), "VmHWM")
				time.Sleep(time.Duration(times(45, 1)) * time.Second)
				rest := resident(b, a.PID())
				anon := memory(b, a.PID(), "RssAnon")
				profile(b, a, fmt.Sprintf("%s-%d-rest", backend, n))
				metrics := heap(b, a)
				b.Logf("rest %.1f anon %.1f, peak %.1f", rest, anon, starting)

				forgetPeak(b, a.PID())
				config.Services[n-1] = apart(n)
				_, err = m.CP.Set(config)
				must(b, err)
				vip := netip.AddrPortFrom(config.Services[n-1].Prefixes[0].Addr(), 9000)
				for end := time.Now().Add(time.Minute); ; {
					r, err := lab.Probe(b.Context(), m.VM, 1000, vip)
					if err == nil && !r.Escaped {
						break
					}
					if time.Now().After(end) {
						b.Fatalf("%v: %+v %v\n%s\n%s", vip, r, err, a.Log(), m.Envoy.LogTail(2000))
					}
				}
				time.Sleep(time.Duration(times(5, 1)) * time.Second)
				peak := memory(b, a.PID(), "VmHWM")
				time.Sleep(time.Duration(times(12, 1)) * time.Second)
				profile(b, a, fmt.Sprintf("%s-%d-changed", backend, n))
				bytes, first, all := dumped(b, m)
				b.Logf("%s", metrics)
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(bytes/(1<<20), "dump-MB")
				b.ReportMetric(first, "dump-first-byte-ms")
				b.ReportMetric(all, "dump-ms")
				b.ReportMetric(starting, "peak-start-MB")
				b.ReportMetric(rest, "resident-MB")
				b.ReportMetric(anon, "resident-anon-MB")
				b.ReportMetric(peak, "peak-change-MB")
				b.ReportMetric(resident(b, a.PID()), "resident-changed-MB")
			})
		}
	}
}

// apart is the i-th of services none of which is next to another: those would be one rule. There is
// room for 65,536 of them in 10.32.0.0/15 and the same of fd20::/64.
func apart(i int) controlplane.Service {
	s := service(0)
	s.Name = fmt.Sprintf("service-%d", i)
	at := uint32(10<<24 | 32<<16 | 2*i)
	s.Prefixes = controlplane.VIPs(netip.AddrFrom4([4]byte{byte(at >> 24), byte(at >> 16),
		byte(at >> 8), byte(at)}).String())
	s.Cluster = "one"
	return s
}

// spread is n services apart from each other, in one family or both. Each has an access log, which
// makes a chain as long as Traffic Director's. They are TCP: with HTTP Envoy asks for the routes of
// each anew for all, and 32,000 had not come in five minutes.
func spread(n int, both bool) (c controlplane.Config) {
	c.AccessLog = "/dev/null"
	for i := range n {
		s := apart(i)
		if both {
			s.Prefixes = append(s.Prefixes, apart6(i))
			c.IPv6 = controlplane.IPv6Additional
		}
		c.Services = append(c.Services, s)
	}
	return c
}

func apart6(i int) netip.Prefix {
	at := 2 * i
	return netip.PrefixFrom(netip.AddrFrom16(
		[16]byte{0xfd, 0x20, 13: byte(at >> 16), 14: byte(at >> 8), 15: byte(at)}), 128)
}

// memory is a line of /proc/PID/status in MB.
func memory(b testing.TB, pid int, field string) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			must(b, err)
			return float64(n) / 1024
		}
	}
	b.Fatalf("no %s", field)
	return 0
}

// dumped is how long the dump of the listeners is, and after how many milliseconds its first byte
// and its last one have come.
func dumped(b testing.TB, m *mesh.Mesh) (bytes, first, all float64) {
	client := m.VM.HTTP()
	client.Timeout = 2 * time.Minute // Envoy sends nothing before it has all of it
	asked := time.Now()
	r, err := client.Get("http://127.0.0.1:15000/config_dump?resource=dynamic_listeners")
	must(b, err)
	defer r.Body.Close()
	first = time.Since(asked).Seconds() * 1000
	n, err := io.Copy(io.Discard, r.Body)
	must(b, err)
	return float64(n), first, time.Since(asked).Seconds() * 1000
}

// forgetPeak begins VmHWM anew (proc_pid_clear_refs(5)).
func forgetPeak(b testing.TB, pid int) {
	must(b, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0))
}

// heap is what Go says of its memory.
func heap(b testing.TB, a *mesh.Agent) string {
	_, text, err := a.Get("/metrics")
	must(b, err)
	var some bytes.Buffer
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "go_memstats_") && strings.Contains(line, "bytes") {
			some.WriteString(strings.TrimPrefix(line, "go_memstats_"))
		}
	}
	return some.String()
}

func profile(b testing.TB, a *mesh.Agent, name string) {
	dir := os.Getenv("PROFILES")
	if dir == "" {
		return
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", a.PID()))
	must(b, err)
	must(b, os.WriteFile(filepath.Join(dir, name+".smaps"), smaps, 0o600))
	body, err := server.Dial(a.RunDir()).Get(b.Context(), "/debug/pprof/heap?gc=1")
	must(b, err)
	must(b, os.WriteFile(filepath.Join(dir, name+".pprof"), body, 0o600))
}
