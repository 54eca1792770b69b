package grafana

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	sdk "github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/prometheus/prometheus/promql"
)

var placeholder = regexp.MustCompile(`{{ *([a-z_]+) *}}`)

// TestHealthy: on a VM on which services come and go and a rule is put back, each query gives data,
// each name of a legend is a label, and each exception for a series or a column meets one.
func TestHealthy(t *testing.T) {
	healthy := recording(t, "healthy.prom")
	for _, wholes := range []bool{true, false} {
		p := scraped(t, wholes, map[string][]scrape{"web-1": healthy, "web-2": healthy})
		for _, name := range names {
			for _, panel := range panels(load(t, name)) {
				title, shown := name+": "+*panel.Title, map[string]bool{}
				for _, q := range queries(t, panel) {
					m := p.ask(q, "web-1", 4)
					if len(numbers(m, time.Time{})) == 0 {
						t.Errorf("%s: no data: %s", title, q.Expr)
					}
					for _, s := range m {
						shown[legend(t, title, *q.LegendFormat, s)] = true
						for _, column := range columns(s) {
							shown[column] = true
						}
					}
				}
				for _, o := range panel.FieldConfig.Overrides {
					if !matches(o.Matcher, shown) {
						t.Errorf("%s: an exception for %v, which is none of %v", title,
							o.Matcher.Options, slices.Sorted(maps.Keys(shown)))
					}
				}
			}
		}
	}
}

// legend is what Grafana writes for a series.
func legend(t *testing.T, title, format string, s promql.Series) string {
	t.Helper()
	return placeholder.ReplaceAllStringFunc(format, func(m string) string {
		label := placeholder.FindStringSubmatch(m)[1]
		if !s.Metric.Has(label) {
			t.Errorf("%s: the legend names %q, which %v has not", title, label, s.Metric)
		}
		return s.Metric.Get(label)
	})
}

// columns are those of a table with this series.
func columns(s promql.Series) (all []string) {
	for name := range s.Metric.Map() {
		all = append(all, name)
	}
	return append(all, "Value", "Time")
}

func matches(m sdk.MatcherConfig, shown map[string]bool) bool {
	options, ok := m.Options.(string)
	if m.Id == "byName" {
		return ok && shown[options]
	}
	pattern := regexp.MustCompile("^(" + options + ")$")
	for s := range shown {
		if pattern.MatchString(s) {
			return m.Id == "byRegexp"
		}
	}
	return false
}

// TestQuiet: an hour after the last change each panel still shows something, and those of errors
// say that a healthy VM has none, and show none.
func TestQuiet(t *testing.T) {
	healthy := recording(t, "healthy.prom")
	hour := quiet(healthy[len(healthy)-1])
	p := scraped(t, false, map[string][]scrape{"web-1": hour, "web-2": hour})
	errors := 0
	for _, name := range names {
		for _, panel := range panels(load(t, name)) {
			var all []float64
			for _, q := range queries(t, panel) {
				all = append(all, numbers(p.ask(q, "web-1", 30), end)...)
			}
			if len(all) == 0 {
				t.Errorf("%s: %s: shows nothing", name, *panel.Title)
			}
			if !ofErrors(panel) {
				continue
			}
			errors++
			for _, v := range all {
				if v != 0 {
					t.Errorf("%s: %s: shows %v", name, *panel.Title, v)
				}
			}
		}
	}
	if errors < 18 {
		t.Errorf("only %d panels of errors", errors)
	}
}

var errorsOnly = regexp.MustCompile(`errors only|none:|\(.*0:`)

// ofErrors says whether a panel tells that it is for errors only.
func ofErrors(p sdk.Panel) bool {
	return errorsOnly.MatchString(*p.Title) || strings.Contains(*p.Description, "Only errors")
}

// TestVariables: each variable has values to choose from.
func TestVariables(t *testing.T) {
	p := scraped(t, false, map[string][]scrape{"web-1": recording(t, "healthy.prom")})
	values := regexp.MustCompile(`^label_values\((.*), ([a-z_]+)\)$`)
	for _, name := range names {
		for _, v := range load(t, name).Templating.List {
			if v.Type != sdk.VariableTypeQuery {
				continue
			}
			m := values.FindStringSubmatch(*v.Definition)
			if m == nil || m[2] != v.Name || v.Query.Map["query"] != *v.Definition {
				t.Errorf("%s: %s: %s", name, v.Name, *v.Definition)
				continue
			}
			series := p.between(fill(m[1], "web-1"), end)
			if len(series) != 1 || series[0].Metric.Get(m[2]) == "" {
				t.Errorf("%s: %s: no value in %v", name, v.Name, series)
			}
		}
	}
}

// TestUnhealthy: what is wrong with a fleet in which Envoy is down on one VM and another gives no
// answer can be seen.
func TestUnhealthy(t *testing.T) {
	prom := scraped(t, false, map[string][]scrape{
		"web-1": recording(t, "healthy.prom"), "web-2": recording(t, "envoy-down.prom"),
		"web-3": absent(),
	})
	for name, shown := range map[string][][2]string{
		"fleet.json": {
			{"VMs", "= 3"},
			{"Ready", "= 1"},
			{"Not ready", "= 1"},
			{"Not answering", "= 1"},
			{"VMs with an error", "= 1"},
			{"VMs by readiness", "not answering = 1"},
			{"VMs to look at", `{id="envoy-down", instance="web-2"} = 1`},
			{"VMs to look at", `{id="agent-absent", instance="web-3"} = 0`},
			{"Findings by ID", "envoy-down (error) = 1"},
			{"Findings over time", "envoy-down (error) = 1"},
			{"State of Envoy", "UNREACHABLE = 1"},
			{"Stream to the control plane", "connected = 1"},
		},
		"vm.json": {
			{"Ready", "= 0"},
			{"Envoy", "= 5"},
			{"Errors", "= 1"},
			{"Findings that stand", `{id="envoy-down", instance="web-2"} = 1`},
			{"Findings over time", "envoy-down (error) = 1"},
			{"State", "ready = 1"},
			{"State", "Envoy = 5"},
		},
	} {
		d := load(t, name)
		for _, want := range shown {
			panel, line := want[0], want[1]
			var all []string
			for _, p := range panels(d) {
				if title, _, _ := strings.Cut(*p.Title, " ("); title == panel {
					all = append(all, lines(t, prom, p, "web-2")...)
				}
			}
			if !slices.Contains(all, line) {
				t.Errorf("%s: %s: no %q in\n%s", name, panel, line, strings.Join(all, "\n"))
			}
		}
	}
	// Of a VM that says nothing nobody knows that nothing is wrong.
	for _, p := range panels(load(t, "vm.json")) {
		if all := lines(t, prom, p, "web-3"); strings.HasPrefix(*p.Title, "Finding") && all != nil {
			t.Errorf("vm.json: %s: of a VM without an answer: %v", *p.Title, all)
		}
	}
}

// lines are what a panel shows at the end: legend and value, or which VM and finding.
func lines(t *testing.T, prom prometheus, p sdk.Panel, vm string) (all []string) {
	t.Helper()
	for _, q := range queries(t, p) {
		for _, s := range prom.ask(q, vm, 1) {
			name := legend(t, *p.Title, *q.LegendFormat, s)
			if name == "__auto" {
				name = ""
			}
			if p.Type == "table" {
				name = s.Metric.MatchLabels(true, "id", "instance").String()
			}
			if last := s.Floats[len(s.Floats)-1]; last.T == end.UnixMilli() {
				all = append(all, strings.TrimSpace(fmt.Sprintf("%s = %v", name, last.F)))
			}
		}
	}
	return all
}
