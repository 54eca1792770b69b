package report

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// noon is when it was well last.
var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// sources are channels that have seen trouble, and what was asked.
func sources() Sources {
	return Sources{
		Version: "1.2.3", Commit: "0123abc",
		GuestAttributes: func() guestattr.State {
			return guestattr.State{Enabled: true, LastError: "503", Since: noon, LastSuccess: noon,
				Pending: 1, Writes: 20, Reads: 4, Failures: 3, Superseded: 90, Lost: 2, Changed: 1}
		},
		Serial: func() SerialState {
			return SerialState{Path: "/dev/ttyS0", Open: true, Lines: 12, Dropped: 5, Failures: 1,
				LastSuccess: noon.Add(time.Second)}
		},
		CloudLogging: func() ChannelState {
			return ChannelState{Enabled: true, Up: true, Writes: 40, Failures: 2, Dropped: 6,
				LastSuccess: noon.Add(2 * time.Second)}
		},
		Envoy: func() (a envoyadmin.Asked) {
			a.Answered = noon.Add(3 * time.Second)
			a.Questions[envoyadmin.DumpQuestion] = envoyadmin.Cost{Count: 2, Took: 600 * time.Millisecond}
			a.Questions[envoyadmin.LookQuestion] = envoyadmin.Cost{Count: 60, Took: 90 * time.Millisecond}
			return a
		},
		Metadata: func() time.Time { return noon.Add(4 * time.Second) },
	}
}

// pass is what Metrics takes of one.
type pass struct {
	status   status.Status
	happened Pass
}

// twoPasses is a pass that wrote and repaired, then a quiet one.
func twoPasses() [2]pass {
	end := time.Date(2026, 11, 21, 11, 0, 1, 250e6, time.UTC)
	first := pass{
		status.Status{
			Heartbeat: end, Mode: "hold", Backend: "nft",
			Envoy:    status.Envoy{State: "PRE_INITIALIZING"},
			Families: []status.Family{{Family: "IPv4", Usable: true, Rules: 4}, {Family: "IPv6"}},
			Findings: []symptom.Finding{
				{ID: "envoy-not-configured", Severity: symptom.Error},
				{ID: "explained", Severity: symptom.Error, ExplainedBy: "envoy-not-configured"},
			},
		},
		Pass{
			Duration: 40 * time.Millisecond, DumpReads: 2,
			Drift:     map[string]int{"rule removed": 2, "jump removed": 1},
			Errors:    map[string]int{"envoy_admin": 1},
			Untrusted: 1, Rejections: 1, Forgotten: map[string]int{"half_open": 3},
			Writes: map[string]Writes{"IPv4": {
				Applies: map[string]int{"applied": 1}, Rules: 4, Took: []time.Duration{20 * time.Millisecond},
				Repairs: []time.Duration{30 * time.Millisecond}, BackOffs: 1, BackingOff: true, InSync: end,
			}},
		},
	}
	refused := symptom.Finding{ID: "entry-refused", Severity: symptom.Warning}
	second := pass{
		status.Status{
			Heartbeat: end.Add(time.Second), Mode: "intercepting", Ready: true, Backend: "nft",
			Envoy: status.Envoy{State: "LIVE", Version: "abc/1.40.0/Clean", Listeners: 5, Rejected: 1},
			Families: []status.Family{
				{Family: "IPv4", Usable: true, Equal: true, Jumps: true, Rules: 120, Services: 100, ServicePorts: 1},
				{Family: "IPv6"},
			},
			Findings: []symptom.Finding{
				{ID: "listener-rejected", Severity: symptom.Error}, refused, refused, refused,
				{ID: "also-explained", Severity: symptom.Error, ExplainedBy: "listener-rejected"},
			},
			Cost: status.Cost{Bucket: status.Bucket{Level: -.25, Size: 6, Share: .1}},
		},
		Pass{
			Duration: 400 * time.Microsecond, EnvoyVersion: "1.40.0", Refused: 3,
			DumpReads: 2, Rejections: 1, Redirect: 70 * time.Millisecond, Connected: new(true),
			Writes: map[string]Writes{"IPv4": {
				Applies: map[string]int{"applied": 1, "refused": 1}, Rules: 116,
				Took:   []time.Duration{3 * time.Second, 30 * time.Millisecond},
				Waited: 2500 * time.Millisecond, InSync: end.Add(time.Second),
			}},
		},
	}
	return [2]pass{first, second}
}

