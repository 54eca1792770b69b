package agent

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// inLines is a history, a line each: when (first to last, and how often), who, and what.
func inLines(all []status.Transition) (lines []string) {
	at := func(t time.Time) string { return t.Format("15:04") }
	for _, t := range all {
		line := at(t.Time)
		if t.Times > 0 {
			line = fmt.Sprintf("%s-%s x%d", at(t.First), line, t.Times)
		}
		if t.By != "" {
			line += " by " + t.By
		}
		lines = append(lines, line+" "+t.Text)
	}
	return lines
}

// TestHistoryJoins: what comes again within an hour is one line that counts.
func TestHistoryJoins(t *testing.T) {
	type come struct {
		after time.Duration
		status.Transition
	}
	ready := status.Transition{Kind: status.OfReady, Text: "ready"}
	not := status.Transition{Kind: status.OfReady, Text: "not ready"}
	drift := func(by, text string) status.Transition {
		return status.Transition{Kind: status.OfDrift, Key: "IPv4", By: by, Text: text}
	}
	for _, test := range []struct {
		name string
		come []come
		want []string
	}{
		{"the same again", []come{{0, ready}, {time.Minute, ready}, {59 * time.Minute, ready}},
			[]string{"18:00-19:00 x3 ready"}},
		{"an hour later", []come{{0, ready}, {time.Hour, ready}},
			[]string{"18:00 ready", "19:00 ready"}},
		{"with something else of its kind in between", []come{{0, ready}, {0, not}, {0, ready}},
			[]string{"18:00 ready", "18:00 not ready", "18:00 ready"}},
		{"with something of another kind in between: the line is of the last time",
			[]come{{0, ready}, {0, drift("sh (pid 1)", "a")}, {time.Minute, ready}},
			[]string{"18:00 by sh (pid 1) a", "18:00-18:01 x2 ready"}},
		{"one program, whatever its pid and the rule",
			[]come{{0, drift("sh (pid 1)", "a")}, {time.Minute, drift("sh (pid 2)", "b")}},
			[]string{"18:00-18:01 x2 by sh (pid 2) b"}},
		{"another program", []come{{0, drift("sh (pid 1)", "a")}, {0, drift("nft (pid 2)", "a")}},
			[]string{"18:00 by sh (pid 1) a", "18:00 by nft (pid 2) a"}},
		{"programs that nobody names, of which the last one may be named yet",
			[]come{{0, drift("", "a")}, {time.Minute, drift("", "b")}, {time.Minute, drift("", "c")}},
			[]string{"18:00-18:01 x2 b", "18:02 c"}},
		{"a clock that is set back: the order is that of arrival",
			[]come{{0, ready}, {-20 * time.Minute, not}, {-20 * time.Minute, drift("", "a")},
				{-20 * time.Minute, not}},
			[]string{"18:00 ready", "17:20 a", "17:40-17:00 x2 not ready"}},
		{"a clock that is set back by years", []come{{0, ready}, {-9000 * time.Hour, ready}},
			[]string{"18:00 ready", "18:00 ready"}},
	} {
		var h history
		now := testStart
		for _, c := range test.come {
			now = now.Add(c.after)
			h.add(c.Transition, now)
		}
		if got := inLines(h.lines); !slices.Equal(got, test.want) {
			t.Errorf("%s:\n%s\nwant\n%s", test.name, strings.Join(got, "\n"),
				strings.Join(test.want, "\n"))
		}
	}
}

// TestHistoryRoom: where there is no room, it is made in the group with the most lines.
func TestHistoryRoom(t *testing.T) {
	var h history
	add := func(kind, text string) {
		h.add(status.Transition{Kind: kind, Text: text}, testStart.Add(time.Duration(len(h.lines))))
	}
	add(status.OfAgent, "started")
	add(status.OfMode, "interception: hold")
	for i := range 24 {
		add(status.OfServices, fmt.Sprint("service found: ", i))
		add(status.OfReady, []string{"ready", "not ready"}[i%2])
	}
	if n := len(h.lines); n != maxTransitions {
		t.Fatalf("%d lines", n)
	}
	add(status.OfAttribute, "attribute changed") // both are as large: of services is the oldest
	if got := h.lines[2].Text; got != "ready" || len(h.lines) != maxTransitions {
		t.Errorf("the oldest of the largest group is %q", got)
	}
	add(status.OfReady, "ready") // now they are the larger
	if got := h.lines[2]; got.Text != "service found: 1" {
		t.Errorf("there stands %q", got.Text)
	}
	if got := h.lines[5]; got.Text != "ready" || got.Times != 2 {
		t.Errorf("the next that says the same: %+v", got)
	}
	if h.lines[0].Text != "started" || h.lines[1].Text != "interception: hold" {
		t.Errorf("begins with\n%s", strings.Join(inLines(h.lines[:2]), "\n"))
	}
}

