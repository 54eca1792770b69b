package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Reach is where a connection went.
type Reach struct {
	Local, Peer netip.AddrPort // as the echo server that answered saw them
	Name        string         // the echo server's
	Escaped     bool           // it reached the very address that was called: nobody redirected it
}

// Probe connects once by TCP, sends a line, and says which echo server answered. It works through
// TCP chains and without Envoy, not through HTTP chains: ask those with HTTPProbe.
func Probe(ctx context.Context, from *Namespace, uid uint32, to netip.AddrPort) (Reach, error) {
	return probe(ctx, from, uid, to, "hello\n")
}

// HTTPProbe is Probe with a GET, for HTTP and TCP chains alike.
func HTTPProbe(ctx context.Context, from *Namespace, uid uint32, to netip.AddrPort) (Reach, error) {
	return probe(ctx, from, uid, to, "GET / HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n")
}

func probe(ctx context.Context, from *Namespace, uid uint32, to netip.AddrPort,
	say string) (Reach, error) {
	conn, err := from.DialAs(ctx, uid, to)
	if err != nil {
		return Reach{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(conn, say); err != nil {
		return Reach{}, fmt.Errorf("speak to %s: %w", to, err)
	}
	in := bufio.NewScanner(conn)
	status := ""
	for in.Scan() {
		line := in.Text()
		if status == "" {
			status = line
		}
		var r Reach
		var here, peer string
		if n, _ := fmt.Sscanf(line, "name=%s local=%s peer=%s", &r.Name, &here, &peer); n != 3 {
			continue
		}
		if r.Local, err = netip.ParseAddrPort(here); err != nil {
			return Reach{}, fmt.Errorf("read answer of %s: %w", to, err)
		}
		if r.Peer, err = netip.ParseAddrPort(peer); err != nil {
			return Reach{}, fmt.Errorf("read answer of %s: %w", to, err)
		}
		r.Escaped = r.Local.Addr() == to.Addr().Unmap()
		return r, nil
	}
	if ctx.Err() != nil {
		return Reach{}, fmt.Errorf("wait for answer of %s: %w", to, ctx.Err())
	}
	if err := in.Err(); err != nil {
		return Reach{}, fmt.Errorf("wait for answer of %s: %w", to, err)
	}
	return Reach{}, fmt.Errorf("%s closed without an echo server's answer (first line %q)", to, status)
}

// SteadyOptions of a stream of connections.
type SteadyOptions struct {
	From      *Namespace
	UID       uint32 // 0: root
	To        []netip.AddrPort
	PerSecond int // in all; they take the addresses in turn
	// of one connection and its answer; 0: 15 s, in which a busy machine answers as well
	Timeout time.Duration
	HTTP    bool // GET instead of a line
}

// Counts of a Steady. Tried = OK + Escaped + Failed once it has stopped.
type Counts struct {
	Tried, OK int
	Escaped   int            // answered by the address itself: not redirected
	Failed    int            // no answer
	Errors    map[string]int // by text
	Slowest   time.Duration  // of the OK ones
	// ticks that this machine was too slow to start in time, not connections; they were
	// started as soon as possible
	Late     int
	FirstBad time.Time // when the first that failed or escaped was started
}

// Bad is Escaped + Failed.
func (c Counts) Bad() int { return c.Escaped + c.Failed }

func (c Counts) String() string {
	var errs strings.Builder
	for text, n := range c.Errors {
		fmt.Fprintf(&errs, "; %d × %s", n, text)
	}
	return fmt.Sprintf("%d connections: %d ok, %d escaped, %d failed, slowest %s%s", c.Tried, c.OK,
		c.Escaped, c.Failed, c.Slowest.Round(time.Millisecond), errs.String())
}

// Steady makes new connections at a steady rate until stopped, whatever
// becomes of the earlier ones.
type Steady struct {
	cancel context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	counts Counts
}

// Steady starts a stream of connections; it ends with the lab.
func (l *Lab) Steady(opts SteadyOptions) *Steady {
	if opts.Timeout == 0 {
		opts.Timeout = 15 * time.Second
	}
	if opts.PerSecond <= 0 || len(opts.To) == 0 {
		panic("lab.Steady: no rate or no address")
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Steady{cancel: cancel, done: make(chan struct{}),
		counts: Counts{Errors: make(map[string]int)}}
	l.atEnd(func() { s.Stop() })
	go s.run(ctx, opts)
	return s
}

func (s *Steady) run(ctx context.Context, opts SteadyOptions) {
	defer close(s.done)
	var pending sync.WaitGroup
	defer pending.Wait() // those under way are counted, by their own time limits
	interval := time.Second / time.Duration(opts.PerSecond)
	next := time.Now()
	for i := 0; ; i++ {
		wait := time.Until(next)
		if wait < -interval {
			s.mu.Lock()
			s.counts.Late++
			s.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		next = next.Add(interval)
		to := opts.To[i%len(opts.To)]
		pending.Go(func() { s.one(opts, to) })
	}
}

func (s *Steady) one(opts SteadyOptions, to netip.AddrPort) {
	ctx, cancel := context.WithTimeout(context.Background(), opts.Timeout)
	defer cancel()
	ask := Probe
	if opts.HTTP {
		ask = HTTPProbe
	}
	began := time.Now()
	reach, err := ask(ctx, opts.From, opts.UID, to)
	took := time.Since(began)
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &s.counts
	c.Tried++
	switch {
	case err != nil:
		c.Failed++
		c.Errors[err.Error()]++
	case reach.Escaped:
		c.Escaped++
	default:
		c.OK++
		c.Slowest = max(c.Slowest, took)
		return
	}
	if c.FirstBad.IsZero() || began.Before(c.FirstBad) {
		c.FirstBad = began
	}
}

// Counts is how it goes so far.
func (s *Steady) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts
	c.Errors = make(map[string]int, len(s.counts.Errors))
	for text, n := range s.counts.Errors {
		c.Errors[text] = n
	}
	return c
}

// Stop makes no more connections, waits for those under way, and says how it went.
func (s *Steady) Stop() Counts {
	s.cancel()
	<-s.done
	return s.Counts()
}
