// Package prometheus holds what is deployed beside the agent against the agent: each name in a rule
// is a metric of it, each alert leads to a part of docs/symptoms.md, and each is seen firing and
// resolving by promtool (test/alerts.sh runs that).
package prometheus

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

const (
	page = symptom.DocsURL + "symptoms.md#"
	// who is where the summary of an alert begins.
	who = "{{ $labels.instance }}: "
)

// noAlert is each kind of error that has no alert of its own, and why.
var noAlert = map[symptom.ID]string{
	symptom.Starting: "no pass finds it: status says it before the first one, and so no series is 1",
	symptom.RulesDiffer: "doctor finds it where no agent runs, which has no series then: " +
		"ServiceProxyAgentAbsent tells",
	symptom.AgentStuck: "an agent that is stuck makes no pass that could find it: " +
		"ServiceProxyAgentHeartbeatStale tells",
}

// fromElsewhere are metrics that are not in the golden scrape: Prometheus makes up, and the process
// collector's are left out there, for they change. test/e2e looks for them in a live scrape.
var fromElsewhere = []string{"up", "process_start_time_seconds"}

type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

// unit is a test of promtool's.
type unit struct {
	Name, Interval string
	InputSeries    []struct{ Series, Values string } `yaml:"input_series"`
	AlertRuleTest  []struct {
		EvalTime  string `yaml:"eval_time"`
		Alertname string
		ExpAlerts []struct {
			ExpLabels      map[string]string `yaml:"exp_labels"`
			ExpAnnotations map[string]string `yaml:"exp_annotations"`
		} `yaml:"exp_alerts"`
	} `yaml:"alert_rule_test"`
	PromqlExprTest []struct {
		Expr       string
		EvalTime   string `yaml:"eval_time"`
		ExpSamples []struct {
			Labels string
			Value  float64
		} `yaml:"exp_samples"`
	} `yaml:"promql_expr_test"`
}

// read decodes a file strictly: a field that nobody knows is a mistake.
func read(t *testing.T, name string, into any) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %q %v", pattern, names, err)
	}
	return names
}

// rules are all rules, alerts and records, by name.
func rules(t *testing.T) (alerts, records map[string]rule) {
	t.Helper()
	alerts, records = map[string]rule{}, map[string]rule{}
	for _, name := range glob(t, "rules/*.yml") {
		var file struct {
			Groups []struct {
				Name, Interval string
				Rules          []rule
			}
		}
		read(t, name, &file)
		for _, g := range file.Groups {
			for _, r := range g.Rules {
				of, key := alerts, r.Alert
				if r.Record != "" {
					of, key = records, r.Record
				}
				if _, twice := of[key]; twice {
					t.Errorf("%s is there twice", key)
				}
				of[key] = r
			}
		}
	}
	return alerts, records
}

func units(t *testing.T) (all []unit) {
	t.Helper()
	for _, name := range glob(t, "tests/*.yml") {
		var file struct {
			RuleFiles          []string `yaml:"rule_files"`
			EvaluationInterval string   `yaml:"evaluation_interval"`
			GroupEvalOrder     []string `yaml:"group_eval_order"`
			Tests              []unit
		}
		read(t, name, &file)
		if len(file.RuleFiles) != len(glob(t, "rules/*.yml")) {
			t.Errorf("%s does not take all rules: an alert might fire beside the one it tests", name)
		}
		all = append(all, file.Tests...)
	}
	return all
}

// anchors are those that GitHub gives the headings of docs/symptoms.md.
func anchors(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../../docs/symptoms.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(string(text), -1) {
		anchor := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		anchor = strings.ReplaceAll(anchor, " ", "-")
		if all[anchor] {
			t.Errorf("docs/symptoms.md has two headings with the anchor %s", anchor)
		}
		all[anchor] = true
	}
	return all
}

