package report

import (
	"maps"
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// The histograms.
var (
	durations = prometheus.HistogramOpts{
		Name: Prefix + "pass_duration_seconds",
		Help: "How long a pass of the loop took, from observing to reporting.",
		// An idle pass takes under a millisecond; one that writes 10,000 rules some seconds; the time
		// limits end it at about a minute.
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	}
	redirects = prometheus.HistogramOpts{
		Name: Prefix + "redirect_latency_seconds",
		Help: "From when Envoy's log, or a look at Envoy, told of a change until the rules that it " +
			"asks for were in; changes that need no other rules are not counted.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	}
	applyTimes = prometheus.HistogramOpts{
		Name: Prefix + "apply_duration_seconds",
		Help: "How long writing rules by iptables-restore took, with waiting for the xtables lock and " +
			"what had to be tried again, without reading them back.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20},
	}
	repairTimes = prometheus.HistogramOpts{
		Name: Prefix + "repair_latency_seconds",
		Help: "From the notification, or the poll, that showed our rules changed by others until they " +
			"were put right, with the time that repairs were held back.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	}
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(Prefix+name, help, labels, nil)
}

var (
	buildInfo = desc("build_info", "Version and commit of this program, and of Go; always 1.",
		"version", "commit", "goversion")
	passes    = desc("passes_total", "Passes of the loop that ran to their end, whatever they found.")
	heartbeat = desc("heartbeat_timestamp_seconds",
		"When the last pass ended, in Unix time; older than five minutes means stuck.")
	ready = desc("ready", "1 when /healthz/ready answers 200.")
	mode  = desc("mode", "1 for what the rules do now, 0 for the other modes.", "mode")
	off   = desc("interception_off",
		"1 while metadata (service-proxy-agent-interception) has interception off, 0 else.")
	finding = desc("finding", "How many of a finding stand now; 0 when none.", "id", "severity")
	refused = desc("refused_entries",
		"Entries of Envoy's listeners that are left out because they never may be intercepted.")
	errorsMet   = desc("errors_total", "Errors that passes met, by what was asked.", "source")
	lastSuccess = desc("last_success_timestamp_seconds",
		"When it last went well, in Unix time: an answer, a write, rules seen as wanted (looked at each "+
			"five minutes on nft if nothing changes); absent before the first time.", "of")

	envoyState     = desc("envoy_state", "1 for the state Envoy is in, 0 for the others.", "state")
	envoyInfo      = desc("envoy_info", "Envoy's version; absent while it is not known.", "version")
	envoyListeners = desc("envoy_listeners", "Listeners that Envoy has.")
	envoyRejected  = desc("envoy_rejected_listeners", "Listeners whose last update Envoy rejected.")
	envoyDumps     = desc("envoy_dump_reads_total", "Full dumps read from Envoy's admin port.")
	rejections     = desc("listener_rejections_total",
		"Listener updates that Envoy was seen to have rejected.")
	untrusted = desc("envoy_untrusted_answers_total",
		"Answers on Envoy's admin port that were not believed, because another user's process gave them.")
	questions = desc("envoy_questions_total",
		"Questions that Envoy's admin port was asked, answered or not.", "question")
	questionSeconds = desc("envoy_question_seconds_total",
		"Time from asking to the end of the answer, at most so much of Envoy's main thread.", "question")
	budget = desc("envoy_budget_seconds",
		"Time of Envoy's main thread that questions may take now; below 0 when the last answer took "+
			"more than there was; absent before the first look at Envoy.")
	budgetSize = desc("envoy_budget_size_seconds",
		"What envoy_budget_seconds is at most, as it is after calm: 6, or six full dumps.")
	envoyShare = desc("envoy_share_ratio",
		"Share of the time by which envoy_budget_seconds is refilled: --envoy-share.")
	connected = desc("control_plane_connected",
		"1 when Envoy has a stream to its control plane, 0 when not; absent while it is not known.")

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
	written  = desc("rules_written_total", "Rules added, changed or removed.", "family")
	lockWait = desc("lock_wait_seconds_total",
		"Time that iptables-restore waited while another program held the xtables lock, to some "+
			"milliseconds; nft has no such lock.", "family")
	drift = desc("drift_repaired_total",
		"Changes others made to our rules that were put right, by kind.", "kind")
	backOffs = desc("back_offs_total",
		"Times that repairs began to be held back, since somebody kept undoing them.", "family")
	backingOff = desc("backing_off", "1 while repairs are held back.", "family")
	forgotten  = desc("conntrack_entries_removed_total",
		"Connection-tracking entries removed so that new rules hold for them.", "reason")

	channelEnabled = desc("channel_enabled", "0 when the channel is turned off, or refused.",
		"channel")
	channelUp      = desc("channel_up", "1 when the channel took what it was last given.", "channel")
	channelWrites  = desc("channel_writes_total", "Attributes, lines or entries written.", "channel")
	channelFailed  = desc("channel_failures_total", "Tries that failed.", "channel")
	channelDropped = desc("channel_dropped_total", "What will never be written.", "channel")

	guestPending    = desc("guest_attributes_pending", "Values that wait to be written.")
	guestReads      = desc("guest_attributes_reads_total", "Guest attributes read back.")
	guestSuperseded = desc("guest_attributes_superseded_total",
		"Values replaced by a newer one before they were written, as most heartbeats are: nothing is "+
			"lost by it.")
	guestRepaired = desc("guest_attributes_repaired_total",
		"Values found lost, or changed by others, and written again.", "kind")

	all = []*prometheus.Desc{
		buildInfo, passes, heartbeat, ready, mode, off, finding, refused, errorsMet, lastSuccess,
		envoyState, envoyInfo, envoyListeners, envoyRejected, envoyDumps, rejections, untrusted,
		questions, questionSeconds, budget, budgetSize, envoyShare, connected,
		usable, inSync, jumps, rules, services, servicePorts, applies, written, lockWait, drift,
		backOffs, backingOff, forgotten,
		channelEnabled, channelUp, channelWrites, channelFailed, channelDropped,
		guestPending, guestReads, guestSuperseded, guestRepaired,
	}
)

// emit is where the series of a scrape go.
type emit struct{ to chan<- prometheus.Metric }

func (e emit) gauge(d *prometheus.Desc, v float64, labels ...string) {
	e.to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (e emit) counter(d *prometheus.Desc, v float64, labels ...string) {
	e.to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func (e emit) counters(d *prometheus.Desc, by map[string]int, labels ...string) {
	for _, k := range slices.Sorted(maps.Keys(by)) {
		e.counter(d, float64(by[k]), append(slices.Clone(labels), k)...)
	}
}

// time is a moment in Unix time; nothing for one that never was.
func (e emit) time(d *prometheus.Desc, at time.Time, labels ...string) {
	if !at.IsZero() {
		e.gauge(d, float64(at.UnixMilli())/1000, labels...)
	}
}

func (e emit) program(s Sources) {
	e.gauge(buildInfo, 1, clean(s.Version), clean(s.Commit), runtime.Version())
}

// counts are there before the first pass.
func (e emit) counts(t totals) {
	e.counter(passes, float64(t.passes))
	e.counter(envoyDumps, float64(t.dumps))
	e.counter(rejections, float64(t.rejections))
	e.counter(untrusted, float64(t.untrusted))
	e.counters(drift, t.drift)
	e.counters(errorsMet, t.errors)
	e.counters(forgotten, t.forgotten)
	for name, f := range t.family {
		e.counters(applies, f.applies, name)
		e.counter(written, float64(f.written), name)
		e.counter(lockWait, f.waited.Seconds(), name)
		e.counter(backOffs, float64(f.backOffs), name)
		e.time(lastSuccess, f.inSync, rulesOf(name))
	}
}

// stands is how things stand after the last pass.
func (e emit) stands(last stand) {
	s := last.status
	e.time(heartbeat, s.Heartbeat)
	e.gauge(ready, one(s.Ready))
	for _, v := range Modes {
		e.gauge(mode, one(v == s.Mode), v)
	}
	e.gauge(off, one(s.Interception.State == "off"))
	e.gauge(refused, float64(last.pass.Refused))
	e.findings(s.Findings)

	state := s.Envoy.State
	if !slices.Contains(EnvoyStates, state) {
		state = "UNREACHABLE"
	}
	for _, v := range EnvoyStates {
		e.gauge(envoyState, one(v == state), v)
	}
	if v := last.pass.EnvoyVersion; v != "" {
		e.gauge(envoyInfo, 1, clean(v))
	}
	if c := last.pass.Connected; c != nil {
		e.gauge(connected, one(*c))
	}
	if b := s.Cost.Bucket; b.Size > 0 {
		e.gauge(budget, b.Level)
		e.gauge(budgetSize, b.Size)
		e.gauge(envoyShare, b.Share)
	}
	e.gauge(envoyListeners, float64(s.Envoy.Listeners))
	e.gauge(envoyRejected, float64(s.Envoy.Rejected))

	for _, f := range s.Families {
		e.gauge(usable, one(f.Usable), f.Family)
		e.gauge(inSync, one(f.Equal), f.Family)
		e.gauge(jumps, one(f.Jumps), f.Family)
		e.gauge(rules, float64(f.Rules), f.Family)
		e.gauge(services, float64(f.Services), f.Family)
		e.gauge(servicePorts, float64(f.ServicePorts), f.Family)
		e.gauge(backingOff, one(last.backOff[f.Family]), f.Family)
	}
}

// findings has a series for each kind, standing or not: an alert on one resolves.
func (e emit) findings(stand []symptom.Finding) {
	type kind struct {
		id       symptom.ID
		severity symptom.Severity
	}
	found := map[kind]int{}
	for _, f := range stand {
		if f.ExplainedBy == "" {
			found[kind{f.ID, f.Severity}]++
		}
	}
	for _, k := range symptom.Kinds() {
		for _, s := range k.Severities {
			e.gauge(finding, float64(found[kind{k.ID, s}]), string(k.ID), s.String())
		}
	}
}

// asked is what others were asked.
func (e emit) asked(s Sources) {
	var asked envoyadmin.Asked
	if s.Envoy != nil {
		asked = s.Envoy()
	}
	for q, cost := range asked.Questions {
		name := envoyadmin.Question(q).String()
		e.counter(questions, float64(cost.Count), name)
		e.counter(questionSeconds, cost.Took.Seconds(), name)
	}
	e.time(lastSuccess, asked.Answered, "envoy_admin")
	if s.Metadata != nil {
		e.time(lastSuccess, s.Metadata(), "metadata_server")
	}
}

// channels has a series for each channel, on or off.
func (e emit) channels(s Sources) {
	if s.GuestAttributes != nil {
		g := s.GuestAttributes()
		e.gauge(guestPending, float64(g.Pending))
		e.counter(guestReads, float64(g.Reads))
		e.counter(guestSuperseded, float64(g.Superseded))
		e.counter(guestRepaired, float64(g.Lost), "lost")
		e.counter(guestRepaired, float64(g.Changed), "changed")
	}
	for _, c := range s.Channels() {
		e.gauge(channelEnabled, one(c.Enabled), c.Name)
		e.gauge(channelUp, one(c.Up), c.Name)
		e.counter(channelWrites, float64(c.Written), c.Name)
		e.counter(channelFailed, float64(c.Failures), c.Name)
		e.counter(channelDropped, float64(c.Dropped), c.Name)
		if c.Enabled {
			e.time(lastSuccess, c.Last, c.Name)
		}
	}
}
