package agent

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/recording"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

var update = flag.Bool("update", false, "write the files in testdata anew")

// recordedLook is interceptingLook as Record would write it, with what is behind its listener.
func recordedLook(t *testing.T, edit func(*recorded)) []byte {
	t.Helper()
	l := interceptingLook(t)
	l.Seen.Now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l.Seen.Settings = Settings{Version: "1.2.3", ProxyUser: "envoy"}
	l.Facts = symptom.Facts{ProxyUser: "envoy", Scopes: []string{"a"},
		Envoy:  symptom.Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Configured: true},
		Unseen: map[symptom.Source]string{symptom.FromAgent: "not\x1b[31m there"}}
	r := l.record()
	r.Users["envoy"] = userID{107, 107}
	for i := range families {
		counters := iptables.Counters{}
		for _, chain := range l.Ruleset(i).Chains() {
			for range l.Have[i].Rules(chain) {
				counters[chain] = append(counters[chain], iptables.Counter{Packets: 7, Bytes: 420, Known: true})
			}
		}
		r.Families[i].Rules = strings.Split(l.Have[i].Save(counters), "\n")
	}
	r.Ways = route.Map{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Source: netip.MustParseAddr("10.9.9.9")},
		{Prefix: netip.MustParsePrefix("10.9.9.9/32"), Source: netip.MustParseAddr("10.9.9.9"), Self: true},
		{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Why: "connect: network is unreachable"}}
	r.Envoy.Clusters = []envoyadmin.ClusterEndpoints{
		{ClusterHealth: envoyadmin.ClusterHealth{Name: "web"}}}
	if edit != nil {
		edit(&r)
	}
	data, err := recording.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func replayed(t *testing.T, data []byte) Looked {
	t.Helper()
	l, err := Replay(data)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func explained(t *testing.T, l Looked, to string, edit func(*explain.Question)) explain.Answer {
	t.Helper()
	q := explain.Question{To: netip.MustParseAddrPort(to), UID: 1000, GID: 1000}
	if edit != nil {
		edit(&q)
	}
	return l.Explain(t.Context(), q)
}

func TestReplayedExplain(t *testing.T) {
	l := replayed(t, recordedLook(t, nil))
	a := explained(t, l, "10.0.0.1:80", func(q *explain.Question) { q.Try = true })
	if a.Verdict != explain.Intercepted || !a.Complete() || a.Tried != nil {
		t.Errorf("a service: %+v", a)
	}
	if step := a.Path[1]; step.Packets == nil || *step.Packets != 7 {
		t.Errorf("the counters of %+v are not known", step)
	}
	if slices.ContainsFunc(a.Notes, func(n string) bool { return strings.Contains(n, "should be") }) {
		t.Errorf("the rules are as they should be: %q", a.Notes)
	}
	if a = explained(t, l, "10.0.0.2:80", nil); a.Verdict != explain.NotIntercepted || !a.Complete() {
		t.Errorf("no service: %+v", a)
	}
	if a = explained(t, l, "11.0.0.2:80", nil); !strings.Contains(a.Why, "network is unreachable") {
		t.Errorf("no way: %+v", a)
	}
	// The recording has no IPv6 network at all.
	if a = explained(t, l, "[fd00::1]:80", nil); a.Complete() ||
		a.Unseen[symptom.FromRoutes] != errNotRecorded.Error() {
		t.Errorf("an address whose way is not in the recording: %+v", a)
	}
	way, err := l.wayTo(t.Context(), netip.MustParseAddrPort("10.9.9.9:1"))
	if err != nil || !way.Local {
		t.Errorf("the machine's own address: %+v, %v", way, err)
	}
}

func TestReplayedWithGaps(t *testing.T) {
	no := errors.New("no time")
	l := replayed(t, recordedLook(t, func(r *recorded) {
		r.Envoy.RoutesErr, r.Envoy.ClustersErr, r.Ways, r.WaysErr = no, no, nil, no
		r.Families[0].CountErr = no
		chain := &r.Envoy.Listeners[0].Chains[0]
		chain.HTTP, chain.RouteConfig, chain.Port = true, "route", 80
	}))
	a := explained(t, l, "10.0.0.1:80", nil)
	if a.Unseen[symptom.FromRoutes] != "no time" || a.Unseen[symptom.FromClusters] != "no time" ||
		!slices.Contains(a.Notes, "not all counters are known: no time") {
		t.Errorf("unseen %v, notes %q", a.Unseen, a.Notes)
	}
	l = replayed(t, recordedLook(t, func(r *recorded) {
		r.Families[0].RulesErr = fmt.Errorf("read: %w", iptables.ErrNotRoot)
		r.Families[0].Rules = nil
	}))
	if a := explained(t, l, "10.0.0.1:80", nil); a.Verdict != explain.Unknown || a.Complete() {
		t.Errorf("without rules: %+v", a)
	}
	l = replayed(t, []byte(`{"schema":"service-proxy-agent/look/v1"}`))
	if a := explained(t, l, "10.0.0.1:80", nil); a.Verdict != explain.Unknown || a.Complete() {
		t.Errorf("a recording of nothing: %+v", a)
	}
	l = replayed(t, recordedLook(t, func(r *recorded) {
		r.Families[0].RulesErr, r.Families[0].Rules = fmt.Errorf("read: %w", iptables.ErrNotRoot), nil
	}))
	if !errors.Is(l.HaveErr[0], iptables.ErrNotRoot) {
		t.Errorf("the error is %v", l.HaveErr[0])
	}
}

func TestReplayedCaller(t *testing.T) {
	l := replayed(t, recordedLook(t, nil))
	for _, tt := range []struct {
		user, group string
		uid, gid    uint32
		err         string
	}{
		{"", "", 65534, 65534, ""}, {"root", "", 0, 0, ""}, {"envoy", "", 107, 107, ""},
		{"107", "", 107, 107, ""}, {"4711", "12", 4711, 12, ""}, {"root", "root", 0, 0, ""},
		{"daemon", "", 0, 0, `user "daemon" is not in the recording, which has envoy, root alone`},
		{"root", "da\x1bemon", 0, 0, "group \"da\uFFFDemon\" is not in the recording"},
	} {
		uid, gid, err := l.Caller(tt.user, tt.group)
		if tt.err == "" && (err != nil || uid != tt.uid || gid != tt.gid) ||
			tt.err != "" && (!errors.Is(err, ErrSettings) || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%q %q: %d, %d, %v", tt.user, tt.group, uid, gid, err)
		}
	}
}

func TestReplayedLook(t *testing.T) {
	undecided := map[symptom.ID]string{symptom.RulesDiffer: "no time"}
	l := replayed(t, recordedLook(t, func(r *recorded) { r.Facts.Undecided = undecided }))
	if r := result(l.Facts, symptom.RulesDiffer); r.State != symptom.Unknown || r.Why != "no time" {
		t.Errorf("what it did not decide is %s: %q", r.State, r.Why)
	}
	was := interceptingLook(t)
	if l.Seen.Now.Format(time.RFC3339) != "2026-01-02T03:04:05Z" || l.Seen.Settings.Version != "1.2.3" {
		t.Errorf("it was at %v by %q", l.Seen.Now, l.Seen.Settings.Version)
	}
	if diff := cmp.Diff(was.Want.Served, l.Want.Served, cmp.Comparer(func(a, b netip.Prefix) bool {
		return a == b
	})); diff != "" {
		t.Error(diff)
	}
	for i := range families {
		if !l.Ruleset(i).Equal(was.Ruleset(i)) {
			t.Errorf("%v: what is wanted is\n%s\nwant\n%s", families[i], l.Ruleset(i), was.Ruleset(i))
		}
	}
}

func TestReplayRefuses(t *testing.T) {
	for _, tt := range []struct{ name, data, want string }{
		{"nothing", "", "not a recorded look"},
		{"an archive", "\x1f\x8b\x08", "not a recorded look"},
		{"other JSON", `{"a":1}`, `its schema is ""`},
		{"a newer one", `{"schema":"service-proxy-agent/look/v2"}`,
			`its schema is "service-proxy-agent/look/v2", not "service-proxy-agent/look/v1"; take a newer`},
		{"cut off", string(recordedLook(t, nil)[:9000]), "unexpected EOF"},
		{"a type", `{"schema":"service-proxy-agent/look/v1","facts":[]}`, "not a recorded look"},
		{"rules that are cut off", `{"schema":"service-proxy-agent/look/v1",` +
			`"families":[{"rules":["*nat"]},{}]}`, "the save ends within table nat"},
	} {
		if _, err := Replay([]byte(tt.data)); !errors.Is(err, ErrRecording) ||
			!strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// TestOlderRecording: what an older agent could not see is unknown, and what it found is found.
func TestOlderRecording(t *testing.T) {
	states := func(edit func(*recorded)) map[symptom.ID]symptom.State {
		out := map[symptom.ID]symptom.State{}
		for _, r := range symptom.Examine(replayed(t, recordedLook(t, edit)).Facts) {
			out[r.ID] = r.State
			if r.State == symptom.Unknown && r.Why == "" {
				t.Errorf("%s is unknown for no reason", r.ID)
			}
		}
		return out
	}
	now := states(nil)
	if now[symptom.ClockWrong] != symptom.OK || now[symptom.EnvoyTooOld] != symptom.OK {
		t.Fatalf("the states are %v", now)
	}
	older := states(func(r *recorded) {
		r.Kinds = slices.DeleteFunc(r.Kinds, func(id symptom.ID) bool { return id == symptom.ClockWrong })
	})
	now[symptom.ClockWrong] = symptom.Unknown
	if diff := cmp.Diff(now, older); diff != "" {
		t.Error(diff)
	}
	found := states(func(r *recorded) {
		r.Kinds, r.Facts.Clock = nil, time.Hour
	})
	if found[symptom.ClockWrong] != symptom.Found || found[symptom.EnvoyTooOld] != symptom.Unknown {
		t.Errorf("the states are %v", found)
	}
	// A field that has come since.
	addedFields["Clock"] = []symptom.ID{symptom.ClockWrong}
	defer delete(addedFields, "Clock")
	withoutClock := states(func(r *recorded) {
		r.Fields = slices.DeleteFunc(r.Fields, func(f string) bool { return f == "Clock" })
	})
	if diff := cmp.Diff(now, withoutClock); diff != "" {
		t.Error(diff)
	}
}

// TestFieldsOfFacts: a recording is read by older and newer agents. So no field of Facts goes or
// gets another name, and a new one says which checks need it.
func TestFieldsOfFacts(t *testing.T) {
	const file = "testdata/look-v1.fields"
	fields := factsFields()
	if *update {
		if err := os.WriteFile(file, []byte(strings.Join(fields, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	first := strings.Fields(string(text))
	for _, field := range first {
		if !slices.Contains(fields, field) {
			t.Errorf("Facts have no field %s any more: older recordings have it, and newer ones would "+
				"lack it for older agents", field)
		}
	}
	for _, field := range fields {
		if _, added := addedFields[field]; !added && !slices.Contains(first, field) {
			t.Errorf("Facts have a new field %s: add it to addedFields with the checks that need it", field)
		}
	}
}

// FuzzReplay: whatever somebody sends as a recording, it is refused or answered, in printable
// words.
func FuzzReplay(f *testing.F) {
	t := &testing.T{}
	f.Add(recordedLook(t, nil))
	f.Add(recordedLook(t, func(r *recorded) {
		r.Facts.Old = []symptom.OldConnection{{}}
		r.Facts.Families = []symptom.Family{{Family: 9, Left: []iptables.RefusedError{{}},
			Drift: []iptables.Drift{{Kind: 99}}, Shadow: []iptables.Drift{{}}}}
		r.Facts.NoRoute = []symptom.Unrouted{{Count: 2, Addrs: []netip.Addr{{}}}}
		r.Facts.Ports = []symptom.Port{{}}
		r.Facts.Agent.Findings = []symptom.Finding{{ID: symptom.LogUnreadable, Cause: "\x1b"}}
		r.Facts.Dropped = []symptom.Dropped{{Port: 1}}
		r.Facts.ClosedAgent = &symptom.ClosedAgent{Process: "\x1b", Writes: "\x1b"}
		r.Facts.Discarded = &symptom.Discarded{Instance: "\x1b", What: []string{"\x1b", ""}}
		r.Facts.Brake = symptom.Brake{Off: true, By: "\x1b", Bad: "\x1b", BadBy: "\x1b"}
		r.Envoy.Err = errors.New("\x1b")
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Replay(data)
		if err != nil {
			return
		}
		report := doctor.New(symptom.Examine(l.Facts), doctor.Options{Version: l.Seen.Settings.Version,
			Time: l.Seen.Now, Unseen: l.Facts.Unseen})
		var text strings.Builder
		if err := report.Text(&text, terminal.Style(false), 100); err != nil {
			t.Fatal(err)
		}
		if i := strings.IndexFunc(text.String(), func(r rune) bool {
			return r != '\n' && !unicode.IsPrint(r)
		}); i >= 0 {
			t.Fatalf("not printable at byte %d: %q", i, text.String())
		}
		if body, err := report.JSON(); err != nil || !json.Valid(body) {
			t.Fatalf("%v\n%s", err, body)
		}
		for _, to := range []string{"10.0.0.1:80", "[fd00::1]:53"} {
			for _, inbound := range []bool{false, true} {
				a := explained(t, l, to, func(q *explain.Question) {
					q.Inbound, q.UDP = inbound, q.To.Port() == 53
				})
				if !printable(reflect.ValueOf(a)) {
					t.Fatalf("not printable: %+q", fmt.Sprintf("%+v", a))
				}
			}
		}
	})
}

// printable says whether all texts within a value are fit for a terminal.
func printable(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.String:
		return symptom.Printable(v.String(), len(v.String())+1) == v.String()
	case reflect.Pointer:
		return v.IsNil() || printable(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && !printable(v.Field(i)) {
				return false
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			if !printable(v.Index(i)) {
				return false
			}
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			if !printable(key) || !printable(v.MapIndex(key)) {
				return false
			}
		}
	}
	return true
}
