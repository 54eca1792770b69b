package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var update = flag.Bool("update", false, "write the golden files")

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// results are made of findings: of each kind that has some, and of the rest ok or unknown.
func results(found []symptom.Finding, unseen map[symptom.Source]string,
	ignored ...symptom.ID) []symptom.Result {
	all := symptom.Examine(symptom.Facts{Unseen: unseen}, ignored...)
	for i := range all {
		for _, f := range found {
			if f.ID != all[i].ID {
				continue
			}
			r := &all[i]
			r.Findings, r.Why = append(r.Findings, f), ""
			if r.State != symptom.Ignored {
				r.State = symptom.Found
			}
			if len(r.Findings) == 1 || f.Severity > r.Severity {
				r.Severity = f.Severity
			}
		}
	}
	return all
}

func finding(id symptom.ID, s symptom.Severity) symptom.Finding {
	return symptom.Finding{ID: id, Severity: s, Cause: "cause of " + string(id), Next: "mend it"}
}

// everything is unseen.
func everything(why string) map[symptom.Source]string {
	unseen := map[symptom.Source]string{}
	for _, k := range symptom.Kinds() {
		for _, source := range k.Needs {
			unseen[source] = why
		}
	}
	return unseen
}

func TestExit(t *testing.T) {
	advice, warning, failure := symptom.Advice, symptom.Warning, symptom.Error
	adviceUnknown := map[symptom.Source]string{symptom.FromOthers: "no root"} // other-nat-chain alone
	errorUnknown := map[symptom.Source]string{symptom.FromKernel: "no root"}
	for _, tt := range []struct {
		name    string
		found   []symptom.Finding
		unseen  map[symptom.Source]string
		ignored []symptom.ID
		want    [3]int // by --fail-on advice, warning, error
	}{
		{name: "nothing", want: [3]int{0, 0, 0}},
		{name: "advice", found: []symptom.Finding{finding(symptom.OtherChain, advice)},
			want: [3]int{1, 0, 0}},
		{name: "a warning", found: []symptom.Finding{finding(symptom.ListenAddress, warning)},
			want: [3]int{1, 1, 0}},
		{name: "an error", found: []symptom.Finding{finding(symptom.EnvoyDown, failure)},
			want: [3]int{1, 1, 1}},
		{name: "an error that is ignored", found: []symptom.Finding{finding(symptom.EnvoyDown, failure)},
			ignored: []symptom.ID{symptom.EnvoyDown}, want: [3]int{0, 0, 0}},
		{name: "a check for advice that could not look", unseen: adviceUnknown, want: [3]int{2, 0, 0}},
		{name: "the same, ignored", unseen: adviceUnknown, ignored: []symptom.ID{symptom.OtherChain},
			want: [3]int{0, 0, 0}},
		{name: "checks for errors that could not look", unseen: errorUnknown, want: [3]int{2, 2, 2}},
		{name: "these, and a warning", unseen: errorUnknown,
			found: []symptom.Finding{finding(symptom.ListenAddress, warning)}, want: [3]int{1, 1, 2}},
		{name: "these, and an error", unseen: errorUnknown,
			found: []symptom.Finding{finding(symptom.EnvoyDown, failure)}, want: [3]int{1, 1, 1}},
		{name: "nothing could be looked at", unseen: everything("no answer in time"),
			want: [3]int{2, 2, 2}},
	} {
		for failOn, want := range tt.want {
			r := New(results(tt.found, tt.unseen, tt.ignored...), Options{
				Time: noon, FailOn: symptom.Severity(failOn), Ignored: tt.ignored, Unseen: tt.unseen})
			if r.Exit != want {
				t.Errorf("%s, --fail-on %v: exit %d, want %d", tt.name, symptom.Severity(failOn), r.Exit, want)
			}
			valid(t, tt.name, r)
		}
	}
}

// TestGolden is what people read. The JSON of each is in the form that its schema says.
func TestGolden(t *testing.T) {
	for name, r := range goldens() {
		t.Run(name, func(t *testing.T) {
			valid(t, name, r)
			var have bytes.Buffer
			if err := r.Text(&have, false, 100); err != nil {
				t.Fatal(err)
			}
			terminaltest.Fits(t, r.Text)
			file := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(file, have.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), have.String()); diff != "" {
				t.Errorf("%s (-want +have):\n%s", file, diff)
			}
		})
	}
}

