//go:build kernel

package try

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestOwner: a connection of Connect is to the owner match what one of a program is that runs as
// that user, by uid, by gid, and by a group that is not its first one.
func TestOwner(t *testing.T) {
	if !inNetns(t) {
		return
	}
	const user, group, other = 4242, 4343, 4444
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		ipt := program(backend, iptables.IPv4, "")
		sh(t, ipt+" -t nat -A OUTPUT -p tcp -m owner --uid-owner 4242 -j REDIRECT --to-ports 7001; "+
			ipt+" -t nat -A OUTPUT -p tcp -m owner --gid-owner 4343 -j REDIRECT --to-ports 7002; "+
			ipt+" -t nat -A OUTPUT -p tcp -m owner --gid-owner 0 --suppl-groups -j REDIRECT --to-ports 7003")
		listeners := map[uint16]*net.TCPListener{}
		for port, at := range map[uint16]string{7001: ":7001", 7002: ":7002", 7003: ":7003", 9: ":9"} {
			listeners[port] = listen(t, at)
		}
		for _, as := range []struct {
			uid, gid uint32
			port     uint16
		}{{user, other, 7001}, {other, group, 7002}, {other, other, 9}, {user, group, 7001},
			{other, 0, 7003}, {0, 0, 7003}, {0, other, 9}} {
			program := child("127.0.0.9:9")
			program.SysProcAttr = &syscall.SysProcAttr{
				Credential: &syscall.Credential{Uid: as.uid, Gid: as.gid}}
			if out, err := program.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if port := accepted(t, listeners); port != as.port {
				t.Errorf("%s, a program of %d, %d: came to port %d, want %d", backend, as.uid, as.gid, port,
					as.port)
			}
			o := connectAs(t, "127.0.0.9:9", as.uid, as.gid)
			if port := accepted(t, listeners); port != as.port || o.Answer != Connected ||
				(o.Led == Itself) != (port == 9) || o.Led == Here && o.Port() != port {
				t.Errorf("%s, as %d, %d: came to port %d, want %d; %v", backend, as.uid, as.gid, port, as.port, o)
			}
		}
		sh(t, ipt+" -t nat -F OUTPUT")
		for _, l := range listeners {
			l.Close()
		}
	}
}

// accepted is the port at which the one connection came in.
func accepted(t *testing.T, listeners map[uint16]*net.TCPListener) (port uint16) {
	t.Helper()
	for p, l := range listeners {
		l.SetDeadline(time.Now().Add(10 * time.Millisecond))
		c, err := l.Accept()
		if err != nil {
			continue
		}
		c.Close()
		if port != 0 {
			t.Fatalf("connections came to %d and %d", port, p)
		}
		port = p
	}
	return port
}