// TestAlerts: who is woken up reads which VM, what is wrong, what to do, and where it says more.
func TestAlerts(t *testing.T) {
	alerts, _ := rules(t)
	there := anchors(t)
	for name, a := range alerts {
		if !regexp.MustCompile(`^ServiceProxy[A-Z]\w+$`).MatchString(name) {
			t.Errorf("%s: a name among all the alerts of a company", name)
		}
		if s := a.Labels["severity"]; len(a.Labels) != 1 || s != "critical" && s != "warning" {
			t.Errorf("%s: labels %v", name, a.Labels)
		}
		if len(a.Annotations) != 3 {
			t.Errorf("%s: annotations %v", name, a.Annotations)
		}
		summary, next := a.Annotations["summary"], a.Annotations["description"]
		if !strings.HasPrefix(summary, who) || len(summary) < len(who)+10 {
			t.Errorf("%s: its summary does not say which VM, or what: %q", name, summary)
		}
		if len(next) < 60 || !strings.HasSuffix(next, ".") {
			t.Errorf("%s: its description has no next step: %q", name, next)
		}
		anchor, ok := strings.CutPrefix(a.Annotations["runbook_url"], page)
		if !ok || !there[anchor] {
			t.Errorf("%s: docs/symptoms.md has no anchor %q", name, a.Annotations["runbook_url"])
		}
	}
}

// TestEveryError: each error that the agent can find has its alert, with its own words, or stands
// in noAlert.
func TestEveryError(t *testing.T) {
	alerts, _ := rules(t)
	of := map[string]rule{}
	for _, a := range alerts {
		of[a.Expr] = a
	}
	for _, k := range symptom.Kinds() {
		a, has := of[fmt.Sprintf(`service_proxy_agent_finding{id=%q,severity="error"} > 0`, k.ID)]
		switch {
		case slices.Contains(k.Severities, symptom.Error) == (has || noAlert[k.ID] != ""):
		case has:
			t.Errorf("%s is no error and has an alert", k.ID)
		default:
			t.Errorf("%s has neither an alert nor a reason why not", k.ID)
		}
		if !has {
			continue
		}
		if noAlert[k.ID] != "" {
			t.Errorf("%s has an alert, and a reason why not", k.ID)
		}
		if got := a.Annotations["summary"]; got != who+k.Title {
			t.Errorf("%s: summary %q, want its title %q", k.ID, got, k.Title)
		}
		if got := a.Annotations["runbook_url"]; got != page+string(k.ID) {
			t.Errorf("%s: runbook_url %q", k.ID, got)
		}
		if a.For == "" {
			t.Errorf("%s: a finding that one pass makes and the next mends would call somebody", k.ID)
		}
	}
}

// TestTested: as many alerts fire in promtool's tests, and resolve in them, as there are.
func TestTested(t *testing.T) {
	alerts, records := rules(t)
	fired, resolved := map[string]bool{}, map[string]bool{}
	samples := map[string][]string{}
	at := func(s string) time.Duration {
		d, err := model.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(d)
	}
	for _, u := range units(t) {
		since := map[string]time.Duration{}
		for _, c := range u.AlertRuleTest {
			if _, known := alerts[c.Alertname]; !known {
				t.Errorf("%s: there is no alert %s", u.Name, c.Alertname)
			}
			first, fires := since[c.Alertname]
			switch {
			case len(c.ExpAlerts) > 0 && !fires:
				since[c.Alertname] = at(c.EvalTime)
				fired[c.Alertname] = true
			case len(c.ExpAlerts) == 0 && fires && at(c.EvalTime) > first:
				resolved[c.Alertname] = true
			}
		}
		for _, c := range u.PromqlExprTest {
			for record := range records {
				if regexp.MustCompile(`\b` + record + `(\W|$)`).MatchString(c.Expr) {
					samples[record] = append(samples[record], fmt.Sprint(c.ExpSamples))
				}
			}
		}
	}
	for name := range alerts {
		if !fired[name] || !resolved[name] {
			t.Errorf("%s: fires in a test: %t, and resolves later in it: %t", name, fired[name],
				resolved[name])
		}
	}
	for name := range records {
		if len(slices.Compact(slices.Sorted(slices.Values(samples[name])))) < 2 {
			t.Errorf("%s: no test sees two values of it", name)
		}
	}
	t.Logf("alerts %d, firing %d, resolving %d; records %d", len(alerts), len(fired), len(resolved),
		len(records))
}

// scrape is the golden scrape: the labels of each series, by name.
func scrape(t *testing.T) map[string][]map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../internal/report/testdata/metrics.golden")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]map[string]string{}
	line := regexp.MustCompile(`(?m)^([a-z]\w*)(?:\{(.*)\})? \S+$`)
	for _, m := range line.FindAllStringSubmatch(string(text), -1) {
		all[m[1]] = append(all[m[1]], labels(m[2], "="))
	}
	if len(all) < 30 {
		t.Fatalf("%d metrics in the golden scrape", len(all))
	}
	return all
}

