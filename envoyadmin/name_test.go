package envoyadmin

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestServiceName(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, tt := range []struct {
		name  string
		in    Listener
		chain FilterChain
		want  string
	}{
		{"nothing names it", Listener{Name: "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", Bound: true}, FilterChain{}, ""},
		// Traffic Director: published dumps.
		{"a forwarding rule", Listener{Bound: true}, FilterChain{
			Name:        "GLOBAL:global/PROJECT:75445969589/FORWARDING_RULE:td-gke-forwarding-rule/80/7063672130607539552",
			RouteConfig: "URL_MAP/75445969589_td-gke-url-map"}, "td-gke-forwarding-rule"},
		{"in the form of the project alone", Listener{Bound: true}, FilterChain{
			Name: "GLOBAL:123456789012/FORWARDING_RULE:web/8080/1"}, "web"},
		{"half of it", Listener{Bound: true}, FilterChain{Name: "GLOBAL:1/FORWARDING_RULE:/80"}, "GLOBAL:1/FORWARDING_RULE:/80"},
		{"a URL map", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/830293263384_lidiz-td-url-map"}, "lidiz-td-url-map"},
		{"of 2019", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/705219407589.http-rule"}, "http-rule"},
		{"with an authority", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/1071284184436_grpc-gke-url-map_0_fe-srv-td:50051"}, "grpc-gke-url-map"},
		{"without a project", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/one"}, "one"},
		{"that begins with a number", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/12_3scale"}, "3scale"},
		{"that is none", Listener{Bound: true}, FilterChain{RouteConfig: "URL_MAP/"}, "URL_MAP/"},
		{"a cluster names nothing", Listener{Bound: true}, FilterChain{Cluster: "cloud-internal-istio:cloud_mp_75445969589_3440763866634319801"}, ""},
		// Istio: istioctl's documents, Istio's source.
		{"a cluster of Istio's", Listener{Name: "10.96.0.10_443"}, FilterChain{Cluster: "outbound|443||web.shop.svc.cluster.local"}, "web.shop"},
		{"with a subset", Listener{Name: "10.96.0.10_443"}, FilterChain{Cluster: "outbound|443|v1|web.shop.svc.cluster.local"}, "web.shop"},
		{"of another domain", Listener{Name: "10.96.0.10_443"}, FilterChain{Cluster: "outbound|443||api.example.com"}, "api.example.com"},
		{"of the form for SNI", Listener{Name: "10.96.0.10_443"}, FilterChain{Cluster: "outbound_.8080_._.web.shop.svc.cluster.local"}, "web.shop"},
		{"a route with a host", Listener{Name: "10.96.0.10_80"}, FilterChain{RouteConfig: "web.shop.svc.cluster.local:80"}, "web.shop"},
		{"a route of many hosts", Listener{Name: "0.0.0.0_8080"}, FilterChain{RouteConfig: "8080"}, ""},
		{"past all services", Listener{Name: "0.0.0.0_8080"}, FilterChain{Name: "PassthroughFilterChain", Cluster: "PassthroughCluster"}, ""},
		{"into nothing", Listener{Name: "10.96.0.10_443"}, FilterChain{Cluster: "BlackHoleCluster"}, ""},
		{"a listener of IPv6", Listener{Name: "[2001:db8::1]_443"}, FilterChain{}, ""},
		{"a listener with a name", Listener{Name: "web"}, FilterChain{}, "web"},
		{"half a cluster of Istio's", Listener{Name: "web"}, FilterChain{Cluster: "outbound|443"}, "outbound|443"},
		// Others.
		{"a chain with a name", Listener{Bound: true}, FilterChain{Name: "web", Cluster: "c"}, "web"},
		{"of letters that numbers have too", Listener{Bound: true}, FilterChain{Name: "db2"}, "db2"},
		{"of a number", Listener{Bound: true}, FilterChain{Name: "10.0.0.1:80", Cluster: "web"}, "web"},
		{"of an address of IPv6", Listener{Bound: true}, FilterChain{Name: "fd00::1", Cluster: "web"}, "web"},
		{"a cluster alone", Listener{Bound: true}, FilterChain{Cluster: "web"}, "web"},
		{"several", Listener{Bound: true}, FilterChain{Cluster: "web,canary"}, ""},
		{"a bound listener is no service", Listener{Name: "out", Bound: true}, FilterChain{}, ""},
		{"a path", Listener{Bound: true}, FilterChain{Name: "projects/p/locations/global/web"}, "projects/p/locations/global/web"},
		{"a secret in a URL", Listener{Bound: true}, FilterChain{Name: "xdstp://a/b?token=x"}, "xdstp://a/b"},
		{"spaces", Listener{Bound: true}, FilterChain{Name: "the web\tof ours"}, "the_web_of_ours"},
		{"lines", Listener{Bound: true}, FilterChain{Name: "web\n2026 service-proxy-agent/1 ERROR: forged"}, "web_2026_service-proxy-agent/1_ERROR:_forged"},
		{"control characters", Listener{Bound: true}, FilterChain{Name: "\x1b[31mweb\x00\u202e\u2028"}, "_[31mweb___"},
		{"only such", Listener{Bound: true}, FilterChain{Name: " \x00\t", Cluster: "web"}, "web"},
		{"other letters", Listener{Bound: true}, FilterChain{Name: "größe-日本"}, "größe-日本"},
		{"no UTF-8", Listener{Bound: true}, FilterChain{Name: "web\xff\xfe"}, "web__"},
		{"long", Listener{Bound: true}, FilterChain{Name: long + "web"}, "…" + strings.Repeat("x", 94) + "web"},
		{"long and wide", Listener{Bound: true}, FilterChain{Name: strings.Repeat("日", 70)}, "…" + strings.Repeat("日", 32)},
		{"long, of Traffic Director's", Listener{Bound: true}, FilterChain{Name: "GLOBAL:global/PROJECT:1/FORWARDING_RULE:" + long + "/80/1"}, "…" + strings.Repeat("x", 97)},
	} {
		if got := tt.in.ServiceName(tt.chain); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func FuzzServiceName(f *testing.F) {
	f.Add("GLOBAL:global/PROJECT:1/FORWARDING_RULE:web/80/1", "URL_MAP/1_web", "outbound|80||a.b", "0.0.0.0_80")
	f.Add("_", "URL_MAP/1", "outbound_.80_._", "\xff")
	f.Fuzz(func(t *testing.T, chain, route, cluster, listener string) {
		got := Listener{Name: listener}.ServiceName(
			FilterChain{Name: chain, RouteConfig: route, Cluster: cluster})
		bad := func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }
		if len(got) > maxName || !utf8.ValidString(got) || strings.ContainsFunc(got, bad) {
			t.Errorf("%q", got)
		}
	})
}
