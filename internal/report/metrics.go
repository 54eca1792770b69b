package report

import (
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Prefix begins the name of every metric.
const Prefix = "service_proxy_agent_"

// Pass is what happened in a pass of the agent's loop, or since the pass before, which a
// [status.Status], how things stand at its end, does not tell. Counts are added up here. No field
// may name a service, an address or a port: label values come from sets that are fixed when the
// program is built.
type Pass struct {
	Duration  time.Duration
	DumpReads int            // full dumps read from Envoy, each of which costs its main thread time
	Drift     map[string]int // repaired, by iptables.DriftKind's words ("rule removed", …)
	Errors    map[string]int // that the pass met, by source, one of ErrorSources
	Untrusted int            // answers on the admin port that came from a foreign owner

	Writes map[string]Writes // by the name of a family, as status.Family has it

	// Refused is how many entries of listeners are left out because they never may be intercepted.
	Refused int
	// EnvoyVersion is the number in Status.Envoy.Version, "" when it is not known.
	EnvoyVersion string
}

// Writes are what a pass wrote to the rules of one family.
type Writes struct {
	Applies map[string]int // transactions, by outcome ("applied", "refused", "locked", "failed")
	Rules   int            // added, changed or removed by them
}

// Modes are the values of status.Status.Mode that have a series.
var Modes = []string{"bypass", "hold", "intercepting", "paused"}

// EnvoyStates are the values of status.Envoy.State, in /server_info's words, and "UNREACHABLE" for
// anything else.
var EnvoyStates = []string{"DRAINING", "INITIALIZING", "LIVE", "PRE_INITIALIZING", "UNREACHABLE"}

// ErrorSources are the keys of Pass.Errors.
var ErrorSources = []string{"envoy_admin", "metadata_server"}

// Sources is what does not come with a pass.
type Sources struct {
	Version, Commit string                 // of this program
	GuestAttributes func() guestattr.State // nil: no such metrics
	Serial          func() SerialState     // nil: no such metrics
	CloudLogging    func() ChannelState    // nil: no such metrics
}

// Metrics is the state behind /metrics. Make it with [NewMetrics]. A scrape sees whole passes only,
// and never waits for one.
//
//	m := report.NewMetrics(report.Sources{Version: version, Serial: serial.State})
//	m.Pass(status, report.Pass{Duration: took, DumpReads: 1, …})
//	public.Metrics = m.Handler()
type Metrics struct {
	sources  Sources
	duration prometheus.Histogram
	registry *prometheus.Registry

	mu      sync.Mutex
	last    status.Status
	version string // Envoy's
	refused int
	passes  uint64
	dumps   int
	foreign int
	drift   map[string]int
	errors  map[string]int
	family  map[string]*familyTotals
}

type familyTotals struct {
	applies map[string]int
	written int
}

// NewMetrics returns Metrics with no pass yet.
func NewMetrics(s Sources) *Metrics {
	m := &Metrics{
		sources: s,
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: Prefix + "pass_duration_seconds",
			Help: "How long a pass of the loop took, from observing to reporting.",
			// An idle pass takes under a millisecond; one that writes 10,000 rules some seconds; the time
			// limits end it at about a minute.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}),
		registry: prometheus.NewRegistry(),
		drift:    map[string]int{}, errors: map[string]int{},
		family: map[string]*familyTotals{},
	}
	// From 0 on: increase() does not see the first event of a series that begins with it.
	for k := iptables.RuleRemoved; k <= iptables.JumpLeft; k++ {
		m.drift[k.String()] = 0
	}
	for _, source := range ErrorSources {
		m.errors[source] = 0
	}
	m.registry.MustRegister(m, collectors.NewProcessCollector(
		collectors.ProcessCollectorOpts{Namespace: strings.TrimSuffix(Prefix, "_")}))
	prometheus.WrapRegistererWithPrefix(Prefix, m.registry).MustRegister(collectors.NewGoCollector())
	return m
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
	m.duration.Observe(p.Duration.Seconds())
	m.passes++
	m.dumps += p.DumpReads
	m.foreign += p.Untrusted
	add(m.drift, p.Drift)
	add(m.errors, p.Errors)
	for _, f := range s.Families {
		t := m.family[f.Family]
		if t == nil {
			t = &familyTotals{applies: map[string]int{"applied": 0, "failed": 0, "locked": 0, "refused": 0}}
			m.family[f.Family] = t
		}
		add(t.applies, p.Writes[f.Family].Applies)
		t.written += p.Writes[f.Family].Rules
	}
	m.last, m.version, m.refused = s, p.EnvoyVersion, p.Refused
}

func add(to, from map[string]int) {
	for k, n := range from {
		to[clean(k)] += n
	}
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(Prefix+name, help, labels, nil)
}

var (
	buildInfo = desc("build_info", "Version and commit of this program, and of Go; always 1.",
		"version", "commit", "goversion")
	passes    = desc("passes_total", "Passes of the loop that ran to their end, whatever they found.")
	heartbeat = desc("heartbeat_timestamp_seconds",
		"When the last pass ended, in Unix time; older than five minutes means stuck.")
	ready   = desc("ready", "1 when /healthz/ready answers 200.")
	mode    = desc("mode", "1 for what the rules do now, 0 for the other modes.", "mode")
	finding = desc("finding", "How many of a finding stand now; 0 when none.", "id", "severity")
	refused = desc("refused_entries",
		"Entries of Envoy's listeners that are left out because they never may be intercepted.")
	errorsMet = desc("errors_total", "Errors that passes met, by what was asked.", "source")

	envoyState     = desc("envoy_state", "1 for the state Envoy is in, 0 for the others.", "state")
	envoyInfo      = desc("envoy_info", "Envoy's version; absent while it is not known.", "version")
	envoyListeners = desc("envoy_listeners", "Listeners that Envoy has.")
	envoyRejected  = desc("envoy_rejected_listeners", "Listeners whose last update Envoy rejected.")
	envoyDumps     = desc("envoy_dump_reads_total", "Full dumps read from Envoy's admin port.")
	untrusted      = desc("envoy_untrusted_answers_total",
		"Answers on Envoy's admin port that were not believed, because another user's process gave them.")

	usable   = desc("family_usable", "1 when this machine can intercept the family.", "family")
	inSync   = desc("in_sync", "1 when the kernel has the rules it should have.", "family")
	jumps    = desc("jumps", "1 when jumps lead traffic to Envoy.", "family")
	rules    = desc("rules", "Rules of ours in the kernel.", "family")
	services = desc("service_prefixes", "Address prefixes of services that are intercepted.",
		"family")
	servicePorts = desc("service_ports", "Ports of services without an address that are intercepted.",
		"family")
	applies = desc("applies_total", "Transactions of iptables-restore, by outcome.",
		"family", "outcome")
	written = desc("rules_written_total", "Rules added, changed or removed.", "family")
	drift   = desc("drift_repaired_total",
		"Changes others made to our rules that were put right, by kind.", "kind")

	guestEnabled = desc("guest_attributes_enabled", "0 when the VM refuses guest attributes.")
	guestUp      = desc("guest_attributes_up",
		"1 when the last query of guest attributes succeeded.")
	guestPending  = desc("guest_attributes_pending", "Values that wait to be written.")
	guestWrites   = desc("guest_attributes_writes_total", "Guest attributes written.")
	guestReads    = desc("guest_attributes_reads_total", "Guest attributes read back.")
	guestFailures = desc("guest_attributes_failures_total",
		"Queries of guest attributes that failed.")
	guestSuperseded = desc("guest_attributes_superseded_total",
		"Values replaced by a newer one before they were written, as most heartbeats are: nothing is "+
			"lost by it.")
	guestRepaired = desc("guest_attributes_repaired_total",
		"Values found lost, or changed by others, and written again.", "kind")

	serialUp      = desc("serial_up", "1 when the serial port is open and takes lines.")
	serialLines   = desc("serial_lines_total", "Lines written to the serial port.")
	serialDropped = desc("serial_dropped_lines_total", "Lines the serial port did not take in time.")

	all = []*prometheus.Desc{
		buildInfo, passes, heartbeat, ready, mode, finding, refused, errorsMet,
		envoyState, envoyInfo, envoyListeners, envoyRejected, envoyDumps, untrusted,
		usable, inSync, jumps, rules, services, servicePorts, applies, written, drift,
		guestEnabled, guestUp, guestPending, guestWrites, guestReads, guestFailures, guestSuperseded,
		guestRepaired,
		serialUp, serialLines, serialDropped,
	}
)

// Describe is a method of [prometheus.Collector].
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	m.duration.Describe(to)
	for _, d := range all {
		to <- d
	}
}