func goldens() map[string]Report {
	down := finding(symptom.EnvoyDown, symptom.Error)
	down.Since = noon.Add(-time.Hour)
	down.Evidence = []symptom.Evidence{
		{Source: symptom.FromEnvoy, Time: noon, Text: "dial tcp 127.0.0.1:15000: connect: refused"},
		{Source: symptom.FromEnvoyLog, Text: strings.Repeat("a long line ", 100)},
	}
	down.Commands = []string{"systemctl status service-proxy-envoy"}
	closed := finding(symptom.InterceptionNotReady, symptom.Error)
	closed.ExplainedBy, closed.Key = symptom.EnvoyDown, "127.0.0.1:15001"
	warned := finding(symptom.ListenAddress, symptom.Warning)
	advised := finding(symptom.OtherChain, symptom.Advice)
	options := Options{Version: "1.2.3", Time: noon, FailOn: symptom.Error}
	user := options
	user.Unseen = map[symptom.Source]string{
		symptom.FromKernel: "needs root", symptom.FromFilter: "needs root",
		symptom.FromAgent: "needs root", symptom.FromEnvoyLog: "needs root or the group envoy",
	}
	quiet := options
	quiet.Ignored = []symptom.ID{symptom.EnvoyDown, symptom.OtherChain}
	hung := options
	hung.Unseen = everything("no answer in time")
	var many []symptom.Finding
	for i := range 1000 {
		f := finding(symptom.ListenerRejected, symptom.Error)
		f.Key = fmt.Sprint("listener ", i)
		many = append(many, f)
	}
	all := []symptom.Finding{advised, warned, closed, down}
	return map[string]Report{
		"healthy": New(results(nil, nil), options),
		"found":   New(results(all, nil), options),
		"user":    New(results(nil, user.Unseen), user),
		"ignored": New(results(all, nil, quiet.Ignored...), quiet),
		"hung":    New(results(nil, hung.Unseen), hung),
		"many":    New(results(many, nil), options),
	}
}

// TestOrder: errors first, each followed by what it explains, whatever the order of the checks.
func TestOrder(t *testing.T) {
	explained := func(id, by symptom.ID, s symptom.Severity) symptom.Finding {
		f := finding(id, s)
		f.ExplainedBy = by
		return f
	}
	r := New(results([]symptom.Finding{
		finding(symptom.OtherChain, symptom.Advice),
		explained(symptom.ServingPortNoChain, symptom.EnvoyNotConfigured, symptom.Warning),
		explained(symptom.EnvoyNotConfigured, symptom.PermissionDenied, symptom.Error),
		finding(symptom.PermissionDenied, symptom.Error),
		// a warning that explains an error is told among the errors
		finding(symptom.AttributeAdvice, symptom.Warning),
		explained(symptom.RulesDiffer, symptom.AttributeAdvice, symptom.Error),
		finding(symptom.ListenAddress, symptom.Warning),
		// explained by what is not there
		explained(symptom.InterceptionNotReady, symptom.EnvoyDown, symptom.Error),
		// each by the other
		explained(symptom.ClockWrong, symptom.EnvoyIdentity, symptom.Error),
		explained(symptom.EnvoyIdentity, symptom.ClockWrong, symptom.Error),
	}, nil), Options{Time: noon})
	var have []symptom.ID
	for _, f := range r.Findings {
		have = append(have, f.ID)
	}
	want := []symptom.ID{
		symptom.PermissionDenied, symptom.EnvoyNotConfigured, symptom.ServingPortNoChain,
		symptom.AttributeAdvice, symptom.RulesDiffer,
		symptom.InterceptionNotReady, symptom.EnvoyIdentity, symptom.ClockWrong,
		symptom.ListenAddress, symptom.OtherChain,
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("-want +have:\n%s", diff)
	}
}