// TestMetricsGolden holds a whole scrape, without the runtime's own metrics, against
// testdata/metrics.golden.
func TestMetricsGolden(t *testing.T) {
	m := NewMetrics(sources())
	for _, p := range twoPasses() {
		m.Pass(p.status, p.happened)
	}
	var b strings.Builder
	for _, f := range gather(t, m) {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	checkGolden(t, "metrics.golden", strings.ReplaceAll(b.String(), runtime.Version(), "GOVERSION"))
}

func TestMetricsLint(t *testing.T) {
	m := NewMetrics(sources())
	for _, p := range twoPasses() {
		m.Pass(p.status, p.happened)
	}
	problems, err := testutil.CollectAndLint(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestMetricsScrape is a scrape over HTTP: everything of ours has the prefix, Go's and the
// process's have their customary names, and the first one before any pass works.
func TestMetricsScrape(t *testing.T) {
	m := NewMetrics(Sources{Version: "1.2.3"})
	s := httptest.NewServer(m.Handler())
	defer s.Close()
	body := scrape(t, s.URL)
	for l := range strings.Lines(body) {
		if !strings.HasPrefix(l, "#") && !strings.HasPrefix(l, Prefix) &&
			!strings.HasPrefix(l, "go_") && !strings.HasPrefix(l, "process_") {
			t.Errorf("no prefix: %s", l)
		}
	}
	for _, want := range []string{"process_resident_memory_bytes ", "go_goroutines "} {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("no %q in the first scrape", want)
		}
	}
	for _, not := range []string{"heartbeat", "_ready ", "guest_attributes", "finding", "last_success"} {
		if strings.Contains(body, Prefix+not) {
			t.Errorf("%s in a scrape before the first pass", not)
		}
	}
}

// TestMetricsFromZero: no counter and no histogram appears with its first event. increase() would
// not see it.
func TestMetricsFromZero(t *testing.T) {
	names := func(m *Metrics) (zero map[string]bool) {
		zero = map[string]bool{}
		for _, f := range gather(t, m) {
			for _, v := range f.Metric {
				name := f.GetName() + labels(v)
				switch f.GetType() {
				case dto.MetricType_COUNTER:
					zero[name] = v.GetCounter().GetValue() == 0
				case dto.MetricType_HISTOGRAM:
					zero[name] = v.GetHistogram().GetSampleCount() == 0
				}
			}
		}
		return zero
	}
	s := sources()
	first := NewMetrics(Sources{
		GuestAttributes: func() guestattr.State { return guestattr.State{} },
		Serial:          func() SerialState { return SerialState{} },
	})
	later := NewMetrics(s)
	for _, p := range twoPasses() {
		later.Pass(p.status, p.happened)
	}
	begin := names(first)
	for name := range names(later) {
		if !begin[name] {
			t.Errorf("%s does not begin with 0 before the first pass", name)
		}
	}
	if len(begin) < 60 {
		t.Errorf("only %d counters", len(begin))
	}
}

// TestMetricsAlways: what an alert asks for is there on a well VM too, with 0. An alert on a series
// that goes away resolves for no reason, or never fires.
func TestMetricsAlways(t *testing.T) {
	m := NewMetrics(Sources{})
	m.Pass(status.Status{Families: []status.Family{{Family: "IPv4"}, {Family: "IPv6"}}}, Pass{})
	have := map[string]bool{}
	for _, f := range gather(t, m) {
		for _, v := range f.Metric {
			have[strings.TrimPrefix(f.GetName(), Prefix)+labels(v)] = true
		}
	}
	want := []string{`backing_off{family="IPv6"}`, `repair_latency_seconds{backend="legacy"}`}
	for _, name := range []string{"enabled", "up", "writes_total", "failures_total", "dropped_total"} {
		for _, channel := range []string{"guest_attributes", "serial", "cloud_logging"} {
			want = append(want, fmt.Sprintf("channel_%s{channel=%q}", name, channel))
		}
	}
	for _, k := range symptom.Kinds() {
		for _, s := range k.Severities {
			want = append(want, fmt.Sprintf("finding{id=%q,severity=%q}", k.ID, s))
		}
	}
	for _, name := range want {
		if !have[name] {
			t.Errorf("no series %s", name)
		}
	}
}

func gather(t *testing.T, m *Metrics) []*dto.MetricFamily {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(m)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func labels(m *dto.Metric) string {
	var all []string
	for _, l := range m.Label {
		all = append(all, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
	}
	if all == nil {
		return ""
	}
	return "{" + strings.Join(all, ",") + "}"
}

// TestMetricsGuestAttributes: a VM that refuses guest attributes is told from one whose
// metadata server fails, and both from one where nothing was written yet.
func TestMetricsGuestAttributes(t *testing.T) {
	for _, tt := range []struct {
		state       guestattr.State
		enabled, up string
	}{
		{guestattr.State{Enabled: true}, "1", "0"},
		{guestattr.State{Enabled: true, Since: noon}, "1", "1"},
		{guestattr.State{Enabled: true, Since: noon, LastError: "503 Service Unavailable"}, "1", "0"},
		{guestattr.State{Since: noon, LastError: "403 Guest attributes endpoint access is disabled."},
			"0", "0"},
	} {
		m := NewMetrics(Sources{GuestAttributes: func() guestattr.State { return tt.state }})
		s := httptest.NewServer(m.Handler())
		body := scrape(t, s.URL)
		s.Close()
		for name, want := range map[string]string{
			`channel_enabled{channel="guest_attributes"}`: tt.enabled,
			`channel_up{channel="guest_attributes"}`:      tt.up,
		} {
			if !strings.Contains(body, "\n"+Prefix+name+" "+want+"\n") {
				t.Errorf("%+v: no %s %s", tt.state, name, want)
			}
		}
	}
}

// TestMetricsDriftKinds fails when iptables gets a kind of drift that would not begin at 0.
func TestMetricsDriftKinds(t *testing.T) {
	for k := iptables.RuleRemoved; k <= iptables.JumpLeft+1; k++ {
		if known := !strings.HasPrefix(k.String(), "DriftKind("); known != (k <= iptables.JumpLeft) {
			t.Errorf("%v: the last kind is no longer %v", k, iptables.JumpLeft)
		}
	}
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v, %v", url, res.Status, err)
	}
	return string(body)
}

// TestMetricsOddText: text from outside in a label spoils neither the scrape nor its lines.
func TestMetricsOddText(t *testing.T) {
	m := NewMetrics(Sources{Version: "1\xff"})
	m.Pass(status.Status{Mode: "?", Envoy: status.Envoy{State: "odd"}},
		Pass{EnvoyVersion: "1.40\xfe\n" + strings.Repeat("x", 5000), Errors: map[string]int{
			"\xfd": 1, "\xfe": 1}})
	s := httptest.NewServer(m.Handler())
	defer s.Close()
	body := scrape(t, s.URL)
	if !strings.Contains(body, Prefix+`envoy_state{state="UNREACHABLE"} 1`) {
		t.Error("an unknown state is not UNREACHABLE")
	}
	if !strings.Contains(body, "1.40\uFFFD") {
		t.Error("no version in the scrape")
	}
}

// TestMetricsRaces scrapes while passes are reported, for the race detector, and checks that a
// scrape sees whole passes.
func TestMetricsRaces(t *testing.T) {
	m := NewMetrics(sources())
	r := prometheus.NewRegistry()
	r.MustRegister(m)
	two := twoPasses()
	var passes sync.WaitGroup
	passes.Go(func() {
		for i := range 500 {
			m.Pass(two[i%2].status, two[i%2].happened)
		}
	})
	for range 50 {
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		ready, intercepting := -1.0, -1.0
		for _, f := range families {
			for _, v := range f.Metric {
				switch {
				case f.GetName() == Prefix+"ready":
					ready = v.GetGauge().GetValue()
				case f.GetName() == Prefix+"mode" && v.Label[0].GetValue() == "intercepting":
					intercepting = v.GetGauge().GetValue()
				}
			}
		}
		if ready != intercepting {
			t.Fatalf("ready %v with intercepting %v: half a pass", ready, intercepting)
		}
	}
	passes.Wait()
}
