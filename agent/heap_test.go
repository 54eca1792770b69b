package agent

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// dumpOf is what Envoy says of a listener like Traffic Director's with a chain for each of n
// services, none next to another: those would be one rule.
func dumpOf(n int) string {
	var b strings.Builder
	b.WriteString(`{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.` +
		`DynamicListener","name":"` + td + `","active_state":{"version_info":"1","listener":{"@type":` +
		`"type.googleapis.com/envoy.config.listener.v3.Listener","name":"` + td + `","address":` +
		`{"socket_address":{"address":"0.0.0.0","port_value":15001}},"use_original_dst":true,` +
		`"traffic_direction":"OUTBOUND","filter_chains":[`)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"name":"service-%d","filter_chain_match":{"prefix_ranges":[{"address_prefix":`+
			`"10.%d.%d.%d","prefix_len":32}],"destination_port":80},"filters":[{"name":"tcp",`+
			`"typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.`+
			`TcpProxy","stat_prefix":"tcp","cluster":"cluster-%d"}}]}`, i, i>>15, i>>7&255, i<<1&255, i)
	}
	b.WriteString(`]}}}]}`)
	return b.String()
}

// heapOf is how many bytes a loop holds that has the rules of n services in, read from Envoy's dump
// of them: the Snapshot, what is wanted, what the kernel has, and what is told of it.
func heapOf(t testing.TB, backend string, n int) int {
	dump := dumpOf(n)
	envoy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := `{}`
		switch r.URL.RawQuery {
		case "resource=dynamic_listeners":
			body = dump
		case "":
			body = `{"version":"x/1.40.0/Clean/RELEASE/BoringSSL","state":"LIVE"}`
		}
		fmt.Fprint(w, body)
	}))
	defer envoy.Close()
	admin, err := envoyadmin.New(envoy.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	machine := &iptablestest.Machine{}
	k, err := iptables.Open(t.Context(), iptables.Options{Backend: backend, Machine: machine})
	if err != nil {
		t.Fatal(err)
	}
	m := newMeasured(t, k)
	if m.envoy.Snapshot, err = admin.Listeners(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.envoy.Generation++
	m.wanted.told(time.Now())
	m.settle(t)
	if rules := m.last.Families[0].Rules; rules < n {
		t.Fatalf("only %d rules for %d services", rules, n)
	}
	held := inUse()
	runtime.KeepAlive(m) // and nothing after this
	runtime.KeepAlive(k)
	runtime.KeepAlive(admin)
	held -= inUse()
	runtime.KeepAlive(machine)
	return held
}

func inUse() int {
	var m runtime.MemStats
	for range 2 { // the second takes what finalizers and pools held
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// TestHeapOfServices: what a service costs of memory for as long as it is there, which is what the
// agent holds at 10,000 of them.
func TestHeapOfServices(t *testing.T) {
	const (
		before = 443  // bytes, when it was first counted
		most   = 0.75 // of that
	)
	const few, many = 1_000, 11_000
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		each := float64(heapOf(t, backend, many)-heapOf(t, backend, few)) / (many - few)
		t.Logf("%s: %.0f bytes for each service, %.2f of what it was", backend, each, each/before)
		if each > most*before {
			t.Errorf("%s: %.0f bytes for each service, want at most %.0f", backend, each, most*before)
		}
	}
}
