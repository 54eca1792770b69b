package lab

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Headers of an Echo's HTTP answers.
const (
	LocalHeader = "X-Echo-Local" // the address and port that the connection reached
	PeerHeader  = "X-Echo-Peer"  // where it came from
	NameHeader  = "X-Echo-Name"
)

// Echo is a server that says which address it was reached at. It speaks HTTP to those who begin
// with an HTTP request (keep-alive, headers above, the same in the body), and else answers each
// line with `name=NAME local=ADDR peer=ADDR`. On a wildcard address in "service" it stands for
// every VIP (see the package), so one Echo on port 80 is both the endpoint behind Envoy and the
// place where an escaped connection arrives.
type Echo struct {
	Name string
	Port uint16

	ln    net.Listener
	mu    sync.Mutex
	seen  map[netip.Addr]int
	conns map[net.Conn]bool
}

// EchoOptions of an Echo; the zero value will do.
type EchoOptions struct {
	Name     string
	Addr     netip.Addr // the zero Addr: every address, both families
	Greeting string     // sent before the client speaks, as MySQL or SMTP do
	UID      uint32     // owner of the socket
}

// Echo starts an echo server in a namespace; it ends with the lab.
func (l *Lab) Echo(n *Namespace, port uint16, opts EchoOptions) (*Echo, error) {
	if !opts.Addr.IsValid() {
		opts.Addr = netip.IPv6Unspecified() // Go's "tcp" on :: takes both families
	}
	if opts.Name == "" {
		opts.Name = n.Name[strings.LastIndex(n.Name, "-")+1:]
	}
	ln, err := n.ListenAs(opts.UID, "tcp", netip.AddrPortFrom(opts.Addr, port).String())
	if err != nil {
		return nil, fmt.Errorf("start echo server: %w", err)
	}
	e := &Echo{Name: opts.Name, Port: port, ln: ln, seen: make(map[netip.Addr]int),
		conns: make(map[net.Conn]bool)}
	l.atEnd(e.Close)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			e.mu.Lock()
			e.conns[conn] = true
			e.seen[local(conn).Addr()]++
			e.mu.Unlock()
			go func() {
				e.serve(conn, opts.Greeting)
				conn.Close()
				e.mu.Lock()
				delete(e.conns, conn)
				e.mu.Unlock()
			}()
		}
	}()
	return e, nil
}

// Close stops listening and ends every connection.
func (e *Echo) Close() {
	e.ln.Close()
	e.mu.Lock()
	defer e.mu.Unlock()
	for conn := range e.conns {
		conn.Close()
	}
}

// Seen is how many connections reached addr.
func (e *Echo) Seen(addr netip.Addr) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.seen[addr]
}

func local(conn net.Conn) netip.AddrPort { return unmap(conn.LocalAddr()) }

func unmap(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

func (e *Echo) serve(conn net.Conn, greeting string) {
	here, peer := local(conn), unmap(conn.RemoteAddr())
	line := fmt.Sprintf("name=%s local=%s peer=%s\n", e.Name, here, peer)
	if greeting != "" {
		if _, err := io.WriteString(conn, greeting+"\n"); err != nil {
			return
		}
	}
	in := bufio.NewReader(conn)
	for {
		start, err := in.Peek(4)
		if err != nil && len(start) == 0 {
			return
		}
		if !isHTTP(start) {
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
			if _, err := io.WriteString(conn, line); err != nil {
				return
			}
			continue
		}
		req, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return
		}
		resp := &http.Response{
			StatusCode: http.StatusOK, ProtoMajor: 1, ProtoMinor: 1, Request: req, Close: req.Close,
			Header: http.Header{
				"Content-Type": {"text/plain"}, "Date": {time.Now().UTC().Format(http.TimeFormat)},
				LocalHeader: {here.String()}, PeerHeader: {peer.String()}, NameHeader: {e.Name},
			},
			ContentLength: int64(len(line)), Body: io.NopCloser(strings.NewReader(line)),
		}
		var out bytes.Buffer
		if resp.Write(&out) != nil {
			return
		}
		if _, err := conn.Write(out.Bytes()); err != nil || req.Close {
			return
		}
	}
}

func isHTTP(start []byte) bool {
	for _, method := range []string{"GET ", "HEAD", "POST", "PUT "} {
		if string(start) == method {
			return true
		}
	}
	return false
}
