package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// Ports of the lab that have nothing to do with the mesh.
const (
	sshPort = 22   // in the VM and everywhere else
	rawPort = 7000 // of the VM, which is not served
)

// connectionLimit is how long a new connection may take: longer than TCP's first retransmits, so
// that a packet that met a rule being written is no failure.
const connectionLimit = 8 * time.Second

// connectionPause is between two new connections.
const connectionPause = 40 * time.Millisecond

// call is a connection that is to go one way.
type call struct {
	from *lab.Namespace
	uid  uint32
	to   netip.AddrPort
	http bool
	// direct: to the very address, nobody in between; else through Envoy.
	direct bool
}

// calls are those of one round, in which each address is called.
func (w *World) calls(round int) (all []call) {
	through := func(uid uint32, http bool, to ...netip.AddrPort) {
		for _, a := range to {
			all = append(all, call{from: w.VM, uid: uid, to: a, http: http})
		}
	}
	direct := func(from *lab.Namespace, uid uint32, to ...netip.AddrPort) {
		for _, a := range to {
			all = append(all, call{from: from, uid: uid, to: a, direct: true})
		}
	}
	extra := Extra(round % 10)
	for _, p := range extra.Prefixes {
		through(AppUID, false, netip.AddrPortFrom(p.Addr(), extra.Port))
	}
	direct(w.VM, AppUID, netip.AddrPortFrom(lab.MetadataAddr, 9000),
		netip.AddrPortFrom(lab.MetadataAddr6, 9000))
	through(AppUID, true, Web4, Web6)
	direct(w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr, sshPort),
		netip.AddrPortFrom(lab.VMAddr, rawPort), netip.AddrPortFrom(lab.VMAddr6, rawPort))
	for _, a := range []netip.AddrPort{Served4, Served6} {
		all = append(all, call{from: w.Client, uid: AppUID, to: a, http: true})
	}
	direct(w.VM, lab.EnvoyUID, Web4, DB6, Plain4)
	through(AppUID, false, DB4, DB6)
	direct(w.VM, AppUID, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), mesh.AppPort))
	if w.Setting.All {
		through(AppUID, false, Plain4, Plain6)
		direct(w.VM, 0, Plain4, Plain6, DB4)
	} else {
		direct(w.VM, AppUID, Plain4, Plain6, netip.AddrPortFrom(Plain4.Addr(), sshPort))
		through(0, false, DB4)
	}
	through(AppUID, true, Web4, Web6)
	return all
}

// watchConnections makes new connections all the time.
func (w *World) watchConnections(ctx context.Context, counts *counter) {
	var pending sync.WaitGroup
	defer pending.Wait()
	tick := time.NewTicker(connectionPause)
	defer tick.Stop()
	for round := 0; ; round++ {
		for _, c := range w.calls(round) {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			pending.Go(func() { w.call(ctx, c, counts) })
		}
	}
}

// call connects once, and observes what is not as it is to be. The end of ctx does not cut it
// short.
func (w *World) call(ctx context.Context, c call, counts *counter) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectionLimit)
	defer cancel()
	o := c.observe(ctx)
	counts.add(counted(o))
	if o.Kind != "" {
		w.Observe(o)
	}
}

// counted is a connection in numbers.
func counted(o Observation) Counts {
	c := Counts{Connections: 1}
	switch o.Kind {
	case "":
	case Escaped:
		c.Escaped = 1
	default:
		c.Failed = 1
	}
	return c
}

// observe connects once; the result has no Kind where it went the way it is to go.
func (c call) observe(ctx context.Context) Observation {
	o := Observation{Family: familyOf(c.to.Addr()), From: time.Now(), What: c.to.String()}
	a, err := c.ask(ctx)
	o.To = time.Now()
	if err == nil {
		o.To = a.connected // its way was decided before that
	}
	o.Kind = c.judge(a, err)
	who := fmt.Sprintf("uid %d of %s", c.uid, c.from.Name[strings.LastIndexByte(c.from.Name, '-')+1:])
	switch {
	case err != nil:
		o.Text = fmt.Sprintf("%s: %v", who, err)
	case o.Kind != "":
		o.Text = fmt.Sprintf("%s from %s: %q answered at %s, to %s %s", who, a.own, a.name, a.local,
			a.peer,
			a.served)
	}
	return o
}

// judge says which promise is broken, or "".
func (c call) judge(a answer, err error) Kind {
	here := a.local == c.to && a.peer == a.own
	switch {
	case err != nil && c.direct:
		return Blocked
	case err != nil:
		return Refused
	case c.direct && here:
		return ""
	case c.direct:
		return Trapped
	case here:
		return Escaped
	case a.local.Addr() == Endpoints()[0].Addr():
		return "" // Envoy's own connection may well have a port of the same number
	case a.peer == a.own:
		return Captured // it was led to a port of the VM, and not Envoy answered
	}
	return ""
}

// answer is what an echo server said of a connection.
type answer struct {
	own         netip.AddrPort // of this end
	local, peer netip.AddrPort // of the other, as the server saw it
	name        string         // the server's
	served      string         // by which chain of Envoy's, of HTTP
	connected   time.Time
}

var errClosed = errors.New("closed without an answer")

// ask connects and asks once.
func (c call) ask(ctx context.Context) (a answer, err error) {
	conn, err := c.from.DialAs(ctx, c.uid, c.to)
	if err != nil {
		return a, err
	}
	defer conn.Close()
	a.connected, a.own = time.Now(), addrOf(conn.LocalAddr())
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	say := "hello\n"
	if c.http {
		say = "GET / HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n"
	}
	if _, err := io.WriteString(conn, say); err != nil {
		return a, fmt.Errorf("speak: %w", err)
	}
	return a, a.read(bufio.NewReader(conn))
}

// read reads up to the line that an echo server answers with.
func (a *answer) read(in *bufio.Reader) error {
	first := ""
	for {
		line, err := in.ReadString('\n')
		line = strings.TrimSpace(line)
		if first == "" {
			first = line
		}
		if by, ok := strings.CutPrefix(line, controlplane.ServedByHeader+": "); ok {
			a.served = by
		}
		if n, _ := fmt.Sscanf(line, "name=%s local=%s peer=%s", &a.name, text{&a.local},
			text{&a.peer}); n == 3 {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%w (first line %q)", errClosed, first)
		}
		if err != nil {
			return fmt.Errorf("wait for an answer (first line %q): %w", first, err)
		}
	}
}

// text reads an address and port by fmt's Sscanf.
type text struct{ to *netip.AddrPort }

// Scan implements fmt.Scanner.
func (t text) Scan(state fmt.ScanState, _ rune) (err error) {
	token, err := state.Token(true, nil)
	if err == nil {
		*t.to, err = netip.ParseAddrPort(string(token))
	}
	return err
}

func addrOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

func familyOf(a netip.Addr) Family {
	if a.Unmap().Is4() {
		return IPv4
	}
	return IPv6
}
