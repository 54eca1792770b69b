package envoyadmin

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEndpoints(t *testing.T) {
	c := answering(t, "1.40.0", `{"cluster_statuses":[
		{"name":"other","host_statuses":[{"address":{"socket_address":{"address":"10.9.9.9","port_value":9}}}]},
		{"name":"one","added_via_api":true,"host_statuses":[
			{"address":{"socket_address":{"address":"10.0.0.1","port_value":80}},"stats":[{"name":"cx_total","value":"7"}],"health_status":{"eds_health_status":"HEALTHY"}},
			{"address":{"socket_address":{"address":"fd00::1","port_value":80}},"health_status":{"eds_health_status":"DRAINING"}},
			{"address":{"pipe":{"path":"/run/x.sock"}},"health_status":{"failed_active_health_check":true,"failed_outlier_check":true,"eds_health_status":"HEALTHY"}},
			{"address":{"envoy_internal_address":{"server_listener_name":"x"}},"health_status":{"eds_health_status":"DEGRADED"}}]},
		{"name":"none"}]}`)
	got, err := c.Endpoints(t.Context(), "none", "absent", "one")
	want := []ClusterEndpoints{{ClusterHealth: ClusterHealth{Name: "none"}},
		{ClusterHealth: ClusterHealth{Name: "one", Total: 4, Healthy: 1, Degraded: 1}, First: []Endpoint{
			{"[fd00::1]:80", "draining"},
			{"unix:///run/x.sock", "failed active health check, failed outlier check"},
			{"", Degraded}, {"10.0.0.1:80", Healthy}}}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	if got, err := c.Endpoints(t.Context()); got != nil || err != nil {
		t.Errorf("of no cluster: %v, %v", got, err)
	}
	var hosts []string
	for i := range 100 {
		hosts = append(hosts, fmt.Sprintf(
			`{"address":{"socket_address":{"address":"10.0.0.%d","port_value":80}},"health_status":{"eds_health_status":%q}}`,
			i, map[bool]string{true: "UNHEALTHY", false: "HEALTHY"}[i >= 95]))
	}
	c = answering(t, "1.40.0", `{"cluster_statuses":[{"name":"many","host_statuses":[`+
		strings.Join(hosts, ",")+`]}]}`)
	if got, err = c.Endpoints(t.Context(), "many"); err != nil || len(got) != 1 ||
		len(got[0].First) != maxEndpoints || got[0].Total != 100 || got[0].Healthy != 95 ||
		got[0].First[0].Address != "10.0.0.95:80" || got[0].First[9].Address != "10.0.0.4:80" {
		t.Errorf("many: %+v, %v", got, err)
	}
	for _, text := range []string{`{"other":1}`, `[]`, ``, `{"cluster_statuses":[`} {
		if got, err := answering(t, "1.40.0", text).Endpoints(t.Context(), "x"); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestRoutes(t *testing.T) {
	const dynamic = `{"configs":[
		{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.DynamicRouteConfig","version_info":"7","last_updated":"2026-01-02T03:04:05Z","route_config":{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","name":"other","virtual_hosts":[]}},
		{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.DynamicRouteConfig","version_info":"8","route_config":{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","name":"web.*","virtual_hosts":[
			{"name":"a","domains":["a.test","a.test:80"],"routes":[
				{"match":{"prefix":"/x"},"route":{"cluster":"x","timeout":"3s"}},
				{"match":{"prefix":"/y"},"route":{"weighted_clusters":{"clusters":[{"name":"y1","weight":90},{"name":"y2","weight":10},{"cluster_header":"z"}]}}},
				{"match":{"prefix":"/z"},"redirect":{"path_redirect":"/"}},
				{"match":{"prefix":"/"},"route":{"cluster":"x"}}]},
			{"name":"b","domains":["*"],"routes":[{"match":{"prefix":"/"},"route":{"cluster_header":"to"}}]}],
			"response_headers_to_add":[{"header":{"key":"k","value":"v"}}]}}]}`
	const static = `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.RoutesConfigDump.StaticRouteConfig","route_config":{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration","name":"inline","virtual_hosts":[{"name":"v","domains":["*"],"routes":[{"route":{"cluster":"c"}}]}]}}]}`
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RawQuery)
		switch r.URL.Query().Get("resource") {
		case "dynamic_route_configs":
			io.WriteString(w, dynamic)
		case "static_route_configs":
			io.WriteString(w, static)
		default:
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	got, ok, err := c.Routes(t.Context(), "web.*")
	want := Routes{Name: "web.*", Version: "8", Count: 2, Hosts: []VirtualHost{
		{Name: "a", Domains: []string{"a.test", "a.test:80"}, DomainCount: 2,
			Clusters: []string{"x", "y1", "y2"}, ClusterCount: 3, ByHeader: true},
		{Name: "b", Domains: []string{"*"}, DomainCount: 1, ByHeader: true}}}
	if diff := cmp.Diff(want, got); err != nil || !ok || diff != "" {
		t.Error(ok, err, diff)
	}
	if len(asked) != 1 || !strings.Contains(asked[0], `name_regex=web%5C.%5C%2A`) {
		t.Errorf("asked %q: the name must be taken as it is", asked)
	}
	if got, ok, err = c.Routes(t.Context(), "inline"); err != nil || !ok || got.Count != 1 ||
		got.Hosts[0].Clusters[0] != "c" {
		t.Errorf("a listener's own: %+v %v %v", got, ok, err)
	}
	all, err := c.RoutesOf(t.Context(), "inline", "nobody's", "web.*")
	if err != nil || len(all) != 2 || all[0].Name != "inline" || all[1].Name != "web.*" {
		t.Errorf("several: %+v, %v", all, err)
	}
	if got, ok, err = c.Routes(t.Context(), strings.Repeat("x", 1<<20)); ok || err != nil {
		t.Errorf("none of that name: %+v %v", got, err)
	}
	if _, ok, err := answering(t, "1.40.0", `{"x":[]}`).Routes(t.Context(), "a"); ok ||
		!errors.Is(err, ErrNotJSON) {
		t.Errorf("somebody else's answer: %v %v", ok, err)
	}
}

// TestRoutesAreBounded: of a large route configuration the beginning is kept.
func TestRoutesAreBounded(t *testing.T) {
	var hosts []string
	long := strings.Repeat("n", 20_000)
	for i := range 100 {
		var domains, routes []string
		for j := range 30 {
			domains = append(domains, fmt.Sprintf(`"%d-%d.test"`, i, j))
			routes = append(routes, fmt.Sprintf(`{"route":{"cluster":"%d-%d-%s"}}`, i, j, long[:i*10]))
		}
		hosts = append(hosts, fmt.Sprintf(`{"name":%q,"domains":[%s],"routes":[%s]}`, long,
			strings.Join(domains, ","), strings.Join(routes, ",")))
	}
	c := answering(t, "1.40.0", `{"configs":[{"@type":"x","route_config":{"name":"r","virtual_hosts":[`+
		strings.Join(hosts, ",")+`]}}]}`)
	got, ok, err := c.Routes(t.Context(), "r")
	if err != nil || !ok || got.Count != 100 || len(got.Hosts) != maxHosts {
		t.Fatalf("%v %v: %d of %d hosts", ok, err, len(got.Hosts), got.Count)
	}
	for _, h := range got.Hosts {
		if len(h.Name) != maxText || len(h.Domains) != maxDomains || h.DomainCount != 30 ||
			len(h.Clusters) != maxRouted || h.ClusterCount != 30 {
			t.Errorf("a host of %d bytes, %d of %d domains, %d of %d clusters", len(h.Name),
				len(h.Domains), h.DomainCount, len(h.Clusters), h.ClusterCount)
		}
	}
}

// TestSourceOfAChain: what a chain wants of the source is read.
func TestSourceOfAChain(t *testing.T) {
	c := answering(t, "1.40.0", `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.DynamicListener","name":"L","active_state":{"listener":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener","name":"L","address":{"socket_address":{"address":"0.0.0.0","port_value":1}},"use_original_dst":true,"filter_chains":[
		{"name":"s","filter_chain_match":{"source_prefix_ranges":[{"address_prefix":"10.0.0.0","prefix_len":8}],"direct_source_prefix_ranges":[{"address_prefix":"fd00::","prefix_len":8}],"source_ports":[7],"source_type":"SAME_IP_OR_LOOPBACK"}},
		{"name":"e","filter_chain_match":{"source_type":"EXTERNAL"}},{"name":"a"}]}}}]}`)
	var d dump
	d.whole = true
	err := c.readDump(t.Context(), dynamicPath, c.LongLimit, maxLong, &d, d.dynamicListener)
	if err != nil || len(d.listeners) != 1 || !d.listeners[0].HandsOff || !d.listeners[0].OriginalDst {
		t.Fatalf("%v: %+v", err, d.listeners)
	}
	want := []*SourceMatch{{Prefixes: prefixList("10.0.0.0/8"), Direct: prefixList("fd00::/8"),
		Ports: []uint16{7}, Local: true}, {External: true}, nil}
	for i, chain := range d.listeners[0].Chains {
		if diff := cmp.Diff(want[i], chain.rare().Source, cmp.Comparer(func(a, b netip.Prefix) bool {
			return a == b
		})); diff != "" {
			t.Errorf("chain %s: %s", chain.Name, diff)
		}
	}
}
