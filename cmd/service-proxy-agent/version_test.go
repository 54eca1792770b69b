package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

func TestVersionSchema(t *testing.T) { schema.Properties(t, "version", release{}) }

// TestVersion: the line, and the same as JSON with the modules of this binary, each with the sum
// that go.sum has.
func TestVersion(t *testing.T) {
	printed := func(args ...string) string {
		t.Helper()
		root := rootCommand()
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetArgs(append([]string{"version"}, args...))
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	want := fmt.Sprintf("service-proxy-agent dev (unknown) %s/%s %s\n", runtime.GOOS, runtime.GOARCH,
		runtime.Version())
	if have := printed(); have != want {
		t.Errorf("printed %q, want %q", have, want)
	}

	body := printed("-o", "json")
	schema.Valid(t, "version", []byte(body))
	var r release
	if err := json.Unmarshal([]byte(body), &r); err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile("../../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(sums), "\n")
	for _, m := range r.Modules {
		if line := m.Path + " " + m.Version + " " + m.Sum; !slices.Contains(lines, line) {
			t.Errorf("go.sum has no line %q", line)
		}
	}
	cobra := func(m module) bool { return m.Path == "github.com/spf13/cobra" }
	if !slices.ContainsFunc(r.Modules, cobra) {
		t.Errorf("cobra is not among the modules: %s", body)
	}
}

func TestLinkedReplaced(t *testing.T) {
	info := &debug.BuildInfo{Deps: []*debug.Module{
		{Path: "example.org/a", Version: "v1.0.0", Sum: "h1:a"},
		{Path: "example.org/b", Version: "v1.0.0",
			Replace: &debug.Module{Path: "example.org/fork", Version: "v1.0.1", Sum: "h1:fork"}},
		{Path: "example.org/c", Version: "v1.0.0", Replace: &debug.Module{Path: "../c"}},
	}}
	want := []module{{"example.org/a", "v1.0.0", "h1:a"}, {"example.org/fork", "v1.0.1", "h1:fork"},
		{"../c", "", ""}}
	if d := cmp.Diff(want, linked(info)); d != "" {
		t.Errorf("-want +have:\n%s", d)
	}
}
