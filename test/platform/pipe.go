package platform

import (
	"context"
	"net"
	"sync"
)

// Pipe serves in memory and returns what dials it, whatever the address: for tests in emulated time
// (testing/synctest), which does not go on while a real connection is waited for.
func (e *Emulator) Pipe() (
	dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	p := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
	e.Serve(p, nil)
	return p.dial
}

// pipes is a listener.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept is a method of [net.Listener].
func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

// Close is a method of [net.Listener].
func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

// Addr is a method of [net.Listener].
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }
