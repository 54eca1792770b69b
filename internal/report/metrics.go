package report

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Prefix begins the name of every metric but those of Go and of the process, which have their
// customary names.
const Prefix = "service_proxy_agent_"

// Pass is what happened in a pass of the agent's loop, or since the pass before, which a
// [status.Status], how things stand at its end, does not tell. Counts are added up here, but for
// those since the start. No field may name a service, an address or a port: label values come from
// sets that are fixed when the program is built.
type Pass struct {
	Duration  time.Duration
	Drift     map[string]int // repaired, by iptables.DriftKind's words ("rule removed", …)
	Errors    map[string]int // that the pass met, by source, one of ErrorSources
	Untrusted int            // answers on the admin port that came from a foreign owner
	Forgotten map[string]int // conntrack entries removed, by reason, one of ForgetReasons

	// Redirect is how long ago the oldest of the changes was told that this pass has put into the
	// rules, or found in them at last. Zero: it did no such thing.
	Redirect time.Duration
	Writes   map[string]Writes // by the name of a family, as status.Family has it

	DumpReads  int // full dumps read from Envoy since the start
	Rejections int // listeners that Envoy rejected since the start, each time anew

	// Connected says whether Envoy has a stream to its control plane. nil: not known.
	Connected *bool
	// Refused is how many entries of listeners are left out because they never may be intercepted.
	Refused int
	// EnvoyVersion is the number in Status.Envoy.Version, "" when it is not known.
	EnvoyVersion string
}

// Writes are what a pass wrote to the rules of one family, and what that took.
type Writes struct {
	Applies map[string]int // transactions, by outcome ("applied", "refused", "locked", "failed")
	Rules   int            // added, changed or removed by them
	Took    []time.Duration
	Waited  time.Duration   // for the xtables lock
	Repairs []time.Duration // from what showed a drift to its end

	BackOffs   int       // began in this pass
	BackingOff bool      // repairs are held back now
	InSync     time.Time // when the rules last were seen, or put, as wanted; zero: not yet
}

// The values of labels.
var (
	// Modes are those of status.Status.Mode that have a series.
	Modes = []string{"bypass", "hold", "intercepting", "off", "paused"}
	// EnvoyStates are those of status.Envoy.State, in /server_info's words, and "UNREACHABLE" for
	// anything else.
	EnvoyStates = []string{"DRAINING", "INITIALIZING", "LIVE", "PRE_INITIALIZING", "UNREACHABLE"}
	// ErrorSources are the keys of Pass.Errors.
	ErrorSources = []string{"envoy_admin", "metadata_server"}
	// ForgetReasons are the keys of Pass.Forgotten.
	ForgetReasons = []string{"dns", "half_open"}

	outcomes = []string{"applied", "failed", "locked", "refused"}
	families = []string{iptables.IPv4.String(), iptables.IPv6.String()}
	backends = []string{iptables.Legacy, iptables.NFT}
)

// Sources is what does not come with a pass.
type Sources struct {
	Version, Commit string // of this program
	// The channels. nil: it is off.
	GuestAttributes func() guestattr.State
	Serial          func() SerialState
	CloudLogging    func() ChannelState
	// Envoy is what its admin interface was asked. nil: nothing.
	Envoy func() envoyadmin.Asked
	// Metadata is when the metadata server last gave a usable answer; zero: not yet. nil: not asked.
	Metadata func() time.Time
}

// Metrics is the state behind /metrics. Make it with [NewMetrics]. A scrape sees whole passes only,
// and never waits for one, nor a pass for a scrape but for the copy of a few numbers.
//
//	m := report.NewMetrics(report.Sources{Version: version, Serial: serial.State})
//	m.Pass(status, report.Pass{Duration: took, Refused: 1, …})
//	public.Metrics = m.Handler()
type Metrics struct {
	sources  Sources
	registry *prometheus.Registry

	duration, redirect prometheus.Histogram
	apply, repair      *prometheus.HistogramVec

	mu     sync.Mutex
	totals totals
	last   stand
}

// totals are the counters that passes add to. From 0 on: increase() does not see the first event of
// a series that begins with it.
type totals struct {
	passes, dumps, rejections, untrusted int
	drift, errors, forgotten             map[string]int
	family                               map[string]*familyTotals
}

type familyTotals struct {
	applies           map[string]int
	written, backOffs int
	waited            time.Duration
	inSync            time.Time
}

// stand is how things stood at the end of the last pass.
type stand struct {
	status  status.Status
	pass    Pass // without what totals have
	backOff map[string]bool
}

