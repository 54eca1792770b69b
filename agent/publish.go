package agent

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// passed is a pass that has ended but for its report: what it saw, decided, did and found.
type passed struct {
	seen     Observation
	want     Want
	serial   uint64 // of want
	known    bool
	outcomes []reconcile.Outcome
	findings []symptom.Finding
	hidden   []symptom.Finding // by bootstrap, which is under way
	paused   bool
	took     time.Duration
	redirect time.Duration // what the oldest change took whose rules it put in; 0: none
}

// reporters take what a pass has to tell. None of them can hold up the loop.
type reporters struct {
	events  func(report.Event) // what happened, in order
	metrics func(status.Status, report.Pass)
	// status takes the Status without its Services: intercepted takes what they are made of when
	// somebody asks.
	status      func(status.Status)
	intercepted func(intercepted)
	history     func(Failures)
	// transitions takes the last ones when there are others. Nobody changes them.
	transitions func([]status.Transition)
	ready       func() error // tells systemd
}

// told is what the world was told last: a reporter hears of a transition once.
type told struct {
	reporters
	log      *zap.Logger
	started  time.Time
	passes   uint64
	failures Failures
	unasked  []Failure           // that an earlier run left, and of which this one cannot tell yet
	seen     map[which]time.Time // the findings, since when this run has had them
	unseen   map[which]bool      // warnings that an earlier run left, and this one has not had yet
	services serviceNews
	ration   ration
	before   Standing // at the end of an earlier run
	past     history
	minutes  minutes
	said     struct {
		envoy string // its version
		mode  string
		// whenDownBy is status.Interception's
		whenDownBy string
		ready      bool
		systemd    bool            // has been told that it is ready
		deaf       bool            // the last try to do so failed
		resolvers  map[string]bool // users of --resolver-users that are not there
	}
}

// publish turns a pass into a Status and leaves it with every reporter.
func (t *told) publish(p passed, backend string) {
	t.passes++
	now := p.seen.Now
	t.past.pass(p, time.Now())
	t.unasked = slices.DeleteFunc(slices.Clone(t.unasked), func(f Failure) bool {
		return slices.ContainsFunc(p.findings, f.is) || p.asked(f, now.Sub(t.started))
	})
	stays := slices.Concat(t.unasked, p.stand(t.failures.Lasting))
	findings, seen := t.date(p.findings, now)
	p.findings = findings
	next := t.failures.next(p.findings, now, stays...)
	next.Warnings = t.failures.Warnings.next(p.findings, now, t.staying(p, now))
	next.date(p.findings, seen)
	if next.Owner = p.seen.Owner; next.Owner != t.failures.Owner {
		t.past.news = true // what is kept says whose it is
	}
	s := p.status()
	s.Failing = next.newest().ID
	next.Standing = t.standing(s, now)
	if !next.equal(t.failures) {
		t.tellFailures(t.failures, next, p.findings)
		t.failures = next
		t.history(next)
	}
	t.tellFindings(p.findings)
	t.tellOtherVMs(p.findings)
	t.seen = seen
	t.tellResolvers(p.seen.Resolvers.Missing)
	t.tellEnvoy(p.seen.Envoy.Info.Text)
	s.Started, s.Heartbeat, s.Passes = t.started.UTC(), time.Now().UTC(), t.passes
	s.LastFailure, s.Since, s.Backend = t.failures.String(), t.failures.Standing.Since, backend
	t.tellMode(p.seen.Brake.text(s.Mode))
	t.tellWhenDown(s.Interception)
	for _, e := range t.services.pass(p) {
		t.tellAnyway(status.OfServices, e)
	}
	s.ServiceCount = t.services.count
	t.tellReady(s)
	t.tellLeft(s, time.Now())
	t.remember(&s, p)
	t.metrics(s, p.happened())
	t.reporters.intercepted(t.services.in)
	t.reporters.status(s)
}

// remember has the Status tell what was, and the transitions kept that are new.
func (t *told) remember(s *status.Status, p passed) {
	transitions, news := t.past.show()
	if news {
		t.transitions(transitions)
	}
	s.History, s.Samples = transitions, t.minutes.pass(p, s.State())
}

