package chaos

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// Where questions go, and the answers, which say who was asked.
var (
	resolver4    = netip.MustParseAddrPort("10.77.0.53:53")
	resolver6    = netip.MustParseAddrPort("[fd77::53]:53")
	fromEnvoy    = Web4.Addr() // as Base has it
	fromResolver = netip.MustParseAddr("192.0.2.53")
)

const (
	dnsName  = "web.example."
	dnsPause = 400 * time.Millisecond
	// askAgain is after how long a resolver library asks once more.
	askAgain = time.Second
	// dnsPort is the first of the dnsPorts that questions come from, below those that the kernel
	// gives out. Each is used once in a game: by connection tracking, who asks from a port that
	// another asked from just before goes the same way, past Envoy or to it.
	dnsPort  = 20_000
	dnsPorts = 12_000
)

// serveDNS is every DNS server of the world, until ctx ends.
func (w *World) serveDNS(ctx context.Context) error {
	for network, addr := range map[string]string{"udp4": "0.0.0.0:53", "udp6": "[::]:53"} {
		var conn *net.UDPConn
		err := w.Service.Do(func() error {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			conn = c.(*net.UDPConn)
			raw, err := conn.SyscallConn()
			if err != nil {
				return err
			}
			// The answer is to come from the address that was asked, which is none of the machine's own.
			return errors.Join(err, raw.Control(func(fd uintptr) {
				if network == "udp4" {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
				} else {
					err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
						unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1))
				}
			}), err)
		})
		if err != nil {
			return fmt.Errorf("start a DNS server: %w", err)
		}
		context.AfterFunc(ctx, func() { conn.Close() })
		go answerDNS(conn)
	}
	return nil
}

func answerDNS(conn *net.UDPConn) {
	b, oob := make([]byte, 1500), make([]byte, 256)
	for {
		n, noob, _, from, err := conn.ReadMsgUDPAddrPort(b, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		var m dnsmessage.Message
		if err != nil || m.Unpack(b[:n]) != nil || len(m.Questions) == 0 {
			continue
		}
		m.Response, m.Additionals = true, nil
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA,
				Class: dnsmessage.ClassINET},
			Body: &dnsmessage.AResource{A: fromResolver.As4()},
		}}
		if reply, err := m.Pack(); err == nil {
			_, _, _ = conn.WriteMsgUDPAddrPort(reply, oob[:noob], from) // who asked asks again
		}
	}
}

// watchDNS asks all the time.
func (w *World) watchDNS(ctx context.Context, counts *counter) {
	var pending sync.WaitGroup
	defer pending.Wait()
	tick := time.NewTicker(dnsPause)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		q := question{w: w, uid: AppUID, server: resolver4, want: fromEnvoy,
			port: dnsPort + i%dnsPorts}
		if i%2 == 1 {
			q.server = resolver6
		}
		if i%6 >= 4 {
			q.uid, q.want = lab.EnvoyUID, fromResolver
		}
		pending.Go(func() {
			o := q.observe(context.WithoutCancel(ctx))
			counts.add(counted(o))
			if o.Kind != "" {
				w.Observe(o)
			}
		})
	}
}

// question is one that somebody is to answer.
type question struct {
	w      *World
	uid    uint32
	server netip.AddrPort
	want   netip.Addr
	port   int
}

// observe asks; the result has no Kind where the right one answered.
func (q question) observe(ctx context.Context) Observation {
	o := Observation{Family: familyOf(q.server.Addr()), From: time.Now(), What: q.server.String()}
	ctx, cancel := context.WithTimeout(ctx, connectionLimit)
	defer cancel()
	got, err := q.ask(ctx)
	o.To, o.Kind = time.Now(), q.judge(got, err)
	o.Text = fmt.Sprintf("uid %d asked for %s: %v %v", q.uid, dnsName, got, err)
	return o
}

// judge says which promise is broken, or "".
func (q question) judge(got netip.Addr, err error) Kind {
	direct := q.want == fromResolver
	switch {
	case err == nil && got == q.want:
		return ""
	case err == nil && !direct && got == fromResolver:
		return Escaped
	case err == nil && direct && got == fromEnvoy:
		return Trapped
	case direct:
		return Blocked
	}
	return Refused
}

// ask asks once more each second until there is an answer.
func (q question) ask(ctx context.Context) (netip.Addr, error) {
	conn, err := q.listen()
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: uint16(time.Now().UnixNano()), RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(dnsName), Type: dnsmessage.TypeA,
			Class: dnsmessage.ClassINET}},
	}
	packed, err := m.Pack()
	if err != nil {
		return netip.Addr{}, err
	}
	for {
		if _, err := conn.WriteTo(packed, net.UDPAddrFromAddrPort(q.server)); err != nil {
			return netip.Addr{}, err
		}
		if err := conn.SetReadDeadline(time.Now().Add(askAgain)); err != nil {
			return netip.Addr{}, err
		}
		got, err := hear(conn, m.ID)
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil {
			return got, err
		}
	}
}

// hear waits for the answer to the question of an ID.
func hear(conn net.PacketConn, id uint16) (netip.Addr, error) {
	for b := make([]byte, 1500); ; {
		n, _, err := conn.ReadFrom(b)
		if err != nil {
			return netip.Addr{}, err
		}
		var m dnsmessage.Message
		if err := m.Unpack(b[:n]); err != nil || m.ID != id {
			continue
		}
		for _, r := range m.Answers {
			if body, ok := r.Body.(*dnsmessage.AResource); ok {
				return netip.AddrFrom4(body.A), nil
			}
		}
		return netip.Addr{}, fmt.Errorf("%v: no address", m.RCode)
	}
}

// listen makes a socket of the user's: it belongs to the fsuid that made it.
func (q question) listen() (conn net.PacketConn, err error) {
	network := "udp4"
	if q.server.Addr().Is6() {
		network = "udp6"
	}
	err = q.w.VM.Do(func() error {
		unix.SetfsgidRetGid(int(q.uid))
		unix.SetfsuidRetUid(int(q.uid))
		defer unix.SetfsgidRetGid(0)
		defer unix.SetfsuidRetUid(0)
		conn, err = net.ListenPacket(network, fmt.Sprintf(":%d", q.port))
		return err
	})
	return conn, err
}
