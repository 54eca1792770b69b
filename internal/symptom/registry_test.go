package symptom

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// sources are those of surroundings.go.
func sources(t *testing.T) (all []Source) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "surroundings.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
			if kind, ok := v.Type.(*ast.Ident); ok && kind.Name == "Source" {
				text, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, Source(text))
			}
		}
		return true
	})
	if len(all) < 13 {
		t.Fatalf("%d sources", len(all))
	}
	return all
}

func result(t *testing.T, all []Result, id ID) Result {
	t.Helper()
	i := slices.IndexFunc(all, func(r Result) bool { return r.ID == id })
	if i < 0 {
		t.Fatalf("no result for %s", id)
	}
	return all[i]
}

// TestExamineOK: with all seen and nothing wrong each check says ok, in the order of Kinds.
func TestExamineOK(t *testing.T) {
	results := Examine(live(nil))
	if len(results) != len(Kinds()) {
		t.Fatalf("%d results for %d kinds", len(results), len(Kinds()))
	}
	for i, r := range results {
		k := Kinds()[i]
		if r.ID != k.ID || r.Row != k.Row || r.Title != k.Title || r.State != OK ||
			r.Severity != k.Severities[0] || r.Why != "" || r.Findings != nil {
			t.Errorf("%+v", r)
		}
	}
}

// TestExamineUnseen: without any one source those that need it are unknown and say why; no other
// is. Nothing is ok on a VM where nothing could be seen.
func TestExamineUnseen(t *testing.T) {
	for _, k := range Kinds() {
		if len(k.Needs) == 0 {
			t.Errorf("%s is ok whatever was seen", k.ID)
		}
		for i, s := range k.Needs {
			if !slices.Contains(sources(t), s) || slices.Contains(k.Needs[:i], s) {
				t.Errorf("%s needs %s, which is no source, or twice", k.ID, s)
			}
		}
	}
	blind := live(nil)
	blind.Unseen = map[Source]string{}
	for _, source := range sources(t) {
		blind.Unseen[source] = "time ran out"
		f := live(nil)
		f.Unseen = map[Source]string{source: "permission \x1b[2Jdenied"}
		for i, r := range Examine(f) {
			want, why := OK, ""
			if slices.Contains(Kinds()[i].Needs, source) {
				want, why = Unknown, string(source)+": permission \uFFFD[2Jdenied"
			}
			if r.State != want || r.Why != why || r.Severity != Kinds()[i].Severities[0] ||
				r.Because != "" {
				t.Errorf("without %s: %+v, want %s", source, r, want)
			}
		}
	}
	for _, r := range Examine(blind) {
		if r.State != Unknown || strings.Count(r.Why, "time ran out") != len(kindOf(t, r.ID).Needs) {
			t.Errorf("nothing was seen: %+v", r)
		}
	}
}

// TestExamineFound: what is found is found, whatever was not seen, and has its worst severity.
func TestExamineFound(t *testing.T) {
	for _, e := range examples {
		if e.want == "" {
			continue
		}
		for _, blind := range []bool{false, true} {
			f := e.facts
			if blind {
				f.Unseen = map[Source]string{}
				for _, source := range sources(t) {
					f.Unseen[source] = "no root"
				}
			}
			all := Examine(f)
			r := result(t, all, e.want)
			if r.State != Found || len(r.Findings) == 0 || r.Why != "" ||
				r.Severity != slices.MaxFunc(r.Findings, func(a, b Finding) int {
					return int(a.Severity - b.Severity)
				}).Severity {
				t.Errorf("%s: %+v", e.when, r)
			}
			n := 0
			for _, r := range all {
				n += len(r.Findings)
			}
			if want := len(Check(f)); n != want {
				t.Errorf("%s: %d findings in the results, and Check has %d", e.when, n, want)
			}
		}
	}
}