// NewMetrics returns Metrics with no pass yet.
func NewMetrics(s Sources) *Metrics {
	m := &Metrics{
		sources: s, registry: prometheus.NewRegistry(),
		duration: prometheus.NewHistogram(durations),
		redirect: prometheus.NewHistogram(redirects),
		apply:    prometheus.NewHistogramVec(applyTimes, []string{"family"}),
		repair:   prometheus.NewHistogramVec(repairTimes, []string{"backend"}),
		totals: totals{
			drift: map[string]int{}, errors: zeros(ErrorSources), forgotten: zeros(ForgetReasons),
			family: map[string]*familyTotals{},
		},
	}
	for k := iptables.RuleRemoved; k <= iptables.JumpLeft; k++ {
		m.totals.drift[k.String()] = 0
	}
	for _, name := range families {
		m.totals.family[name] = &familyTotals{applies: zeros(outcomes)}
		m.apply.WithLabelValues(name)
	}
	for _, backend := range backends {
		m.repair.WithLabelValues(backend)
	}
	m.registry.MustRegister(m, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func zeros(keys []string) map[string]int {
	n := map[string]int{}
	for _, k := range keys {
		n[k] = 0
	}
	return n
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	// ContinueOnError: a collector that fails must not hide the others. More than four scrapes at
	// once are answered 503.
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4, Timeout: 10 * time.Second,
	})
}

// Pass takes how things stand after a pass, and what happened in it. It copies what it keeps.
func (m *Metrics) Pass(s status.Status, p Pass) {
	s.Families, s.Findings = slices.Clone(s.Families), slices.Clone(s.Findings)
	m.mu.Lock()
	defer m.mu.Unlock()
	t := &m.totals
	m.duration.Observe(p.Duration.Seconds())
	if p.Redirect > 0 {
		m.redirect.Observe(p.Redirect.Seconds())
	}
	t.passes++
	t.untrusted += p.Untrusted
	t.dumps, t.rejections = max(t.dumps, p.DumpReads), max(t.rejections, p.Rejections)
	add(t.drift, p.Drift)
	add(t.errors, p.Errors)
	add(t.forgotten, p.Forgotten)
	m.last = stand{status: s, backOff: map[string]bool{}, pass: Pass{
		Connected: p.Connected, Refused: p.Refused, EnvoyVersion: p.EnvoyVersion,
	}}
	for _, f := range s.Families {
		m.writes(f.Family, s.Backend, p.Writes[f.Family])
	}
}

// writes takes what was written of one family.
func (m *Metrics) writes(family, backend string, w Writes) {
	t := m.totals.family[family]
	if t == nil {
		return // not a family of this program's
	}
	add(t.applies, w.Applies)
	t.written += w.Rules
	t.waited += w.Waited
	t.backOffs += w.BackOffs
	if w.InSync.After(t.inSync) {
		t.inSync = w.InSync
	}
	for _, d := range w.Took {
		m.apply.WithLabelValues(family).Observe(d.Seconds())
	}
	if slices.Contains(backends, backend) {
		for _, d := range w.Repairs {
			m.repair.WithLabelValues(backend).Observe(d.Seconds())
		}
	}
	m.last.backOff[family] = w.BackingOff
}

func add(to, from map[string]int) {
	for k, n := range from {
		to[clean(k)] += n
	}
}

// clone is a copy that no pass changes.
func (t totals) clone() totals {
	t.drift, t.errors, t.forgotten = maps.Clone(t.drift), maps.Clone(t.errors), maps.Clone(t.forgotten)
	t.family = maps.Clone(t.family)
	for name, f := range t.family {
		own := *f
		own.applies = maps.Clone(f.applies)
		t.family[name] = &own
	}
	return t
}

// Describe is a method of [prometheus.Collector].
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	for _, c := range []prometheus.Collector{m.duration, m.redirect, m.apply, m.repair} {
		c.Describe(to)
	}
	for _, d := range all {
		to <- d
	}
}

// Collect is a method of [prometheus.Collector]. What stands after a pass is left
// out before the first.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	// A copy first: to may be read slowly, and Pass must not wait for that. (What stands is replaced
	// as a whole, and never changed.)
	m.mu.Lock()
	totals, last := m.totals.clone(), m.last
	m.mu.Unlock()
	e := emit{to}
	e.program(m.sources)
	e.counts(totals)
	if totals.passes > 0 {
		e.stands(last)
	}
	e.asked(m.sources)
	e.channels(m.sources)
	for _, c := range []prometheus.Collector{m.duration, m.redirect, m.apply, m.repair} {
		c.Collect(to)
	}
}

// clean makes a label value valid: a byte that is no UTF-8, in a version Envoy tells, must not
// cost the whole scrape.
func clean(s string) string { return guestattr.OneLine(s, 200) }

func one(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// rulesOf is the label value for the rules of a family.
func rulesOf(family string) string { return "rules_" + strings.ToLower(family) }
