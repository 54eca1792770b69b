package agent

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// measured is a loop whose passes are in metrics, over a kernel.
type measured struct {
	*loop
	metrics *report.Metrics
	last    status.Status
	changes int
}

func newMeasured(t testing.TB, k *iptables.Kernel) *measured {
	m := &measured{metrics: report.NewMetrics(report.Sources{
		GuestAttributes: guestattr.New(guestattr.Options{}).State,
		Serial:          report.NewSerial("").State,
	})}
	listeners := func(port uint16) ([]sockdiag.Listener, error) {
		return []sockdiag.Listener{
			{Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), port), V6Only: true, UID: proxyUID},
			{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), port), V6Only: true, UID: proxyUID},
		}, nil
	}
	log := zap.NewNop()
	m.loop = &loop{
		settings: Settings{EnvoyAdmin: "127.0.0.1:15000", ProxyUser: "envoy", WhenEnvoyDown: "keep"},
		log:      log,
		inbox:    inbox{events: make(chan iptables.Event)},
		attribute: attributeInForce{
			Known: true, Config: attribute.Default()},
		mark: readMark(t.TempDir(), log),
		vm:   quietVM(k, listeners),
		told: told{log: log, reporters: reporters{
			events:      func(report.Event) {},
			metrics:     m.metrics.Pass,
			status:      func(s status.Status) { m.last = s },
			intercepted: func(intercepted) {},
			history:     func(Failures) {},
			transitions: func([]status.Transition) {},
			ready:       func() error { return nil },
		}},
	}
	m.user = proxyIDs(m.settings.ProxyUser, m.vm.userIDs)
	none := func(context.Context, uint16) (int, error) { return 0, nil }
	for _, f := range families {
		m.families = append(m.families, reconcile.New(f, k, reconcile.Flows{
			HalfOpen: func(context.Context, []netip.Prefix) (int, error) { return 0, nil },
			UDP:      none, LateUDP: none,
		}, log))
	}
	m.envoy.State, m.envoy.Configured = "LIVE", true
	m.envoy.Info.Version = envoyadmin.Version{Major: 1, Minor: 40}
	return m
}

// serve has Envoy tell of services, none next to another: those would be one rule. Each time
// another one is the last. A tenth of them are more than may be intercepted.
func (m *measured) serve(n int) {
	l := listener(td, both)
	one := func(i int) {
		at := netip.AddrFrom4([4]byte{10, byte(i >> 15), byte(i >> 7), byte(i << 1)})
		l.Chains = append(l.Chains, envoyadmin.FilterChain{Port: 80,
			Prefixes: []netip.Prefix{netip.PrefixFrom(at, 32)}})
		if i%10 == 0 {
			local := netip.AddrFrom4([4]byte{127, 0, byte(i >> 8), byte(i)})
			l.Chains = append(l.Chains, envoyadmin.FilterChain{Port: 81,
				Prefixes: []netip.Prefix{netip.PrefixFrom(local, 32)}})
		}
	}
	for i := range n - 1 {
		one(i)
	}
	m.changes++
	one(n + 10*(m.changes%100) + 1)
	m.envoy.Generation++
	m.envoy.Snapshot.Listeners = []envoyadmin.Listener{l}
	m.wanted.told(time.Now())
}

// settle makes passes until the rules are in.
func (m *measured) settle(t testing.TB) {
	t.Helper()
	for range 5 {
		m.pass(t.Context(), time.Now())
		if m.last.Ready {
			return
		}
	}
	t.Fatalf("not ready: %s", m.last.NotReady)
}

// scrape gets /metrics once. It returns the number of series.
func scrape(client *http.Client, url string) (series int, err error) {
	res, err := client.Get(url)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return 0, errors.Join(err, errors.New(res.Status))
	}
	for line := range strings.Lines(string(body)) {
		if !strings.HasPrefix(line, "#") {
			series++
		}
	}
	return series, nil
}

// TestSeriesDoNotGrow: a scrape of 10,000 services has as many series as one of 10. What is added
// by services is paid by every VM's Prometheus.
func TestSeriesDoNotGrow(t *testing.T) {
	series := map[int]int{}
	for _, n := range []int{10, 10_000} {
		k, err := iptables.Open(t.Context(), iptables.Options{
			Backend: iptables.NFT, Machine: &iptablestest.Machine{}})
		if err != nil {
			t.Fatal(err)
		}
		m := newMeasured(t, k)
		for range 2 {
			m.serve(n)
			m.settle(t)
		}
		server := httptest.NewServer(m.metrics.Handler())
		if series[n], err = scrape(server.Client(), server.URL); err != nil {
			t.Fatal(err)
		}
		server.Close()
		if rules := m.last.Families[0].Rules; rules < n {
			t.Errorf("only %d rules for %d services", rules, n)
		}
	}
	if series[10] != series[10_000] || series[10] < 200 {
		t.Errorf("series by number of services: %v", series)
	}
	t.Logf("series: %d", series[10])
}
