//go:build vm

package vm

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/vm/seen"
)

var update = flag.Bool("update", false, "write what was seen to testdata")

// keep compares what was seen with the kernel's file in testdata, or writes it there, beside what
// is there of steps that did not run. Which rule the kernel refuses first, and in which words,
// differs from run to run: those are written and not compared.
func keep(t *testing.T, have seen.Kernel) {
	t.Helper()
	path := filepath.Join("testdata", have.Release+"-"+have.Backend+"-"+have.Arch+".json")
	var kept seen.Kernel
	text, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(text, &kept); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	case !*update:
		t.Fatalf("%v (-update writes it)", err)
	}
	if *update {
		text, err := json.MarshalIndent(beside(have, kept), "", " ")
		if err == nil {
			err = os.WriteFile(path, append(text, '\n'), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(essence(beside(kept, kept)), essence(beside(have, kept))); diff != "" {
		t.Errorf("another than in %s (-want +have; -update writes it):\n%s", path, diff)
	}
}

// beside is what was seen, with what was kept of the rest.
func beside(have, kept seen.Kernel) seen.Kernel {
	rows := slices.Clone(have.Absent)
	for _, row := range kept.Absent {
		if !slices.ContainsFunc(rows, func(r seen.Absent) bool { return r.Module == row.Module }) {
			rows = append(rows, row)
		}
	}
	slices.SortFunc(rows, func(a, b seen.Absent) int { return strings.Compare(a.Module, b.Module) })
	have.Absent = rows
	for _, of := range []struct{ have, kept *[]seen.Finding }{
		{&have.Ahead, &kept.Ahead}, {&have.Behind, &kept.Behind}, {&have.Conntrack, &kept.Conntrack}} {
		if *of.have == nil {
			*of.have = *of.kept
		}
	}
	return have
}

// essence is a line for each thing that must be the same in each run.
func essence(k seen.Kernel) (lines []string) {
	findings := func(what string, all []seen.Finding) {
		for _, f := range all {
			lines = append(lines, fmt.Sprintf("%s: %s %s under %q", what, f.Severity, f.ID, f.Under))
		}
	}
	for _, row := range k.Absent {
		lines = append(lines, fmt.Sprintf("%s: IPv4 %v, IPv6 %v, doctor %d, mended %q", row.Module, row.IPv4,
			row.IPv6, row.Doctor, row.Mended))
		findings(row.Module, row.Findings)
	}
	findings("ahead", k.Ahead)
	findings("behind", k.Behind)
	findings("conntrack", k.Conntrack)
	return append(lines, k.Release+" "+k.Backend+" "+k.Arch+" "+k.Kernel)
}

var (
	lasting   = regexp.MustCompile(` \((warning; )?since [^()]*\)(; before that: .*)?$`)
	kernel    = regexp.MustCompile(`\d+\.\d+\.\d+[-+][-+.~\w]*-(cloud-)?(amd64|arm64)`)
	majority  = regexp.MustCompile(`^\d+\.\d+`)
	processes = regexp.MustCompile(`pid \d+`)
)

// lastFailure is the guest attribute without its times.
func lastFailure(text string) string { return plain(lasting.ReplaceAllString(text, "")) }

// plain is a text without what another build of the same kernel changes.
func plain(text string) string {
	text = kernel.ReplaceAllString(strings.TrimSpace(text), "RELEASE")
	return processes.ReplaceAllString(text, "pid N")
}

func said(findings []symptom.Finding) (out []seen.Finding) {
	for _, f := range findings {
		if f.Severity == symptom.Advice {
			continue
		}
		s := seen.Finding{ID: string(f.ID), Severity: f.Severity.String(), Cause: plain(f.Cause),
			Next: plain(f.Next)}
		for _, c := range f.Commands {
			s.Commands = append(s.Commands, plain(c))
		}
		if f.ExplainedBy != "" {
			s.Under = string(f.ExplainedBy)
		}
		out = append(out, s)
	}
	return out
}

var figures = regexp.MustCompile(`\b\d{1,6}\b`)

// counted has N for every count.
func counted(all []seen.Finding) []seen.Finding {
	for i := range all {
		all[i].Cause, all[i].Commands = figures.ReplaceAllString(all[i].Cause, "N"), nil
	}
	return all
}