// TestHistoryOf10000: in a burst of 10,000 transitions what happened before it stays, with its
// culprit, and the last ones are there in the order in which they came.
func TestHistoryOf10000(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before := status.Transition{Kind: status.OfDrift, ID: symptom.DriftRepaired, Key: "IPv6",
		By: "firewalld (pid 812)", Severity: "warning", Text: "IPv6 rules repaired: nat flushed"}
	one := func(i int) status.Transition {
		switch random.IntN(6) {
		case 0:
			return status.Transition{Kind: status.OfFinding, ID: symptom.ListenerRejected,
				Key: fmt.Sprint(random.IntN(1000)), Text: fmt.Sprint("rejected ", i)}
		case 1:
			return status.Transition{Kind: status.OfServices, Text: fmt.Sprint("service found: ", i)}
		case 2:
			return status.Transition{Kind: status.OfMode,
				Text: []string{"interception: hold", "interception: bypass"}[random.IntN(2)]}
		case 3:
			return status.Transition{Kind: status.OfReady,
				Text: []string{"ready", "not ready: Envoy"}[random.IntN(2)]}
		case 4:
			return status.Transition{Kind: status.OfFinding, ID: symptom.EnvoyDown,
				Text: []string{"Envoy is not running", "over: Envoy is not running"}[random.IntN(2)]}
		}
		return status.Transition{Kind: status.OfDrift, ID: symptom.DriftRepaired, Key: "IPv4",
			By:   []string{fmt.Sprintf("iptables (pid %d)", i), fmt.Sprintf("nft (pid %d)", i), ""}[random.IntN(3)],
			Text: fmt.Sprint("IPv4 rules repaired: ", i)}
	}
	var h history
	now := testStart
	h.add(before, now)
	var last status.Transition
	for i := range 10_000 {
		now = now.Add(time.Duration(random.IntN(1000)) * time.Millisecond)
		last = one(i)
		h.add(last, now)
		if n := len(h.lines); n > maxTransitions {
			t.Fatalf("%d lines after %d", n, i)
		}
	}
	if got := h.lines[0]; got.By != before.By || got.Text != before.Text || got.Times != 0 {
		t.Errorf("what happened before is %+v", got)
	}
	end := h.lines[len(h.lines)-1]
	if end.Text != last.Text || end.By != last.By || !end.Time.Equal(now.Truncate(time.Millisecond)) {
		t.Errorf("ends with %+v, want %+v", end, last)
	}
	groups := map[string]int{}
	for i, line := range h.lines {
		groups[string(line.ID)+line.Kind]++
		if i > 0 && line.Time.Before(h.lines[i-1].Time) || line.First.After(line.Time) {
			t.Errorf("line %d is out of order:\n%s", i, strings.Join(inLines(h.lines), "\n"))
		}
	}
	for _, g := range []string{status.OfServices, status.OfMode, status.OfReady,
		string(symptom.EnvoyDown) + status.OfFinding} {
		if groups[g] < 5 {
			t.Errorf("groups: %v", groups)
		}
	}
}

// TestHistoryOfOneProgram: who undoes our rules all night takes two lines and not 10,000.
func TestHistoryOfOneProgram(t *testing.T) {
	for _, by := range []string{"iptables", ""} { // the legacy backend names nobody
		var h history
		h.add(status.Transition{Kind: status.OfAttribute, Text: "attribute changed"}, testStart)
		for i := range 10_000 {
			drift := status.Transition{Kind: status.OfDrift, Key: "IPv4", Text: fmt.Sprint("rule ", i)}
			if by != "" {
				drift.By = fmt.Sprintf("%s (pid %d)", by, i)
			}
			h.add(drift, testStart.Add(time.Duration(i)*6*time.Second))
		}
		times := 0
		for _, line := range h.lines[1:] {
			times += max(line.Times, 1)
		}
		if len(h.lines) > 3 || times != 10_000 || h.lines[0].Text != "attribute changed" {
			t.Errorf("by %q:\n%s", by, strings.Join(inLines(h.lines), "\n"))
		}
	}
}

// TestHistoryIsBounded: whoever wrote the words.
func TestHistoryIsBounded(t *testing.T) {
	var h history
	long := strings.Repeat("\x1b[2J<listener>\n", 1<<16)
	h.add(status.Transition{Kind: status.OfFinding, Text: long, Key: long, By: long}, testStart)
	got := h.lines[0]
	if len(got.Text) > maxTransitionText || len(got.Key) > maxTransitionKey ||
		len(got.By) > maxTransitionBy || strings.ContainsAny(got.Text+got.Key+got.By, "\x1b\n") {
		t.Errorf("%+q", got.Text)
	}
}

