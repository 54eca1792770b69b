// Package server answers those who ask the agent over HTTP.
//
// [Public] is what the network may see: /metrics, /healthz and /healthz/ready on --listen. It must
// not be brought down by its callers, since a health check that gets no answer has the VM replaced:
// requests have time and size limits, each caller has few connections. It must not bring the agent
// down either: a port that is taken is reported and tried again while the rules go on.
//
// Health checkers cannot authenticate. So TLS and users are for another Public, of [NewMetrics]:
// /metrics alone, on --metrics-listen. A --web-config-file that cannot be used is reported and read
// again, too.
//
// [Socket] is the Unix socket for root on this machine: /status, /pause and profiles. To hold it is
// to be the one agent of the machine: a second one learns who does. [Dial] is its client, used by
// the commands status and cleanup.
//
// The answers themselves come from package agent as functions; nothing here knows what they mean.
//
// [Listen] and [Serve] are the same errors and limits for another server, that of package
// pageserver.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/webconfig"
)

const (
	headerLimit = 5 * time.Second // to send a request's header
	readLimit   = 10 * time.Second
	writeLimit  = 15 * time.Second // a scrape takes milliseconds
	maxHeader   = 8 << 10          // bytes
	maxConns    = 256
	maxPerHost  = 16 // of them from one IPv4 address, one IPv6 /64 or this machine
	stopLimit   = 500 * time.Millisecond
	retryFirst  = time.Second
	retryLast   = 15 * time.Second
	rereadEvery = 15 * time.Second // the web config file, beside each connection
	// maxStreams of HTTP/2 are requests at once on one connection; a scraper makes one.
	maxStreams = 4
)

// Health answers a health check; why is one line for people and may be empty when ok.
type Health func() (ok bool, why string)

// Public serves /metrics, /healthz and /healthz/ready. Make it with [NewPublic] or [NewMetrics].
type Public struct {
	listen  string
	flag    string // that gave it
	what    string // it serves, for people
	handler http.Handler
	web     *webconfig.File // nil: plain HTTP for everybody
	log     *zap.Logger
	retry   time.Duration // first pause after a failed listen
	reread  time.Duration

	mu   sync.Mutex
	addr net.Addr
	err  error
}

// NewPublic returns a server for listen ("host:port" or ":port"), which it checks but does not open
// before [Public.Run]. With nil metrics it serves none. A nil log is silent.
//
//	public, err := server.NewPublic(":15020", healthz, ready, metrics.Handler(), log)
//	go public.Run(ctx)
func NewPublic(listen string, healthz, ready Health, metrics http.Handler,
	log *zap.Logger) (*Public, error) {
	mux := http.NewServeMux()
	// A pattern with GET takes HEAD, too; other methods are answered 405 with Allow.
	mux.Handle("GET /healthz", healthHandler(healthz))
	mux.Handle("GET /healthz/ready", healthHandler(ready))
	what := "health checks"
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
		what = "metrics and health checks"
	}
	return newServer(listen, "--listen", what, mux, log)
}

// NewMetrics returns a server of /metrics alone. webConfig is the path of a web config file
// (package webconfig), which is first read by [Public.Run]; "": plain HTTP for everybody.
func NewMetrics(listen, webConfig string, metrics http.Handler, log *zap.Logger) (*Public, error) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	p, err := newServer(listen, "--metrics-listen", "metrics", mux, log)
	if err == nil && webConfig != "" {
		p.web = webconfig.Open(webConfig)
		p.handler = p.web.Guard(mux, host)
	}
	return p, err
}

func newServer(listen, flag, what string, h http.Handler, log *zap.Logger) (*Public, error) {
	if _, port, err := net.SplitHostPort(listen); err != nil {
		return nil, fmt.Errorf("listen on %q: use host:port or :port", listen)
	} else if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, fmt.Errorf("listen on %q: the port must be a number from 0 to 65535", listen)
	}
	if log == nil {
		log = zap.NewNop()
	}
	return &Public{listen: listen, flag: flag, what: what, handler: h, log: log,
		retry: retryFirst, reread: rereadEvery}, nil
}

func healthHandler(h Health) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		ok, why := h()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if !ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		if why = guestattr.OneLine(why, 1024); why == "" {
			why = map[bool]string{true: "ok", false: "not ok"}[ok]
		}
		fmt.Fprintln(w, why)
	})
}

