//go:build lab

package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// firewall has commands of iptables change table filter, and undoes them by emptying it.
func firewall(commands ...string) func(*testing.T, *patient) func() {
	return func(t *testing.T, p *patient) func() {
		iptables := func(words string) {
			_, err := p.VM.Run(context.WithoutCancel(t.Context()), "iptables", strings.Fields("-w "+words)...)
			must(t, err)
		}
		for _, words := range commands {
			iptables(words)
		}
		return func() {
			iptables("-P INPUT ACCEPT")
			iptables("-F INPUT")
		}
	}
}

func applicationStops(t *testing.T, p *patient) func() {
	p.App.Close()
	return func() {
		var err error
		p.App, err = p.Echo(p.VM, mesh.AppPort, lab.EchoOptions{Name: "app"})
		must(t, err)
	}
}

// unhealthy has the control plane say so of some of four endpoints. (They answer all the same.)
func unhealthy(n int) func(*testing.T, *patient) func() {
	return sends(func(c *controlplane.Config) {
		db := &c.Services[1]
		db.Endpoints = nil
		for i := range 4 {
			at := netip.AddrPortFrom(lab.EndpointAddr(byte(i+1)), mesh.EndpointPort)
			if i < 4-n {
				db.Endpoints = append(db.Endpoints, at)
			} else {
				db.Unhealthy = append(db.Unhealthy, at)
			}
		}
	})
}

// anotherEnvoy has another Envoy in the place of the VM's.
func anotherEnvoy(t *testing.T, p *patient, opts lab.EnvoyOptions) func() {
	own := p.Envoy
	own.Kill()
	opts.ControlPlane = p.CPAddr
	another, err := p.StartEnvoy(opts)
	must(t, err)
	return func() {
		another.Kill()
		back, err := p.StartEnvoy(lab.EnvoyOptions{ControlPlane: p.CPAddr, UID: own.UID})
		must(t, err)
		p.Envoy = back
	}
}

func anotherNode(t *testing.T, p *patient) func() {
	return anotherEnvoy(t, p, lab.EnvoyOptions{NodeID: "projects/999/networks/other/nodes/n1",
		Metadata: map[string]any{"TRAFFICDIRECTOR_GCP_PROJECT_NUMBER": "999",
			"TRAFFICDIRECTOR_NETWORK_NAME": "other"}})
}

func envoyOfAnother(t *testing.T, p *patient) func() {
	return anotherEnvoy(t, p, lab.EnvoyOptions{UID: lab.EnvoyUID + 1})
}

// clockAhead is a wrong clock of the VM, as far as one can be made: processes share the machine's,
// so it is the metadata server's that is another.
func clockAhead(_ *testing.T, p *patient) func() {
	p.Platform.SetClock(-10 * time.Minute)
	return func() { p.Platform.SetClock(0) }
}

// vmWithState has its agent's state folder in the place where commands look for it.
func vmWithState(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	p := &patient{Mesh: m, a: m.NewAgent()}
	must(t, mkdir(p.a.StateDir()))
	p.a.Under = []string{"unshare", "-m", "sh", "-ec", `
		mount -t tmpfs none /var/lib
		mkdir ` + progress.StateDir + `
		mount --bind ` + p.a.StateDir() + " " + progress.StateDir + `
		exec "$@"`, "sh"}
	return attend(t, p)
}

// configuredOtherwise is the state that bootstrap leaves when it has configured another Envoy.
func configuredOtherwise(t *testing.T, p *patient) func() {
	state, err := json.Marshal(map[string]any{
		"attribute_sum": progress.Sum(mesh.Attribute),
		"status":        progress.Finished, "time": time.Now().Add(-time.Hour).UTC(),
		"envoy": map[string]any{"file": "/etc/service-proxy-agent/envoy.json",
			"node":    "projects/123456789012/networks/default/nodes/another",
			"targets": []string{"trafficdirector.googleapis.com:443"}},
	})
	must(t, err)
	file := filepath.Join(p.a.StateDir(), "bootstrap.json")
	must(t, os.WriteFile(file, state, 0o644))
	return func() { must(t, os.Remove(file)) }
}

// connectedBefore has a connection to a service, past Envoy, that is older than the rules.
func connectedBefore(t *testing.T, p *patient) func() {
	_, err := p.a.Stop()
	must(t, err)
	_, _, _, err = p.a.Run(t.Context(), "cleanup")
	must(t, err)
	conn, err := p.VM.DialAs(t.Context(), 1000, db4)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, p.a.Start())
	return func() { conn.Close() }
}

// conntrackFilled fills the table of the VM's namespace: each has its own count, and the machine's
// maximum.
func conntrackFilled(t *testing.T, p *patient) func() {
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	must(t, err)
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	must(t, err)
	began := time.Now()
	must(t, p.VM.Do(func() error { return conntrackFill(most * 91 / 100) }))
	t.Logf("%d entries in %v", most*91/100, time.Since(began).Round(time.Millisecond))
	return func() { must(t, p.VM.Do(conntrackFlush)) }
}