// TestAnswers: what came back, and where the connection was led to, with and without an entry that
// lasts.
func TestAnswers(t *testing.T) {
	if !inNetns(t) {
		return
	}
	// A gateway that needs no look-up and is not there.
	sh(t, "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; "+
		"ip address add 10.0.0.1/24 dev v0; ip neigh add 10.0.0.2 lladdr 02:00:00:00:00:99 dev v0; "+
		"ip route add 10.1.0.0/16 via 10.0.0.2")
	listen(t, "127.0.0.9:80")
	check := func(name, to string, answer Answer, led Led, where, state string) Outcome {
		t.Helper()
		o := connectAs(t, to, 1000, 1000)
		whereText := ""
		if o.Where.IsValid() {
			whereText = o.Where.String()
		}
		if o.Answer != answer || o.Led != led || whereText != where || o.State != state {
			t.Errorf("%s: %+v; want %v, led %d to %q, %q", name, o, answer, led, where, state)
		}
		return o
	}
	check("conntrack at rest", "127.0.0.9:80", Connected, Itself, "", "")
	check("conntrack at rest, closed", "127.0.0.9:81", Refused, Itself, "", "")

	sh(t, "iptables -t nat -A OUTPUT -p tcp --dport 90:91 -j REDIRECT --to-ports 80; "+
		"iptables -t nat -A OUTPUT -p tcp --dport 92 -j REDIRECT --to-ports 15001; "+
		"iptables -t nat -A OUTPUT -p tcp --dport 93 -j DNAT --to-destination 10.1.0.7:80; "+
		"iptables -t raw -A OUTPUT -p tcp --dport 94 -j NOTRACK; "+
		"iptables -t raw -A OUTPUT -p tcp --dport 96 -j CT --zone 7; "+
		"iptables -t raw -A OUTPUT -p tcp --sport 97 -j CT --zone 7; "+
		"iptables -A OUTPUT -p tcp --dport 98 -j DROP; "+
		"iptables -t nat -A OUTPUT -p tcp --dport 94 -j REDIRECT --to-ports 80; "+
		"iptables -t nat -A OUTPUT -p tcp --dport 95 -j REDIRECT --to-ports 98; "+
		"iptables -t nat -A OUTPUT -p tcp --dport 96 -j REDIRECT --to-ports 97")
	listen(t, "127.0.0.1:97")
	listen(t, "127.0.0.1:80")
	check("open", "127.0.0.9:80", Connected, Itself, "127.0.0.9:80", "ESTABLISHED")
	check("closed", "127.0.0.9:81", Refused, Itself, "127.0.0.9:81", "")
	check("redirected", "127.0.0.9:90", Connected, Here, "127.0.0.1:80", "ESTABLISHED")
	check("redirected to a closed port", "10.1.0.9:92", Refused, Here, "127.0.0.1:15001", "")
	check("in a zone", "127.0.0.9:96", Connected, Here, "127.0.0.1:97", "")
	check("not tracked", "127.0.0.9:94", Refused, Unseen, "", "")
	sh(t, "ip route add unreachable 10.2.0.0/16")
	check("no route", "10.2.0.1:80", Unreachable, Unseen, "", "")

	begun := time.Now()
	done := make(chan struct{})
	go func() { // three times three seconds are too many
		defer close(done)
		check("led to nobody", "10.1.0.9:93", Silent, Elsewhere, "10.1.0.7:80", "SYN_SENT")
	}()
	dropped := make(chan struct{})
	go func() {
		defer close(dropped)
		o := check("dropped before conntrack has it", "127.0.0.9:95", Silent, Unseen, "", "")
		if !strings.Contains(o.Why, "dropped") {
			t.Errorf("dropped: %q", o.Why)
		}
	}()
	check("nobody", "10.1.0.9:80", Silent, Itself, "10.1.0.9:80", "SYN_SENT")
	<-done
	<-dropped
	if took := time.Since(begun); took < Limit || took > 2*Limit {
		t.Errorf("took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	to := netip.MustParseAddrPort("10.1.0.9:80")
	if _, err := Connect(ctx, Ask{To: to}); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
}

// TestDifferenceIsTold: what decides without being in the list of table nat is told as a
// difference: an exemption from tracking, and a rule of nft's own in the table of iptables, which
// iptables-save of 1.8 lists without what it asks for.
func TestDifferenceIsTold(t *testing.T) {
	if !inNetns(t) {
		return
	}
	listen(t, ":80")
	listen(t, ":15001")
	kernel, err := iptables.Open(t.Context(), iptables.Options{Backend: iptables.NFT})
	if err != nil {
		t.Fatal(err)
	}
	want := iptables.Interception{Family: iptables.IPv4, Jumps: true, OutboundPort: 15001,
		ProxyUID: 999, ProxyGID: 999,
		Services: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}.Ruleset()
	have, err := kernel.Read(t.Context(), iptables.IPv4)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kernel.Apply(t.Context(), iptables.NewPlan(want, have)); err != nil {
		t.Fatal(err)
	}
	sh(t, "ip address add 10.0.0.1/32 dev lo")
	compare := func() Comparison {
		t.Helper()
		table, err := kernel.Read(t.Context(), iptables.IPv4)
		if err != nil {
			t.Fatal(err)
		}
		to := netip.MustParseAddrPort("10.0.0.1:80")
		return Compare(table.Walk(iptables.Packet{Hook: iptables.Output, Src: to, Dst: to,
			Proto: iptables.TCP, UID: 1000, GID: 1000, DstLocal: true, Syn: true}),
			connectAs(t, to.String(), 1000, 1000))
	}
	if c := compare(); c.Agreement != Agree {
		t.Errorf("as it should be: %+v", c)
	}
	sh(t, "iptables-nft -t raw -A OUTPUT -d 10.0.0.1 -j NOTRACK; "+
		"iptables-nft -t raw -A OUTPUT -s 10.0.0.1 -j NOTRACK")
	if c := compare(); c.Agreement != Differ || !strings.Contains(c.Tried, "10.0.0.1:80 itself") {
		t.Errorf("not tracked: %+v", c)
	}
	sh(t, "iptables-nft -t raw -F; nft add set ip nat others '{ type ipv4_addr; }'; "+
		"nft insert rule ip nat OUTPUT ip daddr @others accept")
	if c := compare(); c.Agreement != Differ || !strings.Contains(c.Tried, "port 15001") {
		t.Errorf("a rule of nft's own: %+v", c)
	}
}

// TestListenerThatIsStopped: a stopped process takes connections as long as its socket has room,
// and then nobody answers. Where they were led to is told all the same.
func TestListenerThatIsStopped(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, "iptables -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001")
	listener := child("listen 127.0.0.1:15001")
	out, err := listener.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		listener.Process.Kill()
		listener.Wait()
	})
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "<nil>\n" {
		t.Fatal(said, err)
	}
	// Room for one, who stays.
	first, err := net.Dial("tcp", "127.0.0.9:80")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	o := connectAs(t, "127.0.0.9:80", 1000, 1000)
	c := Compare(iptables.Verdict{Action: iptables.Redirect, Port: 15001}, o)
	if o.Answer != Silent || o.Port() != 15001 || o.State != "SYN_SENT" || c.Agreement != Agree {
		t.Errorf("%+v, %+v", o, c)
	}
	if o.Took < Limit || o.Took > Limit+time.Second {
		t.Errorf("took %v", o.Took)
	}
}

// TestWithoutRoot: who may not do it makes no traffic.
func TestWithoutRoot(t *testing.T) {
	if !inNetns(t) {
		return
	}
	l := listen(t, "127.0.0.1:80")
	program := child("connect 127.0.0.1:80")
	program.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	out, err := program.Output()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil || len(lines) != 2 || !strings.HasPrefix(lines[0], ErrNotPermitted.Error()) ||
		!strings.HasPrefix(lines[1], ErrNotPermitted.Error()) {
		t.Errorf("%q, %v", lines, err)
	}
	// As the agent's own unit: a user with CAP_NET_ADMIN may connect as itself.
	program = child("connect 127.0.0.1:80")
	program.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000},
		AmbientCaps: []uintptr{12}}
	out, err = program.Output()
	lines = strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil || len(lines) != 2 || lines[0] != "<nil>" ||
		!strings.HasPrefix(lines[1], ErrNotPermitted.Error()) {
		t.Errorf("with CAP_NET_ADMIN: %q, %v", lines, err)
	}
	connections := 0
	for l.SetDeadline(time.Now().Add(50 * time.Millisecond)); ; connections++ {
		c, err := l.Accept()
		if err != nil {
			break
		}
		c.Close()
	}
	if connections != 1 {
		t.Errorf("%d connections were made, want the one that was allowed", connections)
	}
}