// Err is why the server does not serve at the moment, or goes by an older web config file than the
// one that is there. It is nil, a *[ListenError], or names the file and what is wrong with it.
func (p *Public) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *Public) set(addr net.Addr, err error) (was error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was, p.addr, p.err = p.err, addr, err
	return was
}

// Run serves until ctx ends, and returns nil then, within half a second. An address that cannot be
// listened on is logged once and tried again, at most each 15 s; so is a web config file.
func (p *Public) Run(ctx context.Context) error {
	retry := p.retry
	for {
		l, err := p.open(ctx)
		if err == nil {
			if was := p.set(l.Addr(), nil); was != nil {
				p.log.Info("listening after all", zap.Stringer("address", l.Addr()))
			}
			retry = p.retry
			err = failed(p.flag, p.listen, p.serve(ctx, l))
		}
		if ctx.Err() != nil {
			_ = p.set(nil, nil)
			return nil
		}
		if was := p.set(nil, err); was == nil {
			p.log.Error(p.what+" are not served, trying again", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			_ = p.set(nil, nil)
			return nil
		case <-time.After(retry):
		}
		retry = min(2*retry, retryLast)
	}
}

// open listens, once it is known who may ask.
func (p *Public) open(ctx context.Context) (net.Listener, error) {
	if p.web != nil {
		if err := p.web.Load(); err != nil {
			return nil, err
		}
	}
	return Listen(ctx, p.flag, p.listen)
}

// Listen opens the address that a flag gave. The error is a *[ListenError].
func Listen(ctx context.Context, flag, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	return l, failed(flag, address, err)
}

func failed(flag, listen string, err error) error {
	if err == nil {
		return nil
	}
	return &ListenError{Flag: flag, Listen: listen, Holders: holders(listen, err), Err: err}
}

// Serve answers by h on l until ctx ends, and returns nil then, within half a second. Requests have
// the limits of [Public]: of time, size, and connections of each caller. A handler that needs more
// time to answer sets its own deadline.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	return serve(ctx, bounded(h, zap.NewNop()), newLimiter(l))
}

// bounded is a server whose requests have limits of time and size.
func bounded(h http.Handler, log *zap.Logger) *http.Server {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerLimit,
		ReadTimeout:       readLimit,
		WriteTimeout:      writeLimit,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          quiet(log),
		// Else `OPTIONS *` would be answered without asking h.
		DisableGeneralOptionsHandler: true,
	}
	// One request a connection: idle ones would count against the limit, and scrapes and
	// probes are seconds apart.
	s.SetKeepAlivesEnabled(false)
	return s
}

func (p *Public) serve(ctx context.Context, l net.Listener) error {
	s := bounded(p.handler, p.log)
	addr := l.Addr()
	l = newLimiter(l)
	if p.web != nil {
		l = webListener{l, p.web.TLS, func() { p.reload(addr) }}
		watching, cancel := context.WithCancel(ctx)
		var watch sync.WaitGroup
		watch.Go(func() { p.watchFile(watching, addr) })
		defer func() { cancel(); watch.Wait() }() // or it might say last that all is well
	}
	return serve(ctx, s, l)
}

// watchFile has a web config file that was broken, or mended, told without anybody asking.
func (p *Public) watchFile(ctx context.Context, addr net.Addr) {
	tick := time.NewTicker(p.reread)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.reload(addr)
		}
	}
}

// reload takes what the web config file says now. If it is broken the last good one stays.
func (p *Public) reload(addr net.Addr) {
	err := p.web.Load()
	if err != nil {
		err = fmt.Errorf("%w; the last good one stays in force", err)
	}
	switch was := p.set(addr, err); {
	case err != nil && was == nil:
		p.log.Error("metrics are served by the last good web config file", zap.Error(err))
	case err == nil && was != nil:
		p.log.Info("the web config file is good again")
	}
}

// webListener begins TLS on each connection, or not, as the web config file says at that moment.
// (net/http speaks HTTP/2 on a *tls.Conn that negotiated it, whoever made it.)
type webListener struct {
	net.Listener
	config func() *tls.Config
	reload func()
}

