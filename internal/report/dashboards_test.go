package report

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// dashboard is what of Grafana's format is held here.
type dashboard struct {
	UID, Title string
	Panels     []struct {
		Type, Title, Description string
		Datasource               struct{ UID string }
		FieldConfig              struct{ Defaults struct{ Unit string } }
		Targets                  []struct {
			Datasource struct{ UID string }
			Expr       string
		}
	}
	Templating struct {
		List []struct{ Name, Type, Definition string }
	}
	Annotations struct{ List []struct{ Expr string } }
}

// TestDashboards: each panel of deploy/grafana has a title, a description, a unit and the data
// source that is chosen, and each query names metrics, labels and values that /metrics has.
// (test/grafana holds the dashboards to Grafana's schema, and evaluates the queries.)
func TestDashboards(t *testing.T) {
	golden, err := os.ReadFile("testdata/metrics.golden")
	if err != nil {
		t.Fatal(err)
	}
	known := samplesOf(string(golden))
	files, err := filepath.Glob("../../deploy/grafana/*.json")
	if err != nil || len(files) != 2 {
		t.Fatalf("dashboards: %v, %v", files, err)
	}
	queried := map[string]bool{}
	see := func(name, where, expr string) {
		for _, wrong := range known.check(expr, queried) {
			t.Errorf("%s: %s: %s in %s", name, where, wrong, expr)
		}
	}
	for _, file := range files {
		name := filepath.Base(file)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, p := range d.Panels {
			if p.Type == "row" {
				continue
			}
			if p.Title == "" || p.Description == "" || p.FieldConfig.Defaults.Unit == "" ||
				len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" {
				t.Errorf("%s: %q has no title, description, unit, query or data source", name, p.Title)
			}
			for _, q := range p.Targets {
				if q.Datasource.UID != "${datasource}" {
					t.Errorf("%s: %s: data source %q", name, p.Title, q.Datasource.UID)
				}
				see(name, p.Title, q.Expr)
			}
		}
		for _, a := range d.Annotations.List {
			see(name, "annotations", a.Expr)
		}
		for _, v := range d.Templating.List {
			_, query, _ := strings.Cut(v.Definition, "label_values(")
			see(name, "variable "+v.Name, strings.TrimSuffix(query, ", "+v.Name+")"))
		}
	}
	for _, metric := range slices.Sorted(maps.Keys(known)) {
		base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(metric, "")
		if !queried[metric] && !queried[base+"_bucket"] {
			t.Errorf("no panel shows %s", metric)
		}
	}
}

// metrics are the label values that a scrape has, by metric and label.
type metrics map[string]map[string][]string

var pair = regexp.MustCompile(`([a-z_]+)(=~|=|!=)"([^"]*)"`)

func samplesOf(text string) metrics {
	all := metrics{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		name := regexp.MustCompile(`^[a-z0-9_]+`).FindString(line)
		if all[name] == nil {
			all[name] = map[string][]string{}
		}
		for _, m := range pair.FindAllStringSubmatch(line, -1) {
			all[name][m[1]] = append(all[name][m[1]], m[3])
		}
	}
	return all
}

// What Prometheus adds to a sample, and labels that queries make themselves.
var added = []string{"job", "instance", "project", "zone", "instance_group"}

// A query's parts: a metric with its labels, and a list of labels.
var (
	selector = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}`)
	grouping = regexp.MustCompile(` ?\b(by|on|ignoring|without) ?\(([^)]*)\) ?`)
	word     = regexp.MustCompile(`[a-zA-Z_][a-zA-Z0-9_:]*(\()?`)
)

// check returns what a query names that is not there, and notes the metrics that it asks for. It
// knows PromQL as far as the dashboards use it: each metric has its labels in braces.
func (known metrics) check(expr string, queried map[string]bool) (wrong []string) {
	labels := slices.Clone(added)
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		name := m[1]
		queried[name] = true
		of, there := known[name]
		foreign := name == "up" || name == "ALERTS" || strings.HasPrefix(name, "go_") ||
			strings.HasPrefix(name, "process_")
		if !there && !foreign {
			wrong = append(wrong, "no metric "+name)
		}
		if foreign && name != "ALERTS" && !strings.Contains(m[2], `job="service-proxy-agent"`) {
			wrong = append(wrong, name+" of all jobs")
		}
		labels = append(labels, slices.Collect(maps.Keys(of))...)
		for _, p := range pair.FindAllStringSubmatch(m[2], -1) {
			if foreign || slices.Contains(added, p[1]) {
				continue
			}
			pattern := regexp.MustCompile("^(" + p[3] + ")$")
			if !slices.ContainsFunc(of[p[1]], pattern.MatchString) {
				wrong = append(wrong, "no "+p[0]+" of "+name)
			}
		}
	}
	for _, m := range grouping.FindAllStringSubmatch(expr, -1) {
		for _, label := range strings.Fields(strings.ReplaceAll(m[2], ",", " ")) {
			if !slices.Contains(labels, label) {
				wrong = append(wrong, "no label "+label)
			}
		}
	}
	rest := selector.ReplaceAllString(expr, "")
	rest = grouping.ReplaceAllString(rest, "")
	rest = regexp.MustCompile(`"[^"]*"|\[[^\]]*\]`).ReplaceAllString(rest, "")
	for _, w := range word.FindAllString(rest, -1) {
		if !strings.HasSuffix(w, "(") && !slices.Contains([]string{"bool", "or", "and", "e"}, w) {
			wrong = append(wrong, "no labels in braces behind "+w)
		}
	}
	return wrong
}

// TestDashboardsSee plants mistakes.
func TestDashboardsSee(t *testing.T) {
	known := samplesOf("a{family=\"IPv4\"} 1\nb_bucket{le=\"1\"} 0\n")
	for expr, want := range map[string]string{
		`sum by (zone, family) (a{zone=~"$zone"} > bool 0) or vector(0)`: "",
		`rate(b_bucket{le=~"1|1.0"}[$__rate_interval]) / 1e-9`:           "",
		`up{job="service-proxy-agent"}`:                                  "",
		`c{zone="x"}`:                                                    "no metric c",
		`a{family="IPv6"}`:                                               `no family="IPv6" of a`,
		`a{le="1"}`:                                                      `no le="1" of a`,
		`sum by (le) (a{zone="x"})`:                                      "no label le",
		`sum(a)`:                                                         "no labels in braces behind a",
		`go_goroutines{zone="x"}`:                                        "go_goroutines of all jobs",
	} {
		if got := strings.Join(known.check(expr, map[string]bool{}), "; "); got != want {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}
