// Package metadata asks the VM's metadata server: it finds the server, also where there is no IPv4,
// reads what the daemon and bootstrap need of the VM, and watches the gce-service-proxy attribute.
//
// It does not decide what is made of an answer or of its absence: that is for bootstrap and agent,
// which are next in the flow. guestattr writes with its Transport.
package metadata

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"syscall"
)

// Where the metadata server is: https://cloud.google.com/compute/docs/metadata/querying-metadata.
// The Go library cloud.google.com/go/compute/metadata (v0.9.0, metadata.go) knows the first alone,
// and asks it by number.
const (
	IPv4 = "169.254.169.254"
	IPv6 = "[fd20:ce::254]"
)

// HostEnv redirects everything that asks the metadata server.
const HostEnv = "GCE_METADATA_HOST"

// CheckHost says what is wrong with HostEnv, if anything is: it is put into a URL as it stands.
func CheckHost() error {
	host := os.Getenv(HostEnv)
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		return fmt.Errorf("%s is %q; write [%s], since a URL has an IPv6 address in brackets",
			HostEnv, host, host)
	}
	return nil
}

// Transport asks Base. Where there is no route to IPv4's metadata server, as on an IPv6-only VM, it
// asks IPv6's: there the kernel says so at once, so each request may find out anew.
type Transport struct{ Base http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (t Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Base.RoundTrip(req)
	if err == nil || req.URL.Host != IPv4 || !noRoute(err) || req.Body != nil && req.GetBody == nil {
		return resp, err
	}
	again := req.Clone(req.Context())
	again.URL.Host, again.Host = IPv6, ""
	if req.Body != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, err
		}
		again.Body = body
	}
	resp, err6 := t.Base.RoundTrip(again)
	if err6 != nil {
		return nil, fmt.Errorf("%v; by IPv6: %w", err, err6)
	}
	return resp, nil
}

// noRoute is what connect(2) says on a machine that has no IPv4 address (seen: ENETUNREACH,
// Linux 6). See docs/design/facts.md#gce-metadata-by-ipv6.
func noRoute(err error) bool {
	return errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EHOSTUNREACH) ||
		errors.Is(err, syscall.EAFNOSUPPORT)
}
