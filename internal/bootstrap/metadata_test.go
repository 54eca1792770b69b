package bootstrap

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// vmMetadata serves paths below computeMetadata/v1/; what it lacks is 404, as of the real server.
func vmMetadata(t *testing.T, values map[string]string) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		value, ok := values[strings.TrimPrefix(r.URL.Path, "/computeMetadata/v1/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(value))
	}))
	t.Cleanup(srv.Close)
	return srv
}

// The VM's address is the first interface's, IPv6 where it has no IPv4; a VM whose metadata lacks
// something is refused by name, and not called ".". ipv6s is read as one address a line, as gRPC
// reads it (xds/googledirectpath: "instance/network-interfaces/0/ipv6s"). Whether an IPv6-only
// interface has an empty ip or none is not documented: both are here.
func TestReadVM(t *testing.T) {
	const zone, network = "projects/987654321/zones/europe-west1-b",
		"projects/987654321/networks/default"
	for _, tt := range []struct {
		name  string
		alter map[string]string // "-": not there
		ip    string
		fails string
	}{
		{"IPv4", nil, "10.132.0.2", ""},
		{"both", map[string]string{"ipv6s": "2600:1900::1\n"}, "10.132.0.2", ""},
		{"IPv6 only, no ip", map[string]string{"ip": "-", "ipv6s": "2600:1900:4010:1:0:0:0:0\n"}, "2600:1900:4010:1::", ""},
		{"IPv6 only, empty ip", map[string]string{"ip": "\n", "ipv6s": "fd20:1:2::3"}, "fd20:1:2::3", ""},
		{"two IPv6 addresses", map[string]string{"ip": "", "ipv6s": "2600:1900::1\n2600:1900::2\n"}, "2600:1900::1", ""},
		{"no address", map[string]string{"ip": ""}, "", "network-interfaces/0/ip"},
		{"an address that is none", map[string]string{"ip": "10.0.0"}, "", `"10.0.0"`},
		{"no name", map[string]string{"name": ""}, "", "instance/name"},
		{"no network", map[string]string{"network": "-"}, "", "network-interfaces/0/network"},
		{"empty network", map[string]string{"network": "/"}, "", "network-interfaces/0/network"},
	} {
		values := map[string]string{"instance/name": "vm-1", "instance/zone": zone,
			"project/numeric-project-id":       "987654321",
			"instance/network-interfaces/0/ip": "10.132.0.2", "instance/network-interfaces/0/network": network}
		for key, value := range tt.alter {
			path := "instance/network-interfaces/0/" + key
			if key == "name" {
				path = "instance/name"
			}
			if values[path] = value; value == "-" {
				delete(values, path)
			}
		}
		t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(vmMetadata(t, values).URL, "http://"))
		vm, err := readVM(t.Context())
		if tt.fails != "" {
			if err == nil || !strings.Contains(err.Error(), tt.fails) {
				t.Errorf("%s: have %+v, %v; want …%s…", tt.name, vm, err, tt.fails)
			}
			continue
		}
		if want := (VM{"vm-1", "europe-west1-b", tt.ip, "default", "987654321"}); err != nil ||
			vm != want {
			t.Errorf("%s: have %+v, %v; want %+v", tt.name, vm, err, want)
			continue
		}
		node, err := envoyNode(attribute.Default(), vm)
		id := "projects/987654321/networks/default/nodes/vm-1.europe-west1-b." + tt.ip
		if err != nil || node.GetId() != id ||
			node.GetMetadata().GetFields()["INSTANCE_IP"].GetStringValue() != tt.ip {
			t.Errorf("%s: node %v, %v", tt.name, node, err)
		}
	}
}