// labels are those of a series, or of a selector that compares by op.
func labels(text, op string) map[string]string {
	all := map[string]string{}
	for _, m := range regexp.MustCompile(`(\w+)`+op+`"([^"]*)"`).FindAllStringSubmatch(text, -1) {
		all[m[1]] = m[2]
	}
	return all
}

// TestNames: each metric, label and value of a label in a rule is one that the agent has, or that
// is recorded here.
func TestNames(t *testing.T) {
	alerts, records := rules(t)
	have := scrape(t)
	known := map[string]bool{"job": true, "instance": true} // of the target
	for _, all := range have {
		for _, series := range all {
			for label := range series {
				known[label] = true
			}
		}
	}
	for name, r := range joined(alerts, records) {
		for _, problem := range unknown(r.Expr, have, records, known) {
			t.Errorf("%s: %s", name, problem)
		}
		for text := range maps.Values(r.Annotations) {
			for _, m := range regexp.MustCompile(`\bservice_proxy_agent_\w+`).FindAllString(text, -1) {
				if have[m] == nil && have[m+"_count"] == nil &&
					!slices.ContainsFunc(slices.Collect(maps.Keys(records)), func(s string) bool {
						return strings.Contains(s, m)
					}) {
					t.Errorf("%s: it speaks of %s, which is no metric", name, m)
				}
			}
		}
	}
}

// TestNamesSeesMistakes plants them.
func TestNamesSeesMistakes(t *testing.T) {
	_, records := rules(t)
	have, known := scrape(t), map[string]bool{"id": true, "job": true}
	for expr, want := range map[string]int{
		`service_proxy_agent_ready == 0`:                                         0,
		`service_proxy_agent_redy == 0`:                                          1,
		`service_proxy_agent_finding{id="envoy-down"} unless ignoring (id) up`:   0,
		`service_proxy_agent_finding{id="envoy-dwon"}`:                           1,
		`service_proxy_agent_finding{id="envoy-down",severity="advice"}`:         1,
		`service_proxy_agent_finding{id=~"envoy-down|envoy-dwon"}`:               1,
		`sum by (job, mod) (rate(service_proxy_agent_passes_total[5m]))`:         1,
		`job:service_proxy_agent_ready:ratio > 1`:                                0,
		`job:service_proxy_agent_readi:ratio > 1 or label_replace(up, "a", "b")`: 1,
	} {
		if got := unknown(expr, have, records, known); len(got) != want {
			t.Errorf("%s: %q, want %d problems", expr, got, want)
		}
	}
}

func joined(a, b map[string]rule) map[string]rule {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// words are PromQL's own.
var words = strings.Fields(`and or unless bool by on ignoring without sum avg count rate increase changes
	time absent label_replace clamp_min avg_over_time sum_over_time`)

// unknown is what an expression names and nobody has. The expressions here have no brace, bracket
// or parenthesis in a string; promtool parses them for real.
func unknown(expr string, have map[string][]map[string]string, records map[string]rule,
	known map[string]bool) (problems []string) {
	say := func(format string, args ...any) {
		problems = append(problems, fmt.Sprintf(format, args...))
	}
	selector := regexp.MustCompile(`([a-zA-Z_:][\w:]*)\{([^}]*)\}`)
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		equal, like := labels(m[2], "="), labels(m[2], "=~")
		for _, target := range []string{"job", "instance"} {
			delete(equal, target)
		}
		if have[m[1]] != nil && !slices.ContainsFunc(have[m[1]], func(s map[string]string) bool {
			for k, v := range equal {
				if s[k] != v {
					return false
				}
			}
			return true
		}) {
			say("no series is %s", m[0])
		}
		for k, v := range like {
			for _, one := range strings.Split(v, "|") {
				one = strings.TrimSuffix(one, ".0") // Prometheus 3 adds it to the bound of a bucket
				if !slices.ContainsFunc(have[m[1]], func(s map[string]string) bool { return s[k] == one }) {
					say("no series of %s has %s=%q", m[1], k, one)
				}
			}
		}
	}
	for _, m := range regexp.MustCompile(`\b(?:by|on|ignoring|without) \(([^)]*)\)`).
		FindAllStringSubmatch(expr, -1) {
		for _, label := range strings.Split(m[1], ", ") {
			if !known[label] {
				say("no series has the label %s", label)
			}
		}
	}
	rest := regexp.MustCompile(`"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|without) \([^)]*\)`).
		ReplaceAllString(expr, "")
	for _, name := range regexp.MustCompile(`[a-zA-Z_:][\w:]*`).FindAllString(rest, -1) {
		_, recorded := records[name]
		if have[name] == nil && !recorded && !slices.Contains(words, name) &&
			!slices.Contains(fromElsewhere, name) {
			say("there is no %s", name)
		}
	}
	return problems
}