// repairedBy is an outcome of a pass that repaired a drift.
func repairedBy(by string, at time.Time, drift ...iptables.Drift) reconcile.Outcome {
	o := reconcile.Outcome{Undone: 1, LastDriftBy: by, LastDriftAt: at,
		Work: reconcile.Work{Drift: map[string]int{"rule removed": len(drift)}}}
	o.Status.Family, o.Status.Equal = "IPv4", true
	o.Facts.Drift, o.Facts.By = drift, by
	return o
}

// TestHistoryNames: who made a drift is in the history, also when the kernel's word comes late, and
// nobody else is named for it.
func TestHistoryNames(t *testing.T) {
	removed := iptables.Drift{Kind: iptables.RuleRemoved, Chain: "C", Rule: "-j R"}
	later := func(o reconcile.Outcome, by string) reconcile.Outcome {
		o.Drift, o.LastDriftBy, o.Facts.By = nil, by, by
		return o
	}
	at := testStart
	unnamed, again := repairedBy("", at, removed), repairedBy("", at.Add(time.Minute), removed)
	const repaired = "IPv4 rules repaired: rule removed: -A C -j R"
	for _, test := range []struct {
		name   string
		passes []reconcile.Outcome
		want   []string
	}{
		{"at once", []reconcile.Outcome{repairedBy("sh (pid 7)", at, removed)},
			[]string{"18:00 by sh (pid 7) " + repaired}},
		{"several differences", []reconcile.Outcome{repairedBy("", at, removed, removed, removed)},
			[]string{"18:00 " + repaired + ", and 2 more differences"}},
		{"late", []reconcile.Outcome{unnamed, later(unnamed, "sh (pid 7)"),
			later(unnamed, "sh (pid 8)")}, []string{"18:00 by sh (pid 7) " + repaired}},
		{"late, each time", []reconcile.Outcome{unnamed, later(unnamed, "sh (pid 7)"), again,
			later(again, "sh (pid 8)")}, []string{"18:00-18:01 x2 by sh (pid 8) " + repaired}},
		{"the second alone", []reconcile.Outcome{unnamed, again, later(again, "sh (pid 8)")},
			[]string{"18:00 " + repaired, "18:01 by sh (pid 8) " + repaired}},
		{"not of the one before", []reconcile.Outcome{unnamed, later(again, "sh (pid 8)")},
			[]string{"18:00 " + repaired}},
	} {
		var h history
		for i, o := range test.passes {
			h.pass(passed{outcomes: []reconcile.Outcome{o}}, o.LastDriftAt.Add(time.Duration(i)))
		}
		if got := inLines(h.lines); !slices.Equal(got, test.want) {
			t.Errorf("%s:\n%s\nwant\n%s", test.name, strings.Join(got, "\n"),
				strings.Join(test.want, "\n"))
		}
	}
}

// TestHistoryOfDriftThatStands: one that could not be repaired is told with its culprit, and one
// that was is not told again by the warning that follows.
func TestHistoryOfDriftThatStands(t *testing.T) {
	o := repairedBy("", time.Time{}, iptables.Drift{Kind: iptables.TableFlushed, Chain: "nat"})
	o.Drift, o.Facts.By = nil, "nft (pid 3)"
	warning := report.Event{Severity: report.Warning, Message: "IPv4 rules were changed",
		Finding: symptom.Finding{ID: symptom.DriftRepaired, Key: "IPv4"}}
	for _, equal := range []bool{true, false} {
		var h history
		o.Status.Equal = equal
		h.pass(passed{outcomes: []reconcile.Outcome{o}}, testStart)
		h.note(status.OfFinding, warning, testStart)
		var want []string
		if !equal {
			want = []string{"18:00 by nft (pid 3) IPv4 rules were changed"}
		}
		if got := inLines(h.lines); !slices.Equal(got, want) {
			t.Errorf("equal %v: %q", equal, got)
		}
	}
}

