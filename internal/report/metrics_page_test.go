package report

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

const metricsPage = "../../docs/metrics.md"

// varied are labels whose values no list can hold.
var varied = map[string]string{
	"id":      "each finding of [symptoms.md](symptoms.md)",
	"version": "any", "commit": "any", "goversion": "any",
}

var fqName = regexp.MustCompile(Prefix + `[a-z_]+`)

// TestMetricsPage: docs/metrics.md has each metric as a scrape has it. `-update` writes it.
func TestMetricsPage(t *testing.T) {
	m := NewMetrics(sources())
	m.Pass(status.Status{Families: []status.Family{{Family: "IPv4"}, {Family: "IPv6"}}},
		Pass{Writes: map[string]Writes{"IPv4": {InSync: noon}, "IPv6": {InSync: noon}}})
	for _, p := range twoPasses() {
		m.Pass(p.status, p.happened)
	}
	page := metricsText(gather(t, m))
	for _, d := range all {
		name := fqName.FindStringSubmatch(d.String())
		if name == nil || !strings.Contains(page, "\n| `"+name[0]+"` |") {
			t.Errorf("this scrape lacks %s", d)
		}
	}
	if *update {
		if err := os.WriteFile(metricsPage, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(metricsPage); err != nil || string(have) != page {
		t.Errorf("docs/metrics.md is not what a scrape has (%v): go test ./internal/report -update", err)
	}
}

func metricsText(families []*dto.MetricFamily) string {
	var b strings.Builder
	b.WriteString(`# Metrics

What ` + "`/metrics`" + ` on ` + "`:15020`" + ` has (` + "`--listen`, or `--metrics-listen`" + `
[with TLS and passwords](settings.md#metrics-with-tls-and-passwords)). Beside these are the
customary ` + "`go_*` and `process_*`" + ` of this process.

No label names a service, an address or a port, so the number of series is the same on every VM. A
counter is there from 0 on. What stands after a pass of the loop is there after the first one.

[deploy/prometheus](../deploy/prometheus/README.md) has alerts, recording rules and scrape
configurations, [deploy/grafana](../deploy/grafana/README.md) dashboards. An alert on
` + "`finding`" + ` has the steps of its ` + "`id`" + ` in [symptoms.md](symptoms.md).

This page is made by ` + "`go test ./internal/report -update`" + `.

| name | type | unit | labels | what it is |
|---|---|---|---|---|
`)
	ofLabel := map[string]map[string][]string{} // label, its values, the metrics that have these
	for _, f := range families {
		values := map[string]map[string]bool{}
		for _, one := range f.Metric {
			for _, l := range one.Label {
				if values[l.GetName()] == nil {
					values[l.GetName()] = map[string]bool{}
				}
				values[l.GetName()][l.GetValue()] = true
			}
		}
		name := strings.TrimPrefix(f.GetName(), Prefix)
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", f.GetName(),
			strings.ToLower(f.GetType().String()),
			unit(name, f.GetType()), quotedAll(slices.Sorted(maps.Keys(values))),
			strings.ReplaceAll(f.GetHelp(), "|", `\|`))
		for label, has := range values {
			if ofLabel[label] == nil {
				ofLabel[label] = map[string][]string{}
			}
			all := cmp.Or(varied[label], quotedAll(slices.Sorted(maps.Keys(has))))
			ofLabel[label][all] = append(ofLabel[label][all], name)
		}
	}
	b.WriteString("\n## Labels\n\nMetrics without `" + Prefix + "`, which each begins with.\n\n" +
		"| label | of | values |\n|---|---|---|\n")
	for _, label := range slices.Sorted(maps.Keys(ofLabel)) {
		for _, values := range slices.Sorted(maps.Keys(ofLabel[label])) {
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", label, quotedAll(ofLabel[label][values]), values)
		}
	}
	return b.String()
}

// unit is what Prometheus' rules of naming say of a name's end.
func unit(name string, kind dto.MetricType) string {
	name = strings.TrimSuffix(name, "_total")
	switch {
	case strings.HasSuffix(name, "_timestamp_seconds"):
		return "seconds since 1970"
	case strings.HasSuffix(name, "_seconds"):
		return "seconds"
	case strings.HasSuffix(name, "_ratio"):
		return "0 to 1"
	case kind == dto.MetricType_COUNTER:
		return "count"
	}
	return "–"
}

func quotedAll(words []string) string {
	if len(words) == 0 {
		return "–"
	}
	return "`" + strings.Join(words, "`, `") + "`"
}
