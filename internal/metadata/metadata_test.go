package metadata

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
)

// machine is a machine's network as far as dialling the metadata server goes. The error stands as
// the kernel's: of a network namespace without IPv4 addresses connect(2) to 169.254.169.254 says
// ENETUNREACH at once.
func machine(t *testing.T, ipv4, ipv6 error) (Transport, *[]string) {
	t.Helper()
	hosts := &[]string{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*hosts = append(*hosts, r.Host)
		_, _ = io.Copy(w, r.Body)
	}))
	t.Cleanup(srv.Close)
	base := &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			err := errors.New("another address")
			switch addr {
			case "169.254.169.254:80":
				err = ipv4
			case "[fd20:ce::254]:80":
				err = ipv6
			}
			if err != nil {
				return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", err)}
			}
			return (&net.Dialer{}).DialContext(ctx, network, srv.Listener.Addr().String())
		}}
	return Transport{base}, hosts
}

func TestTransport(t *testing.T) {
	for _, tt := range []struct {
		name       string
		ipv4, ipv6 error
		host       string // that was asked; "": none
		words      []string
	}{
		{"IPv4", nil, nil, IPv4, nil},
		{"IPv6 only", syscall.ENETUNREACH, nil, IPv6, nil},
		{"neither", syscall.ENETUNREACH, syscall.ENETUNREACH, "", []string{"network is unreachable", "by IPv6"}},
		{"refused, which no other address mends", syscall.ECONNREFUSED, nil, "", []string{"connection refused"}},
	} {
		transport, hosts := machine(t, tt.ipv4, tt.ipv6)
		for _, method := range []string{http.MethodGet, http.MethodPut} { // a PUT is a guest attribute
			*hosts = nil
			req, err := http.NewRequestWithContext(t.Context(), method,
				"http://"+IPv4+"/computeMetadata/v1/", strings.NewReader("value"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(req)
			if tt.host == "" {
				for _, word := range tt.words {
					if err == nil || !strings.Contains(err.Error(), word) {
						t.Errorf("%s: %v, want %q", tt.name, err, word)
					}
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
				continue
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || string(body) != "value" || strings.Join(*hosts, " ") != tt.host {
				t.Errorf("%s: %s got %q from %q, %v; want %q", tt.name, method, body, *hosts, err, tt.host)
			}
		}
	}
}

func TestCheckHost(t *testing.T) {
	for host, fine := range map[string]bool{
		"": true, "metadata.google.internal": true, "169.254.169.254": true, "127.0.0.1:8080": true, "[fd20:ce::254]": true, "[::1]:80": true,
		"fd20:ce::254": false, "::1": false,
	} {
		t.Setenv(HostEnv, host)
		err := CheckHost()
		if (err == nil) != fine || err != nil && !strings.Contains(err.Error(), "["+host+"]") {
			t.Errorf("%q: %v", host, err)
		}
	}
}