// Collect is a method of [prometheus.Collector]. What stands after a pass is left
// out before the first.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	// A copy first: to may be read slowly, and Pass must not wait for that.
	var out []prometheus.Metric
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out = append(out, prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...))
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		out = append(out, prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...))
	}
	gauge(buildInfo, 1, clean(m.sources.Version), clean(m.sources.Commit), runtime.Version())

	m.mu.Lock()
	counter(passes, float64(m.passes))
	counter(envoyDumps, float64(m.dumps))
	counter(untrusted, float64(m.foreign))
	counters := func(d *prometheus.Desc, by map[string]int) {
		for _, k := range slices.Sorted(maps.Keys(by)) {
			counter(d, float64(by[k]), k)
		}
	}
	counters(drift, m.drift)
	counters(errorsMet, m.errors)
	if m.passes > 0 {
		m.stands(gauge, counter)
	}
	m.mu.Unlock()

	if m.sources.GuestAttributes != nil {
		s := m.sources.GuestAttributes()
		gauge(guestEnabled, one(s.Enabled))
		gauge(guestUp, one(s.Enabled && s.LastError == ""))
		gauge(guestPending, float64(s.Pending))
		counter(guestWrites, float64(s.Writes))
		counter(guestReads, float64(s.Reads))
		counter(guestFailures, float64(s.Failures))
		counter(guestSuperseded, float64(s.Superseded))
		counter(guestRepaired, float64(s.Lost), "lost")
		counter(guestRepaired, float64(s.Changed), "changed")
	}
	if m.sources.Serial != nil {
		if s := m.sources.Serial(); s.Path != "" {
			gauge(serialUp, one(s.Open && !s.Blocked))
			counter(serialLines, float64(s.Lines))
			counter(serialDropped, float64(s.Dropped))
		}
	}
	for _, o := range out {
		to <- o
	}
	m.duration.Collect(to)
}

