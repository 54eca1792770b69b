package symptom

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// noInjection are the kinds that no test of the lab, the box or a real kernel makes with real parts
// and names, and why.
var noInjection = map[ID]string{
	Starting:        "status answers so before the first pass: TestHealthzWithoutPass of package agent",
	CouldNotLook:    ofFacts,
	Shadowed:        "the row of Fight in the lab makes it, and looks at its words",
	ListenerSkipped: ofFacts,
}

// ofFacts: a line that a test on real parts makes stale; TestOrphans then asks to take it out.
const ofFacts = "of facts alone so far: the examples of this package and TestHealthzWalk of agent"

// noAlertHere are the errors without an alert; deploy/prometheus has the reasons.
var noAlertHere = []ID{Starting, RulesDiffer, AgentStuck}

// constants are the names of the IDs in symptom.go.
func constants(t *testing.T) map[string]ID {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "symptom.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]ID{}
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
			if kind, ok := v.Type.(*ast.Ident); ok && kind.Name == "ID" {
				text, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				all[v.Names[0].Name] = ID(text)
			}
		}
		return true
	})
	return all
}

// named calls found for each ID that a test's file says to be there: as an element of a table, in a
// comparison, or as an argument of what asks for findings. That one is not there is no injection,
// nor an ID in a list of what may come beside.
func named(file *ast.File, found func(constant string)) {
	constant := func(e ast.Expr) string {
		if s, ok := e.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "symptom" {
				return s.Sel.Name
			}
		}
		return ""
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.UnaryExpr:
			return n.Op != token.NOT
		case *ast.BinaryExpr:
			if n.Op == token.EQL {
				found(constant(n.X))
				found(constant(n.Y))
			}
		case *ast.CallExpr:
			switch name := n.Fun.(type) {
			case *ast.Ident:
				if name.Name == "hasFinding" || name.Name == "finding" {
					found(constant(n.Args[len(n.Args)-1]))
				}
			case *ast.SelectorExpr:
				for _, arg := range n.Args {
					if name.Sel.Name == "check" {
						found(constant(arg))
					}
				}
				found(constant(name.X)) // symptom.X.MessageID()
			}
		case *ast.CompositeLit:
			return row(n, constant, found)
		}
		return true
	})
}

func row(n *ast.CompositeLit, constant func(ast.Expr) string, found func(string)) (deeper bool) {
	switch n.Type.(type) {
	case *ast.ArrayType, *ast.MapType:
		return true // of rows, or a list of IDs
	}
	for _, e := range n.Elts {
		if kv, ok := e.(*ast.KeyValueExpr); ok {
			if key, ok := kv.Key.(*ast.Ident); !ok || key.Name != "id" {
				continue
			}
			e = kv.Value
		}
		found(constant(e))
	}
	return true
}

// injections are the IDs that tests on real parts name, and one file of each.
func injections(t *testing.T) map[ID]string {
	t.Helper()
	all, ids := map[ID]string{}, constants(t)
	files := 0
	for _, dir := range []string{"test/e2e", "test/box", "agent", "iptables", "envoyadmin"} {
		names, err := filepath.Glob("../../" + dir + "/*_test.go")
		if err != nil || len(names) == 0 {
			t.Fatalf("%s: %v %v", dir, names, err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if !regexp.MustCompile(`(?m)^//go:build .*\b(lab|box|kernel)\b`).Match(text) {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, text, 0)
			if err != nil {
				t.Fatal(err)
			}
			files++
			named(file, func(constant string) {
				if id, ok := ids[constant]; ok && all[id] == "" {
					all[id] = name
				}
			})
		}
	}
	if files < 20 || len(all) < 15 {
		t.Fatalf("%d files name %v", files, all)
	}
	return all
}

// TestOrphans: each kind is made by a test with real parts, and whoever meets it finds its series,
// its part of the document, its entry in the journal's catalog and, of an error, its alert.
func TestOrphans(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile("../../" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	doc, journal := read("docs/symptoms.md"), read("systemd/catalog/service-proxy-agent.catalog")
	series := read("internal/report/testdata/metrics.golden")
	alerts := read("deploy/prometheus/rules/service-proxy-agent.alerts.yml")
	injected := injections(t)
	for _, k := range Kinds() {
		reason := noInjection[k.ID]
		switch where := injected[k.ID]; {
		case where == "" && reason == "":
			t.Errorf("%s: no test makes it, and no line in noInjection says why", k.ID)
		case where != "" && reason != "":
			t.Errorf("%s: %s makes it: take its line out of noInjection", k.ID, where)
		}
		if !strings.Contains(doc, fmt.Sprintf("\n### `%s`\n", k.ID)) {
			t.Errorf("%s: docs/symptoms.md has no such heading", k.ID)
		}
		if !strings.Contains(journal, "\n-- "+k.ID.MessageID()+"\n") {
			t.Errorf("%s: the journal's catalog has no entry", k.ID)
		}
		for _, s := range k.Severities {
			one := fmt.Sprintf("service_proxy_agent_finding{id=%q,severity=%q}", k.ID, s)
			if !strings.Contains(series, "\n"+one+" ") {
				t.Errorf("%s: no series %s", k.ID, one)
			}
			if s != Error {
				continue
			}
			excused := false
			for _, id := range noAlertHere {
				excused = excused || id == k.ID
			}
			if has := strings.Contains(alerts, "expr: "+one+" > 0\n"); has == excused {
				t.Errorf("%s: it has an alert: %t; it is excused: %t", k.ID, has, excused)
			}
		}
	}
	for id := range noInjection {
		kindOf(t, id)
	}
	t.Logf("%d kinds, %d made by tests on real parts, %d excused", len(Kinds()), len(injected),
		len(noInjection))
}

// TestNamed: a test that only denies a finding does not count as making it.
func TestNamed(t *testing.T) {
	const source = `package e2e
func TestX(t *testing.T) {
	_ = !hasFinding(s, symptom.A) && hasFinding(s, symptom.B)
	_ = f.ID == symptom.C || string(symptom.D) == ""
	r.check(t, x, symptom.E, "")
	rows := []injection{{row: 1, id: symptom.F, beside: []symptom.ID{symptom.G}}}
	_ = []struct{ a string; id symptom.ID }{{"a", symptom.I}}
	_ = map[symptom.ID]string{symptom.J: "elsewhere"}
	metric(t, a, finding(symptom.K))
	_ = f.ID != symptom.L
}`
	file, err := parser.ParseFile(token.NewFileSet(), "x_test.go", source, 0)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	named(file, func(constant string) { have[constant] = true })
	for _, constant := range strings.Split("ABCDEFGIJKL", "") {
		if want := strings.Contains("BCEFIK", constant); have[constant] != want {
			t.Errorf("%s: %t, want %t", constant, have[constant], want)
		}
	}
}