// TestForeignText: what others wrote, through the real checks, is bounded and moves no terminal.
func TestForeignText(t *testing.T) {
	foreign := map[string]string{
		"control":   "\x1b]0;owned\x07\x1b[2J\r\nname\u009b31m\x7f",
		"direction": "abc\u202edcba\u2066\u200b",
		"html":      `<script>alert("1")</script>`,
		"long":      strings.Repeat("\x1b[1m名", 200_000),
		"invalid":   "a\xff\xfe\xc3(",
	}
	for name, word := range foreign {
		t.Run(name, func(t *testing.T) {
			f := symptom.Facts{
				ProxyUser: word, ProxyUID: 101, Account: word, Attribute: errors.New(word),
				Advice: []string{word}, Bootstrap: word,
				Envoy: symptom.Envoy{
					State: "LIVE", Configured: true, LogErr: word,
					Rejected: []envoyadmin.Rejected{{Name: word, Details: word},
						{Name: word, Details: "unable to open file '" + word + "': Permission denied"}},
					Skipped: []envoyadmin.Skipped{{Listener: word, Reason: word}},
					Stream:  &symptom.Stream{Target: word, Code: 7, Message: word},
				},
				Families: []symptom.Family{{Family: iptables.IPv4, Fighting: true, By: word,
					Shadow: []iptables.Drift{{Chain: "OUTPUT", Rule: word}}}},
				Unseen: map[symptom.Source]string{symptom.FromAgent: word},
			}
			results := symptom.Examine(f)
			for i := range results {
				for j := range results[i].Findings {
					f := &results[i].Findings[j]
					f.Evidence = append(f.Evidence, symptom.Evidence{Source: symptom.FromEnvoy, Text: word})
					f.Commands = append(f.Commands, "echo '"+word+"'")
				}
			}
			r := New(results, Options{Version: word, Time: noon, Unseen: f.Unseen})
			body := valid(t, name, r)
			var text bytes.Buffer
			if err := r.Text(&text, false, 100); err != nil {
				t.Fatal(err)
			}
			for form, out := range map[string][]byte{"text": text.Bytes(), "json": body} {
				if len(out) > 300_000 {
					t.Errorf("%s of %d bytes", form, len(out))
				}
				for _, c := range string(out) {
					if c != '\n' && (unicode.IsControl(c) || unicode.Is(unicode.Cf, c)) {
						t.Fatalf("%s has %q", form, c)
					}
				}
			}
			if word == foreign["html"] && !strings.Contains(text.String(), "echo '"+word+"'") {
				t.Error("a command that can be pasted is gone")
			}
			if strings.Contains(text.String(), "echo '") && word != foreign["html"] {
				t.Error("a command that was changed is printed")
			}
		})
	}
}

func TestParse(t *testing.T) {
	ids, err := ParseIDs([]string{"envoy-down, drift", "drift", ""})
	if diff := cmp.Diff([]symptom.ID{"envoy-down", "drift"}, ids); err != nil || diff != "" {
		t.Errorf("%v, %v", ids, err)
	}
	if _, err := ParseIDs([]string{"envoy-dwon"}); err == nil ||
		!strings.Contains(err.Error(), `"envoy-dwon"`) || !strings.Contains(err.Error(), "envoy-down,") {
		t.Errorf("a wrong id: %v", err)
	}
	if s, err := ParseSeverity("warning"); err != nil || s != symptom.Warning {
		t.Errorf("%v, %v", s, err)
	}
	if _, err := ParseSeverity("loud"); err == nil {
		t.Error("loud is a severity")
	}
}

// valid fails where the JSON is not as docs/doctor.schema.json says, or has a property of which
// that says nothing.
func valid(t *testing.T, name string, r Report) []byte {
	t.Helper()
	body, err := r.JSON()
	if err != nil {
		t.Fatal(err)
	}
	schema.Valid(t, "doctor", body)
	var read struct{ Exit int }
	if err := json.Unmarshal(body, &read); err != nil || read.Exit != r.Exit {
		t.Errorf("%s: JSON says exit %d, %v; want %d", name, read.Exit, err, r.Exit)
	}
	return body
}

// TestSchema: what is documented is what is written.
func TestSchema(t *testing.T) { schema.Properties(t, "doctor", Report{}) }

// TestSchemaRefuses: it is a schema that something can fail.
func TestSchemaRefuses(t *testing.T) {
	body, err := goldens()["found"].JSON()
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{
		{`"exit": 1`, `"exit": 3`}, {`"severity": "error"`, `"severity": "bad"`},
		{`"state": "found"`, `"state": "ok"`}, {`"cause": "`, `"couse": "`},
		{`"version": "1.2.3",`, ``}, {`"version": "1.2.3",`, `"version": "1.2.3", "other": 1,`},
	} {
		changed := strings.Replace(string(body), change[0], change[1], 1)
		if changed == string(body) {
			t.Fatalf("no %s", change[0])
		}
		if schema.Check(t, "doctor", []byte(changed)) == nil {
			t.Errorf("%s for %s is taken", change[1], change[0])
		}
	}
}