// standing is how the VM stands after a pass. An earlier run's goes on where it stood so: a run
// knows nothing at its first passes, and a restart of the agent is none of the VM's.
func (t *told) standing(s status.Status, now time.Time) Standing {
	is := Standing{s.State(), s.Failing, now.UTC().Truncate(time.Second)}
	switch {
	case is.same(t.failures.Standing):
		return t.failures.Standing
	case is.same(t.before) && now.Sub(t.started) < showLate:
		return t.before
	}
	return is
}

// date says of each finding that does not itself since when it stands, and returns that of all.
func (t *told) date(findings []symptom.Finding, now time.Time) (
	dated []symptom.Finding, seen map[which]time.Time) {
	now = now.UTC().Truncate(time.Second)
	dated, seen = slices.Clone(findings), make(map[which]time.Time, len(findings))
	for i, f := range dated {
		is := which{f.ID, f.Key}
		since, had := t.seen[is]
		if !had {
			since = now
		}
		seen[is] = since
		if f.Since.IsZero() {
			dated[i].Since = since
		}
	}
	return dated, seen
}

// staying says of a warning whether it lasts though it is not found: another finding explains it by
// now, or it is of an earlier run, and this one has not had the time to find it.
func (t *told) staying(p passed, now time.Time) func(Failure) bool {
	for _, f := range p.findings {
		delete(t.unseen, which{f.ID, f.Key})
	}
	if now.Sub(t.started) >= warningsLate {
		t.unseen = nil
	}
	unsaid := p.unsaid(symptom.Warning)
	return func(f Failure) bool { return unsaid[f.which()] || t.unseen[f.which()] }
}

// stand are those of the failures that are no longer told as such but are not over: another
// explains them by now, or bootstrap has begun, which may put them right.
func (p passed) stand(failures []Failure) (some []Failure) {
	unsaid := p.unsaid(symptom.Error)
	for _, f := range failures {
		if unsaid[f.which()] {
			some = append(some, f)
		}
	}
	return some
}

// unsaid are the findings of a severity that stand and are not told as such.
func (p passed) unsaid(severity symptom.Severity) map[which]bool {
	unsaid := map[which]bool{}
	for _, found := range p.hidden {
		unsaid[which{found.ID, found.Key}] = true
	}
	for _, found := range p.findings {
		if found.ExplainedBy != "" && found.Severity == severity {
			unsaid[which{found.ID, found.Key}] = true
		}
	}
	return unsaid
}

// status is what the pass tells of itself.
func (p passed) status() status.Status {
	seen := p.seen
	s := status.Status{
		Version: seen.Settings.Version, Paused: p.paused, Findings: p.findings,
		ServingPorts: seen.Attribute.Config.ServingPorts,
		Bootstrap: status.Bootstrap{
			Status: seen.Bootstrap.Status, Failure: seen.Bootstrap.FailureLine(),
			Done: seen.Bootstrap.AttributeSum != "",
		},
		Envoy: envoyStatus(seen), ControlPlane: controlPlane(seen.Envoy),
		Mode: p.mode(), NotReady: p.notReady(), Interception: seen.Brake.status(seen.Settings),
		Cost: status.Cost{Bucket: bucket(seen.Envoy.Bucket)},
	}
	s.Ready = s.NotReady == ""
	if good := seen.Attribute.Good; good != nil {
		s.Attribute = &status.Attribute{Read: good.Read, Kept: good.Kept}
	}
	for _, o := range p.outcomes {
		s.Families = append(s.Families, o.Status)
		s.Undone += o.Undone
		if o.LastDriftAt.After(s.LastDriftWhen) {
			s.LastDriftBy, s.LastDriftWhen = o.LastDriftBy, o.LastDriftAt.UTC()
		}
	}
	return s
}

// bucket is what questions to Envoy may take.
func bucket(b envoyadmin.Bucket) status.Bucket {
	return status.Bucket{Level: b.Level.Seconds(), Size: b.Size.Seconds(), Share: b.Share}
}