// From linux/netfilter/nfnetlink_conntrack.h.
const (
	ctNew    = 1 << 8 // IPCTNL_MSG_CT_NEW of NFNL_SUBSYS_CTNETLINK
	ctDelete = 1<<8 | 2
)

// conntrackFill makes so many entries of UDP, in the namespace of the thread.
func conntrackFill(n int) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	for i := 0; i < n; {
		var batch []netlink.Message
		for ; i < n && len(batch) < 200; i++ {
			data, err := ctEntry(uint32(i))
			if err != nil {
				return err
			}
			batch = append(batch, netlink.Message{Data: data, Header: netlink.Header{
				Type: ctNew, Flags: netlink.Request | netlink.Create | netlink.Excl}})
		}
		if _, err := conn.SendMessages(batch); err != nil {
			return fmt.Errorf("make conntrack entries: %w", err)
		}
	}
	return nil
}

// ctEntry is the message that makes entry i: from 172.20.0.0/14, of 64 ports each, to 192.0.2.1:9.
func ctEntry(i uint32) ([]byte, error) {
	ours := netip.AddrFrom4([4]byte{172, 20 + byte(i>>22&3), byte(i >> 14), byte(i >> 6)})
	from, to := netip.AddrPortFrom(ours, 10_000+uint16(i&63)),
		netip.MustParseAddrPort("192.0.2.1:9")
	tuple := func(src, dst netip.AddrPort) func(*netlink.AttributeEncoder) error {
		return func(ae *netlink.AttributeEncoder) error {
			ae.Nested(1, func(ae *netlink.AttributeEncoder) error { // CTA_TUPLE_IP
				ae.Bytes(1, src.Addr().AsSlice()) // CTA_IP_V4_SRC
				ae.Bytes(2, dst.Addr().AsSlice()) // CTA_IP_V4_DST
				return nil
			})
			ae.Nested(2, func(ae *netlink.AttributeEncoder) error { // CTA_TUPLE_PROTO
				ae.Uint8(1, unix.IPPROTO_UDP) // CTA_PROTO_NUM
				ae.ByteOrder = binary.BigEndian
				ae.Uint16(2, src.Port()) // CTA_PROTO_SRC_PORT
				ae.Uint16(3, dst.Port()) // CTA_PROTO_DST_PORT
				return nil
			})
			return nil
		}
	}
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Nested(1, tuple(from, to)) // CTA_TUPLE_ORIG
	ae.Nested(2, tuple(to, from)) // CTA_TUPLE_REPLY
	ae.Uint32(7, 600)             // CTA_TIMEOUT
	attributes, err := ae.Encode()
	return append([]byte{unix.AF_INET, 0, 0, 0}, attributes...), err
}

// conntrackFlush empties the table of the thread's namespace.
func conntrackFlush() error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Execute(netlink.Message{Data: []byte{unix.AF_UNSPEC, 0, 0, 0},
		Header: netlink.Header{Type: ctDelete, Flags: netlink.Request | netlink.Acknowledge}})
	return err
}

func noRoute6(t *testing.T, p *patient) func() {
	route := func(do string) {
		_, err := p.VM.Run(context.WithoutCancel(t.Context()), "ip", "-6", "route", do, "default", "via",
			lab.GatewayAddr6.String())
		must(t, err)
	}
	route("del")
	return func() { route("add") }
}

func noIPTables(t *testing.T, p *patient) func() {
	_, err := p.a.Stop() // it does not start there
	must(t, err)
	p.a.Under = lacking("ip*tables* xtables*")
	return func() {
		p.a.Under = nil
		must(t, p.a.Start())
	}
}

// differing takes a rule out while no agent is there to repair it.
func differing(t *testing.T, p *patient) func() {
	_, err := p.a.Stop()
	must(t, err)
	_, err = p.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D",
		"SERVICE_PROXY_SERVICE_CIDRS", "-d", "10.10.0.1/32", "-j", "SERVICE_PROXY_REDIRECT")
	must(t, err)
	return func() { must(t, p.a.Start()) }
}

// hung does to an agent that stands still what systemd's watchdog does: SIGABRT, which shows the
// stack, and the mark of the unit's ExecStopPost. (test/box has systemd do it.)
func hung(t *testing.T, p *patient) func() {
	end := stopped(t, p.a.PID())
	must(t, syscall.Kill(p.a.PID(), syscall.SIGABRT))
	end()
	p.a.Ended()
	mark := filepath.Join(p.a.RunDir(), "hung")
	must(t, writeFile(mark, ""))
	must(t, p.a.Start())
	return func() { // as ten minutes later
		long := time.Now().Add(-time.Hour)
		must(t, os.Chtimes(mark, long, long))
		restarts(t, p, func() {})
	}
}

func nothing(*testing.T, *patient) func() { return func() {} }
