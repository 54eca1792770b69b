// Package grafana checks the dashboards of deploy/grafana: that they are what Grafana's schema
// says, and that each query gives data, on scrapes that test/e2e recorded of a real agent. It is a
// module of its own, for Prometheus' engine and Grafana's types are for nothing else here: some two
// minutes to build the first time.
//
//	make soak GROUP=grafana
//
// What needs neither engine nor types (names of metrics and labels, titles, units) is tested with
// each `make check`, in internal/report.
package grafana

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	sdk "github.com/grafana/grafana-foundation-sdk/go/dashboard"
	query "github.com/grafana/grafana-foundation-sdk/go/prometheus"
)

// load reads a dashboard of deploy/grafana. An unknown or a missing field is an error.
func load(t *testing.T, name string) sdk.Dashboard {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../deploy/grafana", name))
	if err != nil {
		t.Fatal(err)
	}
	plugins.RegisterDefaultPlugins()
	var strict, d sdk.Dashboard
	// Without a mistake it returns an empty list of mistakes, which is no nil, and takes that of a
	// panel for a reason to leave the panel out. So what it reads is not used.
	if err := strict.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		t.Fatalf("%s: %v", name, err)
	}
	var raw struct {
		Panels []struct {
			Type        string
			FieldConfig struct {
				Defaults  map[string]json.RawMessage `json:"defaults"`
				Overrides json.RawMessage            `json:"overrides"`
			}
		}
	}
	if err := errors.Join(json.Unmarshal(text, &d), json.Unmarshal(text, &raw)); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	// Of a panel's fields it reads only what belongs to the panel's type strictly.
	for i, p := range raw.Panels {
		if p.Type == "row" {
			continue
		}
		delete(p.FieldConfig.Defaults, "links") // it takes links of data for links of a dashboard
		text, err := json.Marshal(p.FieldConfig)
		if err != nil {
			t.Fatal(err)
		}
		var fields sdk.FieldConfigSource
		if err := fields.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
			t.Fatalf("%s: panels[%d].fieldConfig.%v", name, i, err)
		}
	}
	if err := d.Validate(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return d
}

var names = []string{"fleet.json", "vm.json"}

// panels are those that show data.
func panels(d sdk.Dashboard) (all []sdk.Panel) {
	for _, p := range d.Panels {
		if p.Panel != nil {
			all = append(all, *p.Panel)
		}
	}
	return all
}

// queries are a panel's, as they were written.
func queries(t *testing.T, p sdk.Panel) (all []query.Dataquery) {
	t.Helper()
	for _, target := range p.Targets {
		q, ok := target.(*query.Dataquery)
		if !ok {
			t.Fatalf("%s: a query of type %T", *p.Title, target)
		}
		all = append(all, *q)
	}
	return all
}

// TestSchema: nothing that Grafana's types do not know, nothing that they need is missing, each ID
// is there once, and the links between the dashboards lead somewhere.
func TestSchema(t *testing.T) {
	uids := map[string]bool{}
	var links []string
	for _, name := range names {
		d := load(t, name)
		uids[*d.Uid] = true
		ids := map[uint32]bool{}
		for _, p := range d.Panels {
			id := uint32(0)
			if p.RowPanel != nil {
				id = p.RowPanel.Id
			} else {
				id = *p.Panel.Id
			}
			if ids[id] {
				t.Errorf("%s: two panels have ID %d", name, id)
			}
			ids[id] = true
		}
		if len(panels(d)) < 30 {
			t.Errorf("%s: only %d panels", name, len(panels(d)))
		}
		text, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`"/d/([^"?]+)`).FindAllStringSubmatch(string(text), -1) {
			links = append(links, m[1])
		}
	}
	if len(links) < 4 {
		t.Errorf("only %d links between the dashboards", len(links))
	}
	for _, uid := range links {
		if !uids[uid] {
			t.Errorf("a link to %q, which is no dashboard here", uid)
		}
	}
}

// TestGrid: no two panels of a dashboard stand in one place, and none over the edge.
func TestGrid(t *testing.T) {
	for _, name := range names {
		taken := map[[2]uint32]string{}
		for _, p := range load(t, name).Panels {
			title, pos := "", sdk.GridPos{}
			if p.RowPanel != nil {
				title, pos = *p.RowPanel.Title, *p.RowPanel.GridPos
			} else {
				title, pos = *p.Panel.Title, *p.Panel.GridPos
			}
			if pos.X+pos.W > 24 {
				t.Errorf("%s: %q is wider than the page", name, title)
			}
			for x := pos.X; x < pos.X+pos.W; x++ {
				for y := pos.Y; y < pos.Y+pos.H; y++ {
					if other := taken[[2]uint32{x, y}]; other != "" {
						t.Fatalf("%s: %q stands on %q", name, title, other)
					}
					taken[[2]uint32{x, y}] = title
				}
			}
		}
	}
}

// fill puts values in for Grafana's variables, as the VM dashboard has them for one VM, and the
// fleet's for All.
func fill(expr, instance string) string {
	return strings.NewReplacer("$__rate_interval", "2m", "$__range", "5m", "$__interval", "15s",
		"$project", ".*", "$zone", ".*", "$instance_group", ".*", "$instance", instance).Replace(expr)
}
