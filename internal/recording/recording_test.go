package recording

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

type holder struct {
	Err   error
	Two   [2]error
	Left  []iptables.RefusedError
	Took  time.Duration
	When  time.Time
	To    netip.Prefix
	Other *holder
}

func roundTrip(t *testing.T, in holder) (out holder) {
	t.Helper()
	data, err := Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmarshal(data, &out); err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
	return out
}

func TestErrorsStayWhatTheyAre(t *testing.T) {
	for name, sentinel := range sentinels {
		got := roundTrip(t, holder{Err: fmt.Errorf("look at %q: %w", "x", sentinel)})
		if want := "look at \"x\": " + sentinel.Error(); got.Err.Error() != want {
			t.Errorf("%s: its text is %q, want %q", name, got.Err, want)
		}
		for other, is := range sentinels {
			if errors.Is(got.Err, is) != (other == name) {
				t.Errorf("%s: errors.Is says %t of %s", name, other != name, other)
			}
		}
	}
	// By a method Is, not by what it wraps.
	forbidden := roundTrip(t, holder{Err: &envoyadmin.StatusError{Code: 403}})
	if !errors.Is(forbidden.Err, envoyadmin.ErrForbiddenPath) {
		t.Error("status 403 is not ErrForbiddenPath any more")
	}
	failed := &envoyadmin.ProbeError{Step: envoyadmin.ErrTLS, Target: "td:443", Err: errors.New("bad")}
	got := roundTrip(t, holder{Err: failed})
	var probe *envoyadmin.ProbeError
	if !errors.As(got.Err, &probe) || probe.Target != "td:443" || !errors.Is(got.Err, envoyadmin.ErrTLS) ||
		got.Err.Error() != failed.Error() {
		t.Errorf("a ProbeError became %v, %+v", got.Err, probe)
	}
	theirs := &sockdiag.ForeignError{Addr: netip.MustParseAddrPort("[::1]:15000"), UID: 4711}
	got = roundTrip(t, holder{Err: fmt.Errorf("trust: %w", theirs)})
	var foreign *sockdiag.ForeignError
	if !errors.As(got.Err, &foreign) || *foreign != *theirs {
		t.Errorf("a ForeignError became %v, %+v", got.Err, foreign)
	}
}

func TestValuesStayWhatTheyAre(t *testing.T) {
	want := holder{
		Two:  [2]error{nil, errors.New("\x1b[31mred \xff")},
		Left: []iptables.RefusedError{{Family: iptables.IPv6, Line: 3, Rule: "-A X", Stderr: "no"}},
		Took: 1500 * time.Millisecond, When: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
		To: netip.MustParsePrefix("10.0.0.0/8"), Other: &holder{},
	}
	got := roundTrip(t, want)
	if got.Two[0] != nil || got.Two[1] == nil || got.Two[1].Error() != "\x1b[31mred \uFFFD" {
		t.Errorf("the errors are %q", got.Two)
	}
	want.Two, got.Two = [2]error{}, [2]error{}
	same := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := cmp.Diff(want, got, same); diff != "" {
		t.Error(diff)
	}
}

// TestNewerErrors: an older program reads what a newer one has written.
func TestNewerErrors(t *testing.T) {
	var got holder
	const data = `{"Err":{"text":"x","is":["iptables.ErrNew","iptables.ErrLocked"],"new":{"a":[1]}},"New":{}}`
	if err := Unmarshal([]byte(data), &got); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(got.Err, iptables.ErrLocked) || got.Err.Error() != "x" {
		t.Errorf("the error is %v", got.Err)
	}
}

func TestFields(t *testing.T) {
	type inner struct {
		B      int
		hidden int
	}
	type embedded struct{ C map[string][]*inner }
	type outer struct {
		A inner
		embedded
	}
	_ = inner{}.hidden
	want := []string{"A", "A.B", "C", "C.B"}
	if got := Fields(reflect.TypeFor[outer]()); !slices.Equal(got, want) {
		t.Errorf("the fields are %q, want %q", got, want)
	}
}

// pure are the packages that judge what is recorded.
var pure = []string{"../symptom", "../explain", "../doctor"}