// stands collects how things stand after the last pass, with m.mu held.
func (m *Metrics) stands(gauge, counter func(*prometheus.Desc, float64, ...string)) {
	s := m.last
	gauge(heartbeat, float64(s.Heartbeat.UnixMilli())/1000)
	gauge(ready, one(s.Ready))
	for _, v := range Modes {
		gauge(mode, one(v == s.Mode), v)
	}
	gauge(refused, float64(m.refused))
	type kind struct {
		id       symptom.ID
		severity symptom.Severity
	}
	found := map[kind]int{}
	for _, f := range s.Findings {
		if f.ExplainedBy == "" {
			found[kind{f.ID, f.Severity}]++
		}
	}
	for _, k := range symptom.Kinds() {
		for _, s := range k.Severities {
			gauge(finding, float64(found[kind{k.ID, s}]), string(k.ID), s.String())
		}
	}

	state := s.Envoy.State
	if !slices.Contains(EnvoyStates, state) {
		state = "UNREACHABLE"
	}
	for _, v := range EnvoyStates {
		gauge(envoyState, one(v == state), v)
	}
	if m.version != "" {
		gauge(envoyInfo, 1, clean(m.version))
	}
	gauge(envoyListeners, float64(s.Envoy.Listeners))
	gauge(envoyRejected, float64(s.Envoy.Rejected))

	for _, f := range s.Families {
		gauge(usable, one(f.Usable), f.Family)
		gauge(inSync, one(f.Equal), f.Family)
		gauge(jumps, one(f.Jumps), f.Family)
		gauge(rules, float64(f.Rules), f.Family)
		gauge(services, float64(f.Services), f.Family)
		gauge(servicePorts, float64(f.ServicePorts), f.Family)
	}
	for name, t := range m.family {
		for k, n := range t.applies {
			counter(applies, float64(n), name, k)
		}
		counter(written, float64(t.written), name)
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