func envoyStatus(seen Observation) status.Envoy {
	v := seen.Envoy
	e := status.Envoy{
		Admin: seen.Settings.EnvoyAdmin, State: v.State, Version: v.Info.Text, Configured: v.Configured,
		Listeners: len(v.Snapshot.Listeners), Rejected: len(v.Rejected), Node: v.Info.Node.ID,
	}
	if v.Info.Version != (envoyadmin.Version{}) {
		e.Number = v.Info.Version.String()
	}
	if v.Err == nil || v.Handover { // the one before serves
		return e
	}
	e.State = ""
	// Not every answer that cannot be used is an Envoy that is down: a new VM would not mend a
	// forbidden path.
	if errors.Is(v.Err, envoyadmin.ErrRefused) || errors.Is(v.Err, envoyadmin.ErrTimeout) {
		e.Down = v.Since.UTC()
	}
	return e
}

// controlPlane is how Envoy's stream to it stands.
func controlPlane(v envoywatch.View) (c status.ControlPlane) {
	c.Connected, c.Known = v.Connected()
	c.Since, c.Heard = v.Seen.UTC().Truncate(time.Second), v.Heard.UTC()
	c.Target = symptom.Printable(v.Target, maxForeign)
	if closed := v.Closed; closed != nil {
		c.Closed = &status.Close{Time: closed.When.UTC(), Code: closed.Code,
			Target:  symptom.Printable(closed.Target, maxForeign),
			Message: symptom.Printable(closed.Message, maxForeign)}
	}
	if v.Probe != nil {
		c.Error = symptom.Printable(v.Probe.Error(), maxForeign)
	}
	return c
}

// maxForeign bounds what others wrote where it is told as it is.
const maxForeign = 400

// mode is what the rules do now, in a word (see status.Status.Mode).
func (p passed) mode() string {
	if p.paused {
		return "paused"
	}
	written := false
	for _, o := range p.outcomes {
		if o.Status.Usable && o.Status.Jumps {
			return "intercepting"
		}
		written = written || o.Written
	}
	switch {
	case p.seen.Brake.Off:
		return modeOff
	case written && p.seen.Brake.whenDown(p.seen.Settings) == reconcile.Bypass:
		return "bypass"
	}
	return "hold"
}

// notReady is why /healthz/ready answers 503, "" when ready: Envoy is LIVE with its first listener
// update done, every interception port accepts, and the kernel equals want in every usable family.
// An empty want counts. With the brake on it is only asked whether the jumps are out: then nothing
// leads to Envoy, which need not be there, and who waits for the mesh would wait for as long as an
// operator wants it to be gone around.
func (p passed) notReady() string {
	v := p.seen.Envoy
	switch {
	case p.paused:
		return "paused by cleanup until restarted"
	case p.seen.Brake.Off:
		return p.notOut()
	case v.Handover: // the one before serves
	case v.Err != nil:
		return "Envoy: " + v.Err.Error()
	case v.State != "LIVE":
		return "Envoy is " + v.State + ", not LIVE"
	case !v.Configured:
		return "Envoy has not received its listeners"
	case !p.seen.Attribute.Known:
		return "the gce-service-proxy attribute was not read yet"
	case p.seen.Brake.Awaited:
		return "the metadata server has not told yet whether interception is off"
	case !p.known && p.seen.Local == nil:
		return "the VM's addresses were not read yet"
	case !p.known:
		return "Envoy's listeners were not read yet"
	}
	usable := false
	for _, o := range p.outcomes {
		if !o.Status.Usable {
			continue
		}
		if usable = true; o.NotReady != "" {
			return o.NotReady
		}
	}
	if !usable {
		return "neither IPv4 nor IPv6 rules can be used"
	}
	return ""
}

// notOut is why the jumps are not known to be out, "" when they are. A family that cannot have
// rules has none.
func (p passed) notOut() string {
	for _, o := range p.outcomes {
		if o.Status.Usable && o.NotReady != "" {
			return o.NotReady
		}
	}
	return ""
}