func (l webListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.reload()
	if config := l.config(); config != nil {
		return tls.Server(c, config), nil // the handshake is the connection's goroutine's
	}
	return c, nil
}

// serve runs s on l until ctx ends.
func serve(ctx context.Context, s *http.Server, l net.Listener) error {
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err := <-ended:
		s.Close()
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	if s.Shutdown(grace) != nil {
		s.Close()
	}
	<-ended //nolint:errcheck // it is http.ErrServerClosed
	return nil
}

// quiet is for net/http's complaints about what callers send: they must not fill the journal.
func quiet(l *zap.Logger) *log.Logger {
	std, err := zap.NewStdLogAt(l, zap.DebugLevel)
	if err != nil {
		panic(err) // only for a level that zap does not know
	}
	return std
}

// ListenError says that an address cannot be listened on, and what to do.
type ListenError struct {
	Flag    string // that gave Listen
	Listen  string
	Holders []uint32 // uids of those who listen on the port, where known
	Err     error
}

func (e *ListenError) Unwrap() error { return e.Err }

func (e *ListenError) Error() string {
	cause := e.Err.Error()
	var errno syscall.Errno
	if errors.As(e.Err, &errno) {
		cause = errno.Error()
	}
	_, port, _ := net.SplitHostPort(e.Listen)
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		by := ""
		for i, uid := range e.Holders {
			by += map[bool]string{true: " by uid ", false: ", uid "}[i == 0] +
				strconv.FormatUint(uint64(uid), 10)
		}
		return fmt.Sprintf(
			"listen on %s: %s%s; find it with `ss -ltnp 'sport = :%s'` and stop it, or choose another "+
				"port with %s", e.Listen, cause, by, port, e.Flag)
	case errors.Is(e.Err, syscall.EACCES):
		return fmt.Sprintf("listen on %s: %s; choose a port above 1023 with %s", e.Listen, cause, e.Flag)
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf(
			"listen on %s: %s; choose an address of this VM, or :%s for all, with %s", e.Listen, cause,
			port, e.Flag)
	}
	return fmt.Sprintf("listen on %s: %s; choose another address with %s", e.Listen, cause, e.Flag)
}

func holders(listen string, err error) (uids []uint32) {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return nil
	}
	_, text, _ := net.SplitHostPort(listen)
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil
	}
	have, err := sockdiag.Listeners(uint16(port))
	if err != nil {
		return nil // the message says enough without
	}
	for _, l := range have {
		uids = append(uids, l.UID)
	}
	slices.Sort(uids)
	return slices.Compact(uids)
}

// limiter closes connections above the limits at once. To let them wait instead would let one
// caller with many slow connections keep the health check out.
type limiter struct {
	net.Listener

	mu    sync.Mutex
	total int
	hosts map[netip.Prefix]int
}

func newLimiter(l net.Listener) *limiter {
	return &limiter{Listener: l, hosts: map[netip.Prefix]int{}}
}

func (l *limiter) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if h := hostOf(c.RemoteAddr()); l.enter(h) {
			return &limited{Conn: c, leave: sync.OnceFunc(func() { l.leave(h) })}, nil
		}
		c.Close()
	}
}

func (l *limiter) enter(h netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConns || l.hosts[h] >= maxPerHost {
		return false
	}
	l.total++
	l.hosts[h]++
	return true
}

func (l *limiter) leave(h netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.hosts[h]--; l.hosts[h] == 0 {
		delete(l.hosts, h)
	}
}

// hostOf is host by the address of a connection; a Unix socket's callers are all one.
func hostOf(a net.Addr) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	return host(t.AddrPort().Addr())
}

// host is the caller as far as limits go. This machine is one: its users may have any address of
// 127.0.0.0/8 as their source, and any of its own.
func host(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap()
	if local(ip) {
		ip = netip.IPv6Loopback()
	}
	ip = ip.WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// local says whether an address is one of this machine's. Those of an alias range are on no
// interface but only routes of type local; a socket that is connected to any of them has it as its
// own address, too. No packet is sent.
func local(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 9)))
	if err != nil {
		return false
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap() == a
}

type limited struct {
	net.Conn
	leave func()
}

func (c *limited) Close() error {
	c.leave()
	return c.Conn.Close()
}
