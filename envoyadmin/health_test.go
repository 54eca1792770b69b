package envoyadmin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// answering is an Envoy of a version that gives one answer to all but /server_info. The answers are
// cut by hand from what 1.40.0 gives, with values that it did not have after
// admin/v3/clusters.proto and config/bootstrap/v3; those in the form of API v2 are from its
// documentation alone. TestLife and TestStreamClosed ask real Envoys the same.
func answering(t *testing.T, version, answer string) *Client {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/server_info" {
			io.WriteString(w, `{"version":"x/`+version+`/y"}`)
			return
		}
		io.WriteString(w, answer)
	}))
	t.Cleanup(server.Close)
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestClusters(t *testing.T) {
	c := answering(t, "1.40.0", `{"cluster_statuses":[
		{"name":"one","host_statuses":[
			{"address":{},"stats":[{"name":"cx_total","value":"7"}],"health_status":{"eds_health_status":"HEALTHY"}},
			{"health_status":{"eds_health_status":"UNHEALTHY"}},
			{"health_status":{"failed_active_health_check":true,"eds_health_status":"HEALTHY"}},
			{"health_status":{"failed_outlier_check":true}},
			{"health_status":{"failed_active_degraded_check":true,"eds_health_status":"HEALTHY"}},
			{"health_status":{"eds_health_status":"DEGRADED"}},
			{"health_status":{"eds_health_status":"DRAINING"}},
			{}]},
		{"name":"few","host_statuses":[{"health_status":{"failed_active_health_check":true}},{"health_status":{"failed_active_health_check":true}},{"health_status":{}}]},
		{"name":"none"}]}`)
	got, err := c.Clusters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []ClusterHealth{{Name: "one", Total: 8, Healthy: 2, Degraded: 2},
		{Name: "few", Total: 3, Healthy: 1}, {Name: "none"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for i, few := range []bool{false, true, false} {
		if got[i].FewHealthy() != few {
			t.Errorf("%+v: few healthy: %v", got[i], !few)
		}
	}
}

func TestStats(t *testing.T) {
	c := answering(t, "1.40.0",
		"control_plane.connected_state: 1\nlistener_manager.lds.update_attempt: 9\nlistener_manager.lds.update_success: 5\nlistener_manager.lds.update_failure: 3\n"+
			"listener_manager.lds.update_rejected: 1\nlistener_manager.listener_create_failure: 2\nlistener_manager.lds.update_time: 1792\nlistener_manager.lds.version: 17241709254077376921\nlistener_manager.lds.version_text: \"1\"\n")
	got, err := c.ControlPlane(t.Context())
	if want := (ControlPlane{Streams: true, Connected: true, Attempts: 9, Successes: 5, Failures: 3,
		Rejected: 1, CreateFailures: 2, Version: 17241709254077376921}); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	// static listeners alone
	c = answering(t, "1.40.0", "listener_manager.listener_create_failure: 0\n")
	if got, err = c.ControlPlane(t.Context()); err != nil || got != (ControlPlane{}) {
		t.Errorf("got %+v, %v", got, err)
	}
	c = answering(t, "1.40.0",
		"cluster.cloud-internal-1.lb_healthy_panic: 4\ncluster.a.b.lb_healthy_panic: 1\ncluster.calm.lb_healthy_panic: 0\n")
	panics, err := c.Panics(t.Context())
	if diff := cmp.Diff(map[string]uint64{"cloud-internal-1": 4, "a.b": 1}, panics); err != nil ||
		diff != "" {
		t.Error(diff, err)
	}
	if plane, err := c.ControlPlane(t.Context()); !errors.Is(err, ErrEmpty) {
		t.Errorf("none of the stats: got %+v, %v", plane, err)
	}
}

func TestBootstrap(t *testing.T) {
	const text = `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump","static_clusters":[]},{"@type":"type.googleapis.com/envoy.admin.v3.BootstrapConfigDump","last_updated":"2026-01-02T03:04:05Z","bootstrap":{
		"node":{"id":"projects/1/networks/default/nodes/x","cluster":"c","locality":{"zone":"europe-west1-b"},"extensions":[{"name":"e"}],
			"metadata":{"TRAFFICDIRECTOR_NETWORK_NAME":"default","TRAFFICDIRECTOR_GCP_PROJECT_NUMBER":"1","INTERCEPTION_PORT":15001,"on":true,"deep":{"a":1},"null":null}},
		"static_resources":{"listeners":[{"name":"l"}],"clusters":[
			{"name":"xds","transport_socket":{"name":"tls","typed_config":{"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext","sni":"xds.example","common_tls_context":{"tls_certificates":[{"private_key":{"inline_string":"[redacted]"}}],"validation_context":{"trusted_ca":{"filename":"/etc/ca.pem"}}}}},
			 "load_assignment":{"endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"socket_address":{"address":"xds.example","port_value":8443}}}},{"endpoint":{"address":{"pipe":{"path":"/run/xds.sock"}}}},{"endpoint":{}}]}]}},
			{"name":"other","load_assignment":{"endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"socket_address":{"address":"1.2.3.4","port_value":1}}}}]}]}},
			{"name":"old","hosts":[{"socket_address":{"address":"::1","port_value":18000}}],"tls_context":{"sni":"old.example"}}]},
		"dynamic_resources":{
			"ads_config":{"api_type":"GRPC","grpc_services":[
				{"google_grpc":{"target_uri":"trafficdirector.googleapis.com:443","channel_credentials":{"ssl_credentials":{"root_certs":{"filename":"/etc/ssl/certs/ca-certificates.crt"}}},"call_credentials":[{"google_compute_engine":{}}]}},
				{"envoy_grpc":{"cluster_name":"xds"}}]},
			"lds_config":{"api_config_source":{"grpc_services":[{"google_grpc":{"target_uri":"dns:///plain.example"}},{"google_grpc":{"target_uri":"trafficdirector.googleapis.com:443","channel_credentials":{"ssl_credentials":{"root_certs":{"filename":"/etc/ssl/certs/ca-certificates.crt"}}}}}]}},
			"cds_config":{"api_config_source":{"cluster_names":["old"]}}},
		"admin":{"address":{"socket_address":{"address":"127.0.0.1","port_value":15000}}}}}]}`
	want := &Bootstrap{
		Node: Node{ID: "projects/1/networks/default/nodes/x", Cluster: "c", Zone: "europe-west1-b",
			Metadata: map[string]string{"TRAFFICDIRECTOR_NETWORK_NAME": "default",
				"TRAFFICDIRECTOR_GCP_PROJECT_NUMBER": "1", "INTERCEPTION_PORT": "15001", "on": "true"}},
		Admin: "127.0.0.1:15000", LDS: true,
		Targets: []Target{
			{Address: "trafficdirector.googleapis.com:443", TLS: true, RootCAFile: "/etc/ssl/certs/ca-certificates.crt"},
			{Address: "xds.example:8443", TLS: true, ServerName: "xds.example", RootCAFile: "/etc/ca.pem", Cluster: "xds"},
			{Address: "unix:///run/xds.sock", TLS: true, ServerName: "xds.example", RootCAFile: "/etc/ca.pem", Cluster: "xds"},
			{Address: "plain.example:443"},
			{Address: "[::1]:18000", TLS: true, ServerName: "old.example", Cluster: "old"},
		},
	}
	for _, version := range []string{"1.40.0", "1.9.1"} {
		got, err := answering(t, version, text).Bootstrap(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	for name, text := range map[string]string{
		"none":       `{"configs":[]}`,
		"wrong node": `{"configs":[{"bootstrap":{"node":[1,{"id":2}]}}]}`,
		"wrong id":   `{"configs":[{"bootstrap":{"node":{"id":{"x":[1]},"cluster":"c"}}}]}`,
	} {
		_, err := answering(t, "1.40.0", text).Bootstrap(t.Context())
		if !errors.Is(err, ErrNotJSON) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestTargetAddress(t *testing.T) {
	for uri, want := range map[string]string{
		"trafficdirector.googleapis.com:443": "trafficdirector.googleapis.com:443", "dns:///a.example:8443": "a.example:8443", "dns://8.8.8.8/a.example": "a.example:443",
		"dns:a.example:1": "a.example:1", "ipv4:10.0.0.1:80": "10.0.0.1:80", "ipv6:[::1]:80": "[::1]:80", "ipv6:[::1]": "[::1]:443", "a.example": "a.example:443", "unix:/run/x": "unix:/run/x",
	} {
		if got := targetAddress(uri); got != want {
			t.Errorf("%s: got %s, want %s", uri, got, want)
		}
	}
}

// nameserver answers each DNS question by a function, over UDP on loopback. What a VM's
// resolver says of a name that is not there beside NXDOMAIN (SERVFAIL, an answer of a search
// domain) it cannot know.
func nameserver(t *testing.T, answer func(query []byte) []byte) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buffer := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			if reply := answer(buffer[:n]); reply != nil {
				conn.WriteTo(reply, from)
			}
		}
	}()
	return &net.Resolver{
		PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
		}}
}

// noSuchName is NXDOMAIN, RFC 1035 4.1.1.
func noSuchName(query []byte) []byte {
	reply := append([]byte(nil), query...)
	reply[2] |= 0x80
	reply[3] = reply[3]&0xf0 | 3
	return reply
}

func TestProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"xds.example"}, IsCA: true,
		BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good, err := tls.Listen("tcp", "127.0.0.1:0",
		&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { good.Close() })
	go func() {
		for {
			conn, err := good.Accept()
			if err != nil {
				return
			}
			go func() { conn.(*tls.Conn).Handshake(); conn.Close() }()
		}
	}()
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mute.Close() }) // parallel subtests run after the function
	_, port, _ := net.SplitHostPort(good.Addr().String())

	tests := []struct {
		name, target string
		options      ProbeOptions
		step         error
		text         string // of the error, a part
	}{
		{"reached", good.Addr().String(), ProbeOptions{TLS: true, ServerName: "xds.example", RootCAFile: ca}, nil, ""},
		{"reached, no TLS", good.Addr().String(), ProbeOptions{}, nil, ""},
		{"by name", "localhost:" + port, ProbeOptions{TLS: true, ServerName: "xds.example", RootCAFile: ca}, nil, ""},
		{"no such name", "trafficdirector.googleapis.com:443", ProbeOptions{Resolver: nameserver(t, noSuchName)}, ErrLookUp, "look up trafficdirector.googleapis.com: no such host"},
		{"mute resolver", "trafficdirector.googleapis.com:443", ProbeOptions{Resolver: nameserver(t, func([]byte) []byte { return nil })}, ErrLookUp, "look up trafficdirector.googleapis.com: i/o timeout"},
		{"refused", closed, ProbeOptions{TLS: true}, ErrConnect, "connect " + closed + ": connection refused"},
		{"no such socket", "unix:///nonexistent/x", ProbeOptions{}, ErrConnect, "connect unix:///nonexistent/x: no such file or directory"},
		{"unknown authority", good.Addr().String(), ProbeOptions{TLS: true, ServerName: "xds.example"}, ErrTLS, "TLS handshake with 127.0.0.1: tls: failed to verify certificate"},
		{"another name", good.Addr().String(), ProbeOptions{TLS: true, ServerName: "other.example", RootCAFile: ca}, ErrTLS, "other.example"},
		{"no CA file", good.Addr().String(), ProbeOptions{TLS: true, RootCAFile: "/nonexistent/ca"}, ErrTLS, "root certificates"},
		{"empty CA file", good.Addr().String(), ProbeOptions{TLS: true, RootCAFile: empty}, ErrTLS, "holds no certificate"},
		{"mute server", mute.Addr().String(), ProbeOptions{TLS: true}, ErrTLS, "TLS handshake with 127.0.0.1: i/o timeout"},
		{"no port", "trafficdirector.googleapis.com", ProbeOptions{}, ErrLookUp, "missing port"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "mute") {
				t.Parallel()
			}
			began := time.Now()
			err := Probe(t.Context(), test.target, test.options)
			for _, step := range []error{ErrLookUp, ErrConnect, ErrTLS} {
				if errors.Is(err, step) != (step == test.step) {
					t.Errorf("%v: is %q: %v", err, step, errors.Is(err, step))
				}
			}
			if err != nil && !strings.Contains(err.Error(), test.text) {
				t.Errorf("%q does not say %q", err, test.text)
			}
			if took := time.Since(began); took > handshakeLimit+slack {
				t.Errorf("took %v", took)
			}
		})
	}
}