// tell tells an event on every channel, the log first, as far as the ration goes. kind is that of
// the transition (status.Kinds).
func (t *told) tell(kind string, e report.Event) {
	t.inLog(e)
	t.past.note(kind, e, time.Now())
	if t.ration.takes(time.Now()) {
		t.events(e)
	}
}

// tellAnyway is tell of what has its own bound.
func (t *told) tellAnyway(kind string, e report.Event) {
	t.inLog(e)
	t.past.note(kind, e, time.Now())
	t.events(e)
}

func (t *told) inLog(e report.Event) {
	level := zap.InfoLevel
	switch e.Severity {
	case report.Warning:
		level = zap.WarnLevel
	case report.Error:
		level = zap.ErrorLevel
	}
	of := e.Finding
	var fields []zap.Field
	for _, f := range slices.Concat([]report.Field{{Key: "id", Value: string(of.ID)},
		{Key: "key", Value: of.Key}, {Key: "cause", Value: of.Cause},
		{Key: "next", Value: of.Next}}, e.Fields) {
		if f.Value != "" {
			fields = append(fields, zap.String(f.Key, f.Value))
		}
	}
	t.log.Log(level, e.Message, fields...)
}

// tellFailures tells each failure that came, and each failure and warning that is over, once.
func (t *told) tellFailures(was, is Failures, findings []symptom.Finding) {
	wereIn, areIn := whichOf(was.Lasting), whichOf(is.Lasting)
	for _, f := range was.Lasting {
		if !areIn[f.which()] {
			t.tell(status.OfFinding, report.Event{Severity: report.Info, Message: "over: " + f.Text,
				Finding: symptom.Finding{ID: f.ID, Key: f.Key}})
		}
	}
	for _, f := range was.Warnings.Lasting {
		if !is.Warnings.lasts(f.which()) && !happened(f.ID) {
			t.tell(status.OfFinding, report.Event{Severity: report.Info, Message: "over: " + f.Text,
				Finding: symptom.Finding{ID: f.ID, Key: f.Key}})
		}
	}
	found := map[which]symptom.Finding{}
	for _, f := range slices.Backward(findings) { // of several the first
		found[which{f.ID, f.Key}] = f
	}
	for _, f := range is.Lasting {
		if !wereIn[f.which()] {
			about, known := found[f.which()]
			if !known {
				about = symptom.Finding{ID: f.ID, Key: f.Key}
			}
			t.tell(status.OfFinding, report.Event{Severity: report.Error, Message: f.Text, Finding: about})
		}
	}
}

// tellFindings tells warnings when they come, and logs errors that another explains; the others are
// tellFailures', and advice is for those who look at the status. What came before is known by ID
// and key, so a changing text (a count) is not news.
func (t *told) tellFindings(findings []symptom.Finding) {
	for _, f := range findings {
		if _, had := t.seen[which{f.ID, f.Key}]; had {
			continue
		}
		switch {
		case f.Severity == symptom.Warning:
			t.tell(status.OfFinding,
				report.Event{Severity: report.Warning, Message: f.Text(), Finding: f})
		case f.Severity == symptom.Error && f.ExplainedBy != "":
			t.log.Warn(f.Text(), zap.String("id", string(f.ID)), zap.String("key", f.Key),
				zap.String("cause", f.Cause), zap.String("next", f.Next),
				zap.String("explained_by", string(f.ExplainedBy)))
		}
	}
}

// tellResolvers logs each user of --resolver-users that is not there once.
func (t *told) tellResolvers(missing []missingUser) {
	for _, m := range missing {
		if t.said.resolvers[m.Name] {
			continue
		}
		if t.said.resolvers == nil {
			t.said.resolvers = map[string]bool{}
		}
		t.said.resolvers[m.Name] = true
		t.log.Warn("a user of --resolver-users is not there", zap.Error(m.Err))
	}
}

