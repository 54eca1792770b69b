package envoyadmin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// The steps of a Probe, for errors.Is.
var (
	ErrLookUp  = errors.New("the look-up failed")
	ErrConnect = errors.New("the connection failed")
	ErrTLS     = errors.New("the TLS handshake failed")
)

// Time limits of the steps of a Probe.
const (
	lookUpLimit    = 5 * time.Second
	connectEach    = 3 * time.Second // per address
	connectAll     = 9 * time.Second
	handshakeLimit = 5 * time.Second
)

// ProbeError says at which step a control plane could not be reached. It matches one of ErrLookUp,
// ErrConnect and ErrTLS.
type ProbeError struct {
	Step   error
	Target string // what was looked up (host) or connected to (host:port)
	Err    error
}

// Error begins with what was done: "look up HOST: no such host", "connect HOST:PORT (ADDRESS): i/o
// timeout", "TLS handshake with HOST: …".
func (e *ProbeError) Error() string {
	verb := map[error]string{ErrLookUp: "look up", ErrConnect: "connect",
		ErrTLS: "TLS handshake with"}[e.Step]
	return fmt.Sprintf("%s %s: %s", verb, e.Target, reason(e.Err))
}

// Unwrap makes errors.Is and errors.As see the step and the cause.
func (e *ProbeError) Unwrap() []error { return []error{e.Step, e.Err} }

// reason is the last part of a network error: what came before is in Target already.
func reason(err error) string {
	var dns *net.DNSError
	var system *os.SyscallError
	var op *net.OpError
	switch {
	case errors.As(err, &dns):
		return dns.Err
	case errors.As(err, &system):
		return system.Err.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "i/o timeout"
	case errors.As(err, &op):
		return op.Err.Error()
	}
	return err.Error()
}

// ProbeOptions is how to reach a target.
type ProbeOptions struct {
	TLS        bool
	ServerName string        // for TLS; empty: the target's host
	RootCAFile string        // PEM; empty: the system's
	Resolver   *net.Resolver // nil: the system's
}

// Probe finds out whether a control plane can be reached at "host:port", step by step: look up the
// name, connect, shake hands in TLS. Envoy's log tells none of these apart (closed: 13 without a
// text; or nothing). It sends nothing after the handshake, takes up to 19 s, and asks nothing of
// Envoy. The error is a *ProbeError. See docs/design/facts.md#envoy-does-not-say-why.
func Probe(ctx context.Context, target string, o ProbeOptions) error {
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		conn, err := (&net.Dialer{Timeout: connectEach}).DialContext(
			ctx, "unix", strings.TrimPrefix(path, "//"))
		if err != nil {
			return &ProbeError{Step: ErrConnect, Target: target, Err: err}
		}
		return conn.Close()
	}
	host, port, err := net.SplitHostPort(target)
	if err != nil {
		return &ProbeError{Step: ErrLookUp, Target: target, Err: err}
	}
	resolver := o.Resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	limited, cancel := context.WithTimeout(ctx, lookUpLimit)
	addresses, err := resolver.LookupNetIP(limited, "ip", host)
	cancel()
	if err != nil {
		return &ProbeError{Step: ErrLookUp, Target: host, Err: err}
	}

	conn, err := connectFirst(ctx, host, port, addresses)
	if err != nil {
		return err
	}
	defer conn.Close()
	if !o.TLS {
		return nil
	}

	config := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
	if o.ServerName != "" {
		config.ServerName = o.ServerName
	}
	if o.RootCAFile != "" {
		pem, err := os.ReadFile(o.RootCAFile)
		if err == nil {
			config.RootCAs = x509.NewCertPool()
			if !config.RootCAs.AppendCertsFromPEM(pem) {
				err = fmt.Errorf("%q holds no certificate", o.RootCAFile)
			}
		}
		if err != nil {
			return &ProbeError{
				Step: ErrTLS, Target: host, Err: fmt.Errorf("read the root certificates: %w", err)}
		}
	}
	limited, cancel = context.WithTimeout(ctx, handshakeLimit)
	defer cancel()
	if err := tls.Client(conn, config).HandshakeContext(limited); err != nil {
		return &ProbeError{Step: ErrTLS, Target: host, Err: err}
	}
	return nil
}

// connectFirst returns the first connection that one of the addresses takes, or
// the error of the last.
func connectFirst(ctx context.Context, host, port string,
	addresses []netip.Addr) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, connectAll)
	defer cancel()
	dialer := net.Dialer{Timeout: connectEach}
	err = errors.New("it has no address")
	name := net.JoinHostPort(host, port)
	target := name
	for _, a := range addresses {
		address := a.Unmap().String()
		to := net.JoinHostPort(address, port)
		if conn, err = dialer.DialContext(ctx, "tcp", to); err == nil {
			return conn, nil
		}
		if target = name; address != host {
			target = fmt.Sprintf("%s (%s)", name, address)
		}
	}
	return nil, &ProbeError{Step: ErrConnect, Target: target, Err: err}
}
