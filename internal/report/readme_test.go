package report

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestReadmeTable: the words and the metrics of the README's table are the program's.
// docs/symptoms.md is made of its words, and metrics.golden of its metrics.
func TestReadmeTable(t *testing.T) {
	read := func(path string) string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	_, table, found := strings.Cut(read("../../README.md"), "\n## When things go wrong\n")
	if !found {
		t.Fatal("the README has no table")
	}
	table, _, _ = strings.Cut(table, "\n## ")
	symptoms, metrics := read("../../docs/symptoms.md"), read("testdata/metrics.golden")
	quoted := regexp.MustCompile("`([^`]+)`")
	words, series := 0, 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 7 || strings.HasPrefix(line, "|-") ||
			strings.HasPrefix(cells[1], " what fails") {
			continue
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[3], -1) {
			if !strings.Contains(m[1], " ") { // the name of a place where it is read
				continue
			}
			words++
			text := strings.ReplaceAll(regexp.QuoteMeta(strings.Trim(m[1], "… ")), "…", "[^|]*")
			if !regexp.MustCompile(`\| ` + text).MatchString(symptoms) {
				t.Errorf("%s: docs/symptoms.md has no %q", cells[1], m[1])
			}
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[4], -1) {
			series++
			name, labels, _ := strings.Cut(m[1], "{")
			if id := regexp.MustCompile(`^id="([^"]+)"}$`).FindStringSubmatch(labels); id != nil {
				name = id[1]
			}
			if !strings.Contains(metrics, "\n# HELP "+Prefix+name+" ") &&
				!strings.Contains(symptoms, "\n### `"+name+"`\n") {
				t.Errorf("%s: neither a metric nor the ID of a finding: %q", cells[1], m[1])
			}
		}
	}
	if words < 10 || series < 18 {
		t.Errorf("only %d words and %d series in the table", words, series)
	}
}