// tellEnvoy tells Envoy's version when it is another one, in the words that people look for.
func (t *told) tellEnvoy(version string) {
	if version == "" || version == t.said.envoy {
		return
	}
	t.said.envoy = version
	t.tell(status.OfEnvoy, report.Event{Severity: report.Info, Message: "Envoy Version: " + version})
}

func (t *told) tellMode(mode string) {
	if mode == t.said.mode {
		return
	}
	t.tell(status.OfMode, report.Event{Severity: report.Info, Message: "interception: " + mode,
		Fields: []report.Field{{Key: "was", Value: t.said.mode}}})
	t.said.mode = mode
}

// tellWhenDown tells that the metadata sets what becomes of the jumps when Envoy goes down, and
// when it no longer does.
func (t *told) tellWhenDown(i status.Interception) {
	was := t.said.whenDownBy
	if t.said.whenDownBy = i.WhenEnvoyDownBy; was == i.WhenEnvoyDownBy ||
		was == "" && i.WhenEnvoyDownBy == bySetting {
		return
	}
	by := "as it is set on the VM"
	if i.WhenEnvoyDownBy != bySetting {
		by = fmt.Sprintf("by the %s's metadata (%s)", i.WhenEnvoyDownBy, metadata.InterceptionKey)
	}
	t.tell(status.OfMode, report.Event{Severity: report.Info,
		Message: fmt.Sprintf("when Envoy is down: %s, %s", i.WhenEnvoyDown, by)})
}

func (t *told) tellReady(s status.Status) {
	defer t.tellSystemd(s.Ready)
	if s.Ready == t.said.ready {
		return
	}
	t.said.ready = s.Ready
	if !s.Ready {
		t.tell(status.OfReady,
			report.Event{Severity: report.Warning, Message: "not ready: " + s.NotReady})
		return
	}
	text := "ready: Envoy " + s.Envoy.Version + " is live and the rules are in place"
	if s.Mode == modeOff {
		text = "ready: interception is off, and connections go past Envoy"
	}
	t.tell(status.OfReady, report.Event{Severity: report.Info, Message: text})
}

// tellSystemd tells it that the mesh was ready once in this run. The folder may be full for a
// while, and who waits for the target would wait for good: it is tried with each pass until it
// works.
func (t *told) tellSystemd(ready bool) {
	if !ready || t.said.systemd {
		return
	}
	err := t.reporters.ready()
	t.said.systemd = err == nil
	if err != nil && !t.said.deaf {
		t.log.Warn("cannot tell systemd of the readiness", zap.Error(err))
	}
	t.said.deaf = err != nil
}

// happened is what /metrics counts of the pass.
func (p passed) happened() report.Pass {
	m := report.Pass{
		Duration: p.took, Redirect: p.redirect, Refused: len(p.want.Refused),
		DumpReads: p.seen.Envoy.Dumps, Rejections: p.seen.Envoy.Rejections,
		Drift: map[string]int{}, Errors: map[string]int{}, Forgotten: map[string]int{},
		Writes: map[string]report.Writes{},
	}
	if connected, known := p.seen.Envoy.Connected(); known {
		m.Connected = &connected
	}
	if v := p.seen.Envoy.Info.Version; v != (envoyadmin.Version{}) {
		m.EnvoyVersion = v.String()
	}
	for _, o := range p.outcomes {
		m.Writes[o.Status.Family] = report.Writes{
			Applies: o.Applies, Rules: o.Rows, Took: o.Took, Waited: o.Waited, Repairs: o.Repairs,
			BackOffs: o.BackOffs, BackingOff: o.Facts.Fighting, InSync: o.InSync,
		}
		m.Forgotten["half_open"] += o.HalfOpen
		m.Forgotten["dns"] += o.DNS
		for kind, n := range o.Drift {
			m.Drift[kind] += n
		}
	}
	if err := p.seen.Envoy.Err; err != nil {
		m.Errors["envoy_admin"]++
		if errors.Is(err, envoyadmin.ErrUntrusted) {
			m.Untrusted++
		}
	}
	if p.seen.Attribute.Source != nil {
		m.Errors["metadata_server"]++
	}
	return m
}