// TestHistoryOfFight: who keeps undoing our rules is named there, late too, and that it is over is
// nobody's doing.
func TestHistoryOfFight(t *testing.T) {
	fight := symptom.Finding{ID: symptom.Fight, Key: "IPv4"}
	o := reconcile.Outcome{}
	o.Status.Family, o.Facts.Fighting = "IPv4", true
	var h history
	pass := func(by string) {
		o.Facts.By = by
		h.pass(passed{outcomes: []reconcile.Outcome{o}}, testStart)
	}
	pass("")
	h.note(status.OfFinding, report.Event{Severity: report.Error, Message: "undone", Finding: fight},
		testStart)
	pass("sh (pid 7)")
	pass("sh (pid 8)")
	h.note(status.OfFinding, report.Event{Severity: report.Info, Message: "over: undone",
		Finding: fight}, testStart)
	pass("sh (pid 9)")
	want := []string{"18:00 by sh (pid 7) undone", "18:00 over: undone"}
	if got := inLines(h.lines); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// TestHistoryOfPasses: what a run tells of a VM's start, an outage, and another attribute.
func TestHistoryOfPasses(t *testing.T) {
	told, _ := heard()
	var kept []status.Transition
	told.transitions = func(all []status.Transition) { kept = all }
	var shown status.Status
	told.reporters.status = func(s status.Status) { shown = s }
	p := intercepting()
	p.seen.Attribute.Serial = 1
	p.outcomes[0].Adopted = 12
	told.publish(p, "nft")
	p.outcomes[0].Adopted = 0
	p.seen.Attribute.Serial, p.seen.Attribute.Good = 2, &goodAttribute{Kept: true}
	told.publish(p, "nft")
	p.seen.Attribute.Serial, p.seen.Attribute.Good = 3, &goodAttribute{}
	p.findings = []symptom.Finding{{ID: symptom.EnvoyDown, Severity: symptom.Error,
		Cause: "Envoy is not running", Next: "start it"}}
	told.publish(p, "nft")
	p.findings = nil
	p.seen.Envoy.Restarts = 1
	told.publish(p, "nft")
	var got []string
	for _, line := range kept {
		got = append(got, fmt.Sprint(line.Kind, " ", line.Severity, ": ", line.Text))
	}
	want := []string{
		"rules info: IPv4: 12 rules adopted",
		"envoy info: Envoy Version: 1.40.0",
		"mode info: interception: intercepting",
		"services info: 0 services are intercepted",
		"ready info: ready: Envoy 1.40.0 is live and the rules are in place",
		"attribute info: the attribute that an earlier run kept is in force",
		"attribute info: attribute changed",
		"finding error: Envoy is not running; start it",
		"envoy info: Envoy restarted",
		"finding info: over: Envoy is not running; start it",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, line := range kept {
		if !slices.Contains(status.Kinds, line.Kind) {
			t.Errorf("%q is no kind", line.Kind)
		}
	}
	if !slices.Equal(shown.History, kept) {
		t.Errorf("the status has %q", inLines(shown.History))
	}
	kept = nil
	told.publish(p, "nft")
	if kept != nil || len(shown.History) != len(want) {
		t.Error("nothing has happened, and it is kept anew, or not shown")
	}
}

// TestHistoryIsShownAsItWas: who has a Status reads it beside the loop, which goes on.
func TestHistoryIsShownAsItWas(t *testing.T) {
	var h history
	h.add(status.Transition{Kind: status.OfDrift, Text: "a"}, testStart)
	shown, news := h.show()
	h.name(&status.Transition{Kind: status.OfDrift, By: "sh (pid 1)"})
	h.add(status.Transition{Kind: status.OfDrift, Text: "b", By: "sh (pid 2)"}, testStart)
	if got := inLines(shown); !news || !slices.Equal(got, []string{"18:00 a"}) {
		t.Errorf("%v %q", news, got)
	}
}

// TestQuietPassCostsNothing: no allocation, whatever the history holds.
func TestQuietPassCostsNothing(t *testing.T) {
	var h history
	var m minutes
	for i := range maxTransitions {
		h.add(status.Transition{Kind: status.OfServices, Text: fmt.Sprint(i)}, testStart)
	}
	p := intercepting()
	quiet := func() {
		h.pass(p, testStart)
		if _, news := h.show(); news {
			t.Error("there is news")
		}
		m.pass(p, "ready")
	}
	h.pass(p, testStart)
	h.show()
	if n := testing.AllocsPerRun(100, quiet); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkQuietPassHistory is what history and minutes add to a pass in which nothing happens.
func BenchmarkQuietPassHistory(b *testing.B) {
	var h history
	var m minutes
	for i := range maxTransitions {
		h.add(status.Transition{Kind: status.OfServices, Text: fmt.Sprint(i)}, testStart)
	}
	p := intercepting()
	b.ReportAllocs()
	for b.Loop() {
		h.pass(p, testStart)
		h.show()
		m.pass(p, "ready")
	}
}

// BenchmarkTransition is what one more costs a full history that flaps.
func BenchmarkTransition(b *testing.B) {
	var h history
	i := 0
	for b.Loop() {
		h.add(status.Transition{Kind: status.OfReady, Text: []string{"ready", "not ready"}[i%2]},
			testStart.Add(time.Duration(i)*time.Second))
		i++
	}
}

// BenchmarkTransitions is the same where each says something else: 10,000 listeners are rejected.
func BenchmarkTransitions(b *testing.B) {
	var h history
	i := 0
	for b.Loop() {
		h.add(status.Transition{Kind: status.OfFinding, ID: symptom.ListenerRejected,
			Key: fmt.Sprint("listener-", i), Text: fmt.Sprint("Envoy rejects listener-", i)}, testStart)
		i++
	}
}