// TestEachErrorThatIsAskedForReplays finds in the source of what judges each errors.Is and
// errors.As: what they ask for must be in the table, or a recorded error would be another one.
func TestEachErrorThatIsAskedForReplays(t *testing.T) {
	asked := 0
	for _, dir := range pure {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no source in %s: %v", dir, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			for _, one := range errorsAsked(t, name) {
				asked++
				if !replays(one) {
					t.Errorf("%s asks an error for %s, which a recording does not keep", name, one)
				}
			}
		}
	}
	if asked < 10 {
		t.Errorf("found %d questions to errors; does the test still see them?", asked)
	}
}

func replays(one string) bool {
	_, sentinel := sentinels[one]
	return sentinel || one == "*envoyadmin.ProbeError" || one == "*sockdiag.ForeignError"
}

// errorsAsked are what a file asks errors for: "package.Name" of errors.Is, "*package.Type" of
// errors.As. A type switch, or a comparison, of errors is none that could be recorded.
func errorsAsked(t *testing.T, name string) (all []string) {
	t.Helper()
	files := token.NewFileSet()
	source, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(files, name, source, 0)
	if err != nil {
		t.Fatal(err)
	}
	text := func(n ast.Node) string {
		return string(source[files.Position(n.Pos()).Offset:files.Position(n.End()).Offset])
	}
	types := map[string]string{} // of variables, by name
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for _, v := range n.Names {
				if n.Type != nil {
					types[v.Name] = text(n.Type)
				}
			}
		case *ast.TypeAssertExpr:
			if strings.HasSuffix(strings.ToLower(text(n.X)), "err") {
				all = append(all, "type assertion of "+text(n.X))
			}
		case *ast.CallExpr:
			switch text(n.Fun) {
			case "errors.Is":
				all = append(all, text(n.Args[1]))
			case "errors.As":
				all = append(all, types[strings.TrimPrefix(text(n.Args[1]), "&")])
			case "errors.AsType", "errors.Unwrap":
				all = append(all, text(n))
			}
		}
		return true
	})
	return all
}

// TestMemory: a text that would become much more in memory is refused, whatever it is made of.
func TestMemory(t *testing.T) {
	list := func(n int, one string) []byte {
		return []byte("[" + strings.Repeat(one+",", n) + one + "]")
	}
	for _, one := range []string{"{}", "null", `{"Other":{}}`} {
		var out []holder
		if err := Unmarshal(list(100_000, one), &out); err == nil {
			t.Errorf("%d times %s is taken", len(out), one)
		}
	}
	written, err := Marshal(holder{Other: &holder{}})
	if err != nil {
		t.Fatal(err)
	}
	var out []holder
	if err := Unmarshal(list(10_000, string(written)), &out); err != nil {
		t.Errorf("what is as long as Marshal writes it: %v", err)
	}
}

// TestTimes: what is read can be written.
func TestTimes(t *testing.T) {
	for text, ok := range map[string]bool{`"2026-11-29T05:00:00.5+01:00"`: true, "null": true,
		`"0001-01-01T00:00:00Z"`: true, `"9999-12-31T23:59:59-23:59"`: false,
		`"0000-01-01T00:00:00+23:59"`: false, `"9999999-01-01T00:00:00Z"`: false, "5": false} {
		var out holder
		err := Unmarshal([]byte(`{"When":`+text+`}`), &out)
		if (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
		if err == nil {
			roundTrip(t, out)
		}
	}
}

// TestRareMatch: what few chains want is in JSON where it was when it was the chain's own, which
// older recordings have.
func TestRareMatch(t *testing.T) {
	older := `{"Name":"a","ServerNames":["a.test"],"TransportProtocol":"tls",` +
		`"ApplicationProtocols":null,"Source":{"Ports":[7]}}`
	want := envoyadmin.FilterChain{Name: "a", Rare: &envoyadmin.RareMatch{
		ServerNames: []string{"a.test"}, TransportProtocol: "tls",
		Source: &envoyadmin.SourceMatch{Ports: []uint16{7}}}}
	var got, again envoyadmin.FilterChain
	if err := Unmarshal([]byte(older), &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	text, err := Marshal(got)
	if err != nil || !strings.Contains(string(text), `"ServerNames"`) ||
		strings.Contains(string(text), `"Rare"`) {
		t.Errorf("%s, %v", text, err)
	}
	if err := Unmarshal(text, &again); err != nil || !reflect.DeepEqual(again, want) {
		t.Errorf("%+v, %v", again, err)
	}
}
