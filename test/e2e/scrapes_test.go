//go:build lab

package e2e

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

var record = flag.Bool("record", false,
	"TestScrapes: write test/grafana/testdata anew, which takes eight minutes; "+
		"TestSymptoms: write the table of docs/symptoms.md, and the looks that a unit test replays")

const recorded = "../grafana/testdata"

// TestScrapes: what test/grafana evaluates the dashboards on is what this agent tells. Without
// -record it compares which metrics and labels there are. With it, it writes the scrapes anew.
func TestScrapes(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	if *record {
		recordHealthy(t, m, a)
		recordEnvoyDown(t, m, a)
		return
	}
	for _, name := range []string{"healthy.prom", "envoy-down.prom"} {
		if name == "envoy-down.prom" {
			m.Envoy.Kill()
			waitDown(t, a)
		}
		text, err := os.ReadFile(filepath.Join(recorded, name))
		must(t, err)
		want := shapes(string(text))
		eventually(t, 20*time.Second, "the metrics and labels of "+name, func() (bool, string) {
			code, body, err := a.Get("/metrics")
			have := shapes(body)
			return code == 200 && err == nil && slices.Equal(have, want), fmt.Sprintf(
				"recorded:\n%s\nnow:\n%s\nrun: go test -tags lab -run TestScrapes ./test/e2e -record",
				strings.Join(without(want, have), "\n"), strings.Join(without(have, want), "\n"))
		})
	}
}

// recordHealthy is five minutes of a healthy VM, scraped each 15 seconds: services come and go,
// somebody removes a rule, and then it is quiet.
func recordHealthy(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	r := recorder{agent: a}
	for i := range 21 {
		r.scrape(t)
		switch {
		case i == 20:
			r.write(t, "healthy.prom")
			return
		case i == 5:
			_, err := m.VM.Run(t.Context(),
				"iptables", "-t", "nat", "-D", "SERVICE_PROXY_SERVICE_CIDRS", "1")
			must(t, err)
		case i < 14 && i%2 == 0:
			_, err := m.CP.Set(services(both(i)))
			must(t, err)
		}
		time.Sleep(15 * time.Second)
	}
}

// recordEnvoyDown is two minutes of the same VM, with Envoy killed.
func recordEnvoyDown(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	m.Envoy.Kill()
	waitDown(t, a)
	r := recorder{agent: a}
	for i := range 9 {
		if i > 0 {
			time.Sleep(15 * time.Second)
		}
		r.scrape(t)
	}
	r.write(t, "envoy-down.prom")
}

func waitDown(t *testing.T, a *mesh.Agent) {
	t.Helper()
	_, err := a.Wait(within(t, 10*time.Second), "Envoy down", func(s status.Status) bool {
		return hasFinding(s, symptom.EnvoyDown)
	})
	must(t, err)
}

// recorder keeps scrapes in one text: the first as it was, and of each later one the samples that
// changed. A sample that is gone is told by its name behind "# gone".
type recorder struct {
	agent *mesh.Agent
	out   strings.Builder
	last  map[string]string
}

func (r *recorder) scrape(t *testing.T) {
	t.Helper()
	at := time.Now()
	code, body, err := r.agent.Get("/metrics")
	must(t, err)
	if code != 200 {
		t.Fatalf("/metrics: %d", code)
	}
	fmt.Fprintf(&r.out, "# scrape %.3f\n", float64(at.UnixMilli())/1000)
	now := map[string]string{}
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		series, value := cutSample(line)
		now[series] = value
		if was, there := r.last[series]; !there || was != value {
			fmt.Fprintf(&r.out, "%s %s\n", series, value)
		}
	}
	for series := range r.last {
		if _, there := now[series]; !there {
			fmt.Fprintf(&r.out, "# gone %s\n", series)
		}
	}
	r.last = now
}

func (r *recorder) write(t *testing.T, name string) {
	t.Helper()
	head := "# What a real agent told, recorded by TestScrapes of test/e2e.\n"
	must(t, os.WriteFile(filepath.Join(recorded, name), []byte(head+r.out.String()), 0o644))
}

func cutSample(line string) (series, value string) {
	line = strings.TrimSpace(line)
	i := strings.LastIndexByte(line, ' ')
	return line[:max(i, 0)], line[i+1:]
}

var labelValue = regexp.MustCompile(`"[^"]*"`)

// shapes are the metrics of a text, with the names of their labels.
func shapes(text string) []string {
	all := map[string]bool{}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			series, _ := cutSample(line)
			all[labelValue.ReplaceAllString(series, "")] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

func without(all, those []string) (rest []string) {
	for _, s := range all {
		if !slices.Contains(those, s) {
			rest = append(rest, s)
		}
	}
	return rest
}