// relabel is one of Prometheus' relabelings, as far as these files use them.
type relabel struct {
	SourceLabels []string `yaml:"source_labels"`
	Regex        string
	TargetLabel  string `yaml:"target_label"`
	Action       string
}

// TestScrapeConfigs: both find the same VMs and call them the same. (promtool checks the rest.)
func TestScrapeConfigs(t *testing.T) {
	type config struct {
		RuleFiles     []string `yaml:"rule_files"`
		ScrapeConfigs []struct {
			JobName        string                                   `yaml:"job_name"`
			GCE            []struct{ Project, Zone, Filter string } `yaml:"gce_sd_configs"`
			RelabelConfigs []relabel                                `yaml:"relabel_configs"`
		} `yaml:"scrape_configs"`
	}
	var both []config
	for _, name := range []string{"prometheus.yml", "prometheus-tls.yml"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var c config
		if err := yaml.Unmarshal(text, &c); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(c.ScrapeConfigs) != 1 || c.ScrapeConfigs[0].JobName != "service-proxy-agent" ||
			len(c.ScrapeConfigs[0].GCE) == 0 {
			t.Fatalf("%s: %+v", name, c)
		}
		for _, pattern := range c.RuleFiles {
			glob(t, pattern)
		}
		both = append(both, c)
	}
	if !reflect.DeepEqual(both[0], both[1]) {
		t.Errorf("with and without TLS they differ:\n%+v\n%+v", both[0], both[1])
	}
}

// TestOpsAgent: the file has the shape that Google documents, and nothing that the Ops Agent's
// prometheus receiver refuses (confgenerator/prometheus.go of GoogleCloudPlatform/ops-agent).
func TestOpsAgent(t *testing.T) {
	var file struct {
		Metrics struct {
			Receivers map[string]struct {
				Type   string
				Config struct {
					ScrapeConfigs []struct {
						JobName       string                       `yaml:"job_name"`
						Interval      string                       `yaml:"scrape_interval"`
						Static        []struct{ Targets []string } `yaml:"static_configs"`
						Relabel       []relabel                    `yaml:"relabel_configs"`
						MetricRelabel []relabel                    `yaml:"metric_relabel_configs"`
					} `yaml:"scrape_configs"`
				}
			}
			Service struct {
				Pipelines map[string]struct{ Receivers []string }
			}
		}
	}
	read(t, "ops-agent.yml", &file) // strictly: no other kind of discovery, no honor_labels
	var used []string
	for _, p := range file.Metrics.Service.Pipelines {
		used = append(used, p.Receivers...)
	}
	slices.Sort(used)
	if names := slices.Sorted(maps.Keys(file.Metrics.Receivers)); !slices.Equal(names, used) ||
		len(names) != 1 {
		t.Errorf("receivers %q, in pipelines %q", names, used)
	}
	for name, r := range file.Metrics.Receivers {
		if r.Type != "prometheus" || len(r.Config.ScrapeConfigs) != 1 {
			t.Fatalf("%s: %+v", name, r)
		}
		c := r.Config.ScrapeConfigs[0]
		every, err := model.ParseDuration(c.Interval)
		if err != nil || time.Duration(every) < 10*time.Second {
			t.Errorf("scrape_interval %q: %v; it takes none below 10s", c.Interval, err)
		}
		if c.JobName != "service-proxy-agent" || len(c.Static) != 1 ||
			!slices.Equal(c.Static[0].Targets, []string{"localhost:15020"}) {
			t.Errorf("%+v", c)
		}
		for _, l := range slices.Concat(c.Relabel, c.MetricRelabel) {
			if slices.Contains([]string{"location", "namespace", "cluster", "__name__"}, l.TargetLabel) {
				t.Errorf("it refuses to change %s", l.TargetLabel)
			}
			if _, err := regexp.Compile("^(?:" + l.Regex + ")$"); err != nil {
				t.Error(err)
			}
		}
	}
}
