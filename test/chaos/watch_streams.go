package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

const (
	// wordPause is between an answer and the next word of a stream.
	wordPause = 250 * time.Millisecond
	// deaf is how long a stream waits for an answer before it counts as ended: TCP sends a lost word
	// again well before.
	deaf = 15 * time.Second
	// reopenPause is before a stream is opened again.
	reopenPause = 500 * time.Millisecond
	// strayed is how long a stream lives that was opened past Envoy, under bypass for one: afterwards
	// there are to be some through Envoy again.
	strayed = 30 * time.Second
)

// route is where streams go.
type route struct {
	from *lab.Namespace
	uid  uint32
	to   netip.AddrPort
}

// streams is what speaks all the time.
type streams struct {
	w      *World
	counts *counter
	all    sync.WaitGroup
}

// old opens streams that were there before the agent was: some to addresses that will be
// intercepted. The first NAT rules of a VM are what would cut them.
func (s *streams) old(ctx context.Context) error {
	for _, r := range []route{
		{s.w.VM, AppUID, DB4}, {s.w.VM, AppUID, DB6}, {s.w.VM, AppUID, Plain4},
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr, mesh.AppPort)},
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr6, mesh.AppPort)},
	} {
		st, err := s.open(ctx, r)
		if err != nil {
			return fmt.Errorf("open a stream before the agent's first start: %w", err)
		}
		s.all.Go(func() { st.speak(ctx, 0) })
	}
	return nil
}

// run keeps streams open, until ctx ends.
func (s *streams) run(ctx context.Context) {
	plain := []route{
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr, rawPort)},
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr6, rawPort)},
		{s.w.VM, lab.EnvoyUID, DB4},
	}
	if s.w.Setting.All {
		plain = append(plain, route{s.w.VM, 0, Plain4}, route{s.w.VM, 0, Plain6})
	} else {
		plain = append(plain, route{s.w.VM, AppUID, Plain4}, route{s.w.VM, AppUID, Plain6})
	}
	extra := Extra(3)
	through := []route{{s.w.VM, AppUID, DB4}, {s.w.VM, AppUID, DB6},
		{s.w.VM, AppUID, netip.AddrPortFrom(extra.Prefixes[0].Addr(), extra.Port)}}
	for i := range 12 {
		s.all.Go(func() { s.keep(ctx, through[i%len(through)]) })
	}
	for _, r := range plain {
		s.all.Go(func() { s.keep(ctx, r) })
	}
	s.all.Wait()
}

// keep has a stream there all the time.
func (s *streams) keep(ctx context.Context, r route) {
	for ctx.Err() == nil {
		opening, cancel := context.WithTimeout(ctx, connectionLimit)
		st, err := s.open(opening, r)
		cancel()
		if err == nil {
			most := time.Duration(0)
			if st.direct && r.uid == AppUID && r.to != Plain4 && r.to != Plain6 && r.from == s.w.VM {
				most = strayed
			}
			st.speak(ctx, most)
		}
		select { // an error is what watchConnections is for
		case <-ctx.Done():
		case <-time.After(reopenPause):
		}
	}
}

// stream is one established connection.
type stream struct {
	s      *streams
	route  route
	conn   net.Conn
	in     *bufio.Reader
	direct bool // nobody is in between
	opened time.Time
	heard  time.Time // the last answer
}

// open opens a stream; it is one when its first word is answered.
func (s *streams) open(ctx context.Context, r route) (*stream, error) {
	conn, err := r.from.DialAs(ctx, r.uid, r.to)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	st := &stream{s: s, route: r, conn: conn, in: bufio.NewReader(conn), opened: time.Now()}
	a := answer{own: addrOf(conn.LocalAddr())}
	if _, err = io.WriteString(conn, "hello\n"); err == nil {
		err = a.read(st.in)
	}
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	st.direct, st.heard = a.peer == a.own, time.Now()
	s.counts.add(Counts{Streams: 1, Words: 1})
	return st, nil
}

// speak speaks until the stream ends, which is observed, or ctx does, or it has lived for most (0:
// for ever).
func (st *stream) speak(ctx context.Context, most time.Duration) {
	defer st.conn.Close()
	for most == 0 || time.Since(st.opened) < most {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wordPause):
		}
		err := st.word()
		if err == nil {
			st.s.counts.add(Counts{Words: 1})
			continue
		}
		st.ended(err)
		return
	}
}

// ended observes its end.
func (st *stream) ended(err error) {
	o := Observation{Kind: Cut, Family: familyOf(st.route.to.Addr()), From: st.heard, To: time.Now(),
		What: st.route.to.String()}
	if st.direct {
		o.Kind = Severed
	}
	o.Text = fmt.Sprintf("the stream of uid %d from %s, %.1f s old: %v", st.route.uid,
		st.conn.LocalAddr(), st.heard.Sub(st.opened).Seconds(), err)
	st.s.w.Observe(o)
}

// word says one and waits for the answer.
func (st *stream) word() error {
	if err := st.conn.SetDeadline(st.heard.Add(deaf)); err != nil {
		return err
	}
	if _, err := io.WriteString(st.conn, "word\n"); err != nil {
		return err
	}
	if _, err := st.in.ReadSlice('\n'); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("closed by the other side")
		}
		return err
	}
	st.heard = time.Now()
	return nil
}

// staying are streams that are there when the rules go.
type staying []*stream

// stay opens them. Those through Envoy go on without the agent only where a rule of others keeps
// connection tracking on (tracked).
func (s *streams) stay(ctx context.Context, tracked bool) (all staying, err error) {
	routes := []route{
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr, rawPort)},
		{s.w.Client, AppUID, netip.AddrPortFrom(lab.VMAddr6, rawPort)},
		{s.w.VM, lab.EnvoyUID, DB4}, {s.w.VM, lab.EnvoyUID, DB6},
	}
	if tracked {
		routes = append(routes, route{s.w.VM, AppUID, DB4}, route{s.w.VM, AppUID, DB6})
	}
	ctx, cancel := context.WithTimeout(ctx, connectionLimit)
	defer cancel()
	for _, r := range routes {
		st, err := s.open(ctx, r)
		if err != nil {
			return all, fmt.Errorf("open a stream before cleanup: %w", err)
		}
		all = append(all, st)
	}
	return all, nil
}

func (all staying) close() {
	for _, st := range all {
		st.conn.Close()
	}
}

// speak has each say a word.
func (all staying) speak(when string) {
	for _, st := range all {
		if err := st.word(); err != nil {
			st.ended(fmt.Errorf("%s: %w", when, err))
		}
	}
}
