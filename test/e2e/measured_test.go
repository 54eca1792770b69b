//go:build lab

package e2e

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// The block of docs/symptoms.md that the test writes.
const (
	symptomsPage  = "../../docs/symptoms.md"
	measuredBegin = "<!-- What was measured: written by TestSymptoms. -->\n"
	measuredEnd   = "<!-- End of what was measured. -->\n"
)

func sorted(rows []seen) []seen {
	rows = slices.Clone(rows)
	slices.SortStableFunc(rows, func(a, b seen) int {
		rank := func(s seen) int { return (s.row + 99) % 100 } // those without a number last
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.id, b.id), cmp.Compare(a.how, b.how))
	})
	return rows
}

// tabulate is the table for the test's output.
func tabulate(rows []seen) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "row\tid\twhat was done\tread in\tseconds\twords")
	for _, s := range sorted(rows) {
		took := "FAILED"
		if s.ok {
			took = fmt.Sprintf("%.1f", s.took.Seconds())
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%v\t%s\t%s\n", s.row, s.id, s.how, s.told, took, s.words)
	}
	w.Flush()
	return b.String()
}

// writeMeasured puts the table into docs/symptoms.md. A run in which one failed is no measurement.
func writeMeasured(rows []seen) error {
	for _, s := range rows {
		if !s.ok {
			return fmt.Errorf("row %d, %s: failed or not run, so nothing is recorded", s.row, s.id)
		}
	}
	page, err := os.ReadFile(symptomsPage)
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(measuredBegin)
	b.WriteString(`
Each was made with the real parts: Envoy, netfilter, a control plane, a metadata server. The seconds
are from then until the words were read from outside the VM, where they are told at all. Most of
them are Envoy's own time limits, and the budget of guest attributes, of which one is written each
20 seconds.

| row | id | what was done | read in | seconds | words |
|---|---|---|---|---|---|
`)
	cell := strings.NewReplacer("|", `\|`, "<", "&lt;", "\n", " ")
	for _, s := range sorted(rows) {
		row := fmt.Sprint(s.row)
		if s.row == 0 {
			row = "–"
		}
		id := "–" // an answer of explain
		if s.id != "" {
			id = fmt.Sprintf("[%s](#%[1]s)", s.id)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %v | %.1f | %s |\n", row, id, cell.Replace(s.how), s.told,
			s.took.Seconds(), cell.Replace(guestattr.OneLine(s.words, 400)))
	}
	b.WriteString("\n" + measuredEnd)
	text := string(page)
	begin, end := strings.Index(text, measuredBegin), strings.Index(text, measuredEnd)
	if begin < 0 || end < begin {
		text += "\n## What was measured\n\n" + b.String()
	} else {
		text = text[:begin] + b.String() + text[end+len(measuredEnd):]
	}
	return os.WriteFile(symptomsPage, []byte(text), 0o644)
}

// TestEachSymptomIsInjected: each kind of finding and each row is injected, or it is said where it
// is, or why not.
func TestEachSymptomIsInjected(t *testing.T) {
	ids, rows := map[symptom.ID]bool{}, map[int]bool{}
	for _, s := range situations {
		for _, i := range s.injections {
			ids[i.id], rows[i.row] = true, true
		}
	}
	for _, k := range symptom.Kinds() {
		why, told := elsewhere[k.ID]
		switch {
		case ids[k.ID] && told:
			t.Errorf("%s is injected, and elsewhere it says: %s", k.ID, why)
		case !ids[k.ID] && !told:
			t.Errorf("%s is not injected", k.ID)
		}
	}
	for row := 1; row <= 42; row++ {
		why, told := otherRows[row]
		switch {
		case rows[row] && told:
			t.Errorf("row %d is injected, and elsewhere it says: %s", row, why)
		case !rows[row] && !told:
			t.Errorf("row %d is not injected", row)
		}
	}
}