// TestExamineTold: what the daemon tells too is found once, and since when the daemon knows it.
func TestExamineTold(t *testing.T) {
	for _, e := range examples {
		alone := Check(e.facts)
		f := e.facts
		f.Agent.Findings = nil
		for _, found := range alone {
			found.Since = time.Unix(1, 0).UTC()
			f.Agent.Findings = append(f.Agent.Findings, found)
		}
		f.Unseen = map[Source]string{}
		for _, source := range sources(t) {
			f.Unseen[source] = "no root"
		}
		n := 0
		for _, r := range Examine(f) {
			n += len(r.Findings)
		}
		if n != len(alone) {
			t.Errorf("%s: %d findings, and %d without the daemon", e.when, n, len(alone))
		}
	}
}

// TestExamineIgnored: what is ignored says so and has its findings; what it explained stands for
// itself.
func TestExamineIgnored(t *testing.T) {
	f := stream(5, "Requested entity was not found.")
	r := result(t, Examine(f, GuestAttributesOff), EnvoyNotConfigured)
	if r.State != Found || r.Findings[0].ExplainedBy != ConfigNotFound {
		t.Errorf("%+v", r)
	}
	all := Examine(f, ConfigNotFound, GuestAttributesOff)
	if r := result(t, all, ConfigNotFound); r.State != Ignored || len(r.Findings) != 1 {
		t.Errorf("%+v", r)
	}
	if r := result(t, all, GuestAttributesOff); r.State != Ignored || r.Findings != nil {
		t.Errorf("%+v", r)
	}
	if r := result(t, all, EnvoyNotConfigured); r.State != Found || r.Findings[0].ExplainedBy != "" {
		t.Errorf("%+v", r)
	}
	f.Unseen = map[Source]string{FromMetadata: "no answer"}
	if r := result(t, Examine(f, GuestAttributesOff), GuestAttributesOff); r.State != Ignored {
		t.Errorf("%+v", r)
	}
}

// TestExamineBecause: with Envoy down, whoever reads it sees one cause and what could not be looked
// for because of it, and not a list of riddles.
func TestExamineBecause(t *testing.T) {
	f := live(func(f *Facts) {
		f.Envoy = Envoy{Admin: "127.0.0.1:15000", Err: envoyadmin.ErrRefused}
		f.Unseen = map[Source]string{FromEnvoy: "connection refused", FromClusters: "not asked",
			FromControlPlane: "not asked"}
	})
	all := Examine(f)
	if r := result(t, all, EnvoyDown); r.State != Found {
		t.Errorf("%+v", r)
	}
	for id, want := range map[ID]State{ListenerRejected: Unknown, EndpointsPanic: Unknown,
		ControlPlaneLookUp: Unknown, RulesDiffer: Unknown, ConntrackFull: OK, Bootstrap: OK,
		ClockWrong: OK, AttributeBad: OK, ForeignOwner: OK} {
		r := result(t, all, id)
		if r.State != want || (r.Because == EnvoyDown) != (want == Unknown) {
			t.Errorf("%s: %+v, want %s", id, r, want)
		}
	}
	// Two sources are away and only one of them because of that.
	f.Unseen[FromMetadata] = "no route to host"
	if r := result(t, Examine(f), EnvoyIdentity); r.State != Unknown || r.Because != "" ||
		!strings.Contains(r.Why, "connection refused") || !strings.Contains(r.Why, "no route") {
		t.Errorf("%+v", r)
	}
	for source, ids := range blinds {
		for _, id := range ids {
			kindOf(t, id)
		}
		if !slices.Contains(sources(t), source) {
			t.Errorf("%s is no source", source)
		}
	}
}

// TestExamineBootstrapping: what waits for bootstrap is not ok because nobody tells of it.
func TestExamineBootstrapping(t *testing.T) {
	f := live(func(f *Facts) { f.Envoy.Err, f.Bootstrapping = envoyadmin.ErrRefused, true })
	all := Examine(f)
	if r := result(t, all, EnvoyDown); r.State != Unknown ||
		!strings.HasPrefix(r.Why, "bootstrap is under way: Envoy is not running") {
		t.Errorf("%+v", r)
	}
	if r := result(t, all, ConntrackFull); r.State != OK {
		t.Errorf("%+v", r)
	}
}
